"""Temporal coders (arXiv 2511.01836): an attention over the earlier tokens predicts a part of x, features explain the rest.

    z = ReLU(lam r W_enc)   c = what c_proj makes of softmax attention from z_t to z_{<t}   p = ReLU(c)
    scale = (p W_dec . r) / (|p W_dec| + 1e-6)^2      r -= scale p W_dec       once per attention layer, from r = x - centre
    f = ReLU(lam r W_enc), of which the ``k`` largest stay;      y = f W_dec + b_dec + sum of the predictions

with lam = 1 / (4 D_in). ``encode`` gives f, the new part; ``decode`` leaves the prediction out; ``skipped`` is the prediction,
so that ``forward`` is the whole. x is ``[B, T, D_in]``, whole sequences: rows in any other order mean nothing, and ``[N, D_in]``
is refused. Files come from SAELens; there is no training here.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.coders.code import Code
from workbench.coders.coder import Coder, Progress, Terms
from workbench.errors import Refused, WorkbenchError


class Temporal(Coder):
    kind = "temporal"
    paper = "arXiv 2511.01836"
    defaults: ClassVar[dict[str, Any]] = {
        "heads": 8, "layers": 1, "bottleneck": 64, "k": None, "tied": True, "bias": True,
    }  # fmt: skip

    def _begin(self) -> None:
        heads, bottleneck = self.options["heads"], self.options["bottleneck"]
        if self.features % (heads * bottleneck):
            raise WorkbenchError(f"{self.features} features are no multiple of {heads} heads x bottleneck {bottleneck}")
        small = self.features // bottleneck
        self.attn_layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "k_ctx": nn.Linear(self.features, small),
                    "q_target": nn.Linear(self.features, small),
                    "v_ctx": nn.Linear(self.features, self.features),
                    "c_proj": nn.Linear(self.features, self.features),
                }
            )
            for _ in range(self.options["layers"])
        )

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What is predicted from earlier tokens, in the space of x ``[B, T, D]``, and the pre-activations of the rest."""
        self._check(x)
        if x.ndim < 3:
            raise Refused(
                f"a temporal coder reads whole sequences [B, T, D]; got {list(x.shape)}, whose rows have no order"
            )
        rest = x if self.centre is None else x - self.centre
        lam, predicted = 1 / (4 * self.d_in), torch.zeros_like(x)
        for layer in self.attn_layers:
            z = torch.relu((rest * lam) @ self.W_enc)
            written = torch.relu(self._attend(layer, z)) @ self.W_dec
            scale = (written * rest).sum(-1, keepdim=True) / (written.norm(dim=-1, keepdim=True) + 1e-6).pow(2)
            predicted, rest = predicted + scale * written, rest - scale * written
        return predicted, (rest * lam) @ self.W_enc

    def _attend(self, layer: nn.Module, z: Tensor) -> Tensor:
        earlier = F.pad(z, (0, 0, 1, 0))[..., :-1, :]
        modules = dict(layer.named_children())
        q, k, v = modules["q_target"](z), modules["k_ctx"](earlier), modules["v_ctx"](earlier)
        q, k, v = (t.unflatten(-1, (self.options["heads"], -1)).transpose(-2, -3) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return modules["c_proj"](mixed.transpose(-2, -3).flatten(-2))

    def pre(self, x: Tensor) -> Tensor:
        return self.parts(x)[1]

    def activate(self, pre: Tensor) -> Tensor:
        f, k = torch.relu(pre), self.options["k"]
        if k is None:
            return f
        found = f.topk(k, dim=-1)
        return torch.zeros_like(f).scatter(-1, found.indices, found.values)

    def sparse(self, x: Tensor) -> Code:
        return Code.of(self.encode(x).flatten(0, -2))

    def skipped(self, x: Tensor) -> Tensor:
        """The prediction from earlier tokens, ``[B, T, D]``."""
        return self.parts(x)[0]

    def decode(self, f: Tensor | Code) -> Tensor:
        y = super().decode(f)
        return y if self.options["bias"] else y - self.b_dec

    def objective(self, x: Tensor, target: Tensor, now: Progress) -> Terms:
        raise Refused("temporal coders are read from files and not trained here")

    def fold(self, scale_in: Tensor, scale_out: Tensor) -> None:
        raise Refused("a temporal coder cannot be rescaled")
