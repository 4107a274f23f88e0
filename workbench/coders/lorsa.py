"""Lorsa, a sparse replacement of one attention layer: many heads of rank 1 whose patterns they share in groups.

Low-rank sparse attention (He et al., "Towards Understanding the Nature of Attention with Low-Rank Sparse Decomposition", ICLR
2026). With x the layer's normed input, A[g] the pattern of query-key group g and g(i) the group of feature i:

    z~_i(t) = sum_s A[g(i), t, s] (x_s . w_v_i + b_v_i)        z(t) = the k largest positive z~(t), all others 0
    y^(t)   = sum_i z_i(t) w_o_i + b_o

Every feature moves one number along one direction, and where it took the number from is exact: ``feature_source``. Patterns are
those of softmax over the group's own queries and keys, which start as the model's. Values of a group are one matrix, mixed in
chunks of rows; no T x T tensor is made.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from workbench.coders.coder import Progress, Terms
from workbench.coders.cross_layer import WEIGHTS, assign, read_cfg, read_weights
from workbench.coders.query_key import QueryKey, QueryKeyWeights, checked_padding
from workbench.errors import WorkbenchError
from workbench.kernels.sparse_decode import sparse_decode
from workbench.maps import AttentionMap

ARCHITECTURE = "workbench-lorsa"
AUXILIARY = 1 / 32


class Lorsa(nn.Module):
    """F rank-1 heads in G query-key groups of F / G each: features ``g F / G`` to ``(g + 1) F / G - 1`` are group g's.

    ``W_V [D, F]`` (reading directions), ``b_V [F]``, ``W_O [F, D']`` (writing directions), ``b_O [D']``; ``qk`` the queries and
    keys of the groups. Sequences are ``[B, T, D]``; ``padding`` ``[B, T]`` bool is False on tokens that are none. ``k = F`` keeps
    every positive feature. ``about`` says what it was made from (model, ``reads``, ``writes``) and is saved.
    """

    def __init__(
        self, weights: QueryKeyWeights, features: int, k: int, *, width_out: int | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        self.qk = QueryKey(weights)
        groups, width = self.qk.heads, self.qk.width
        if isinstance(features, bool) or not isinstance(features, int) or features < groups or features % groups:
            raise WorkbenchError(f"features is a multiple of the {groups} query-key groups; got {features!r}")
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= features:
            raise WorkbenchError(f"k, the features per token, is a whole number from 1 to {features}; got {k!r}")
        self.features, self.k, self.width = features, k, width
        self.width_out = width if width_out is None else width_out
        self.about: dict[str, Any] = {}
        generator = torch.Generator().manual_seed(seed)
        out = torch.randn(features, self.width_out, generator=generator)
        like = weights.q
        self.W_V = nn.Parameter((torch.randn(width, features, generator=generator) * width**-0.5).to(like))
        self.b_V = nn.Parameter(torch.zeros(features).to(like))
        self.W_O = nn.Parameter((out / out.norm(dim=1, keepdim=True)).to(like))
        self.b_O = nn.Parameter(torch.zeros(self.width_out).to(like))

    @classmethod
    def from_model(cls, model: Any, layer: int, *, features: int, k: int, seed: int = 0) -> Lorsa:
        """A start for training: queries and keys of a layer, and random directions of its heads' value and output matrices.

        Feature i of head h reads W_V[h] r and writes r^T W_O[h] with r a random direction, in pairs r, -r. Serves native models
        and Hugging Face models with plain projections; refuses layers whose pattern it does not reproduce.
        """
        from workbench.coders.lorsa_model import started

        return started(model, layer, features, k, seed)

    @classmethod
    def exact(cls, model: Any, layer: int) -> Lorsa:
        """The layer itself as 2 H E features that are all kept: the singular vectors of W_V W_O of every head, and their
        negatives, as a feature is never negative. Refuses layers with an output gate or a norm after W_O."""
        from workbench.coders.lorsa_model import exact

        return exact(model, layer)

    # ------------------------------------------------------------ codes and outputs

    def pre(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """z~ ``[B, T, F]`` of x ``[B, T, D]``, before the k largest are chosen; rows of padding are zero."""
        if x.ndim != 3 or x.shape[2] != self.width:
            raise WorkbenchError(f"Lorsa reads sequences [B, T, D = {self.width}]; got {list(x.shape)}")
        values = (x @ self.W_V + self.b_V).unflatten(-1, (self.qk.heads, -1)).transpose(1, 2)
        return self.qk.mix(x, values, padding).transpose(1, 2).flatten(2)

    def select(self, pre: Tensor) -> Tensor:
        """The k largest positive of ``[..., F]``, all others 0."""
        if self.k == self.features:
            return pre.relu()
        values, indices = pre.topk(self.k, dim=-1)
        return torch.zeros_like(pre).scatter(-1, indices, values.relu())

    def encode(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """Codes z ``[B, T, F]``, at most k of them above 0."""
        return self.select(self.pre(x, padding))

    def decode(self, z: Tensor) -> Tensor:
        """y^ ``[..., D']`` of codes ``[..., F]``."""
        return z @ self.W_O + self.b_O

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.decode(self.encode(x, padding))

    def objective(self, x: Tensor, y: Tensor, now: Progress, padding: Tensor | None = None) -> Terms:
        """Squared error summed over D', mean over the tokens that are no padding, and the auxiliary loss of dead features.

        ``x [B, T, D]``, ``y [B, T, D']``; ``now.silent`` and ``active`` are ``[F]``, ``output`` is ``[B, T, D']``.
        """
        pre = self.pre(x, padding)
        if y.shape != (*x.shape[:2], self.width_out):
            raise WorkbenchError(f"y is {[*x.shape[:2], self.width_out]} for this x; got {list(y.shape)}")
        real = checked_padding(x, padding)
        values, indices = pre.topk(self.k, dim=-1)
        values = values.relu()
        flat = sparse_decode(values.flatten(0, 1), indices.flatten(0, 1), self.W_O, self.b_O)
        output = flat.view(*x.shape[:2], self.width_out)
        weight = torch.ones(x.shape[:2], dtype=x.dtype, device=x.device) if real is None else real.to(x.dtype)
        count = weight.sum()
        error = ((output - y).square().sum(-1) * weight).sum() / count
        active = torch.bincount(indices[(values > 0) & (weight > 0)[..., None]], minlength=self.features).float()
        parts = {"error": error.detach(), "l0": active.sum() / count}
        loss = error
        dead = now.dead
        most = max(1, self.width // 2)
        few = min(most, int(dead.sum()))
        if few:
            guess, places = pre.masked_fill(~dead, float("-inf")).topk(few, dim=-1)
            made = sparse_decode(guess.relu().flatten(0, 1), places.flatten(0, 1), self.W_O).view_as(output)
            left = (made - (y - output).detach()).square().sum(-1)
            auxiliary = min(1.0, float(dead.sum()) / most) * (left * weight).sum() / count
            loss, parts["auxiliary"] = error + AUXILIARY * auxiliary, auxiliary.detach()
        return Terms(loss, output, active, parts)

    # ------------------------------------------------------------ where features look

    @property
    def groups(self) -> Tensor:
        """The query-key group of every feature, ``[F]``."""
        return torch.arange(self.features) // (self.features // self.qk.heads)

    def attention(self, x: Tensor, padding: Tensor | None = None) -> AttentionMap:
        """The patterns of the query-key groups as a map ``[B, G, T, T]``; feature i has head ``groups[i]``'s."""
        return self.qk.attention(x, padding)

    def feature_attention(self, x: Tensor, feature: int, padding: Tensor | None = None) -> AttentionMap:
        """The pattern of one feature, ``[B, 1, T, T]``."""
        return self.attention(x, padding).heads([int(self.groups[self._feature(feature)])])

    @torch.no_grad()
    def feature_source(self, x: Tensor, feature: int, position: int, padding: Tensor | None = None) -> Tensor:
        """What every source position s gives to z~ of a feature at one position: A[t, s] (x_s . w_v + b_v), ``[B, T]``.

        The sum over s is ``pre(x)[:, position, feature]``; it is the code itself where the feature is among the k largest.
        """
        if not 0 <= position < x.shape[1]:
            raise WorkbenchError(f"position {position} is not in this sequence of {x.shape[1]} tokens")
        rows = self.feature_attention(x, feature, padding).rows(position, position + 1)[:, 0, 0]
        return rows * (x @ self.W_V[:, feature] + self.b_V[feature]).to(rows.dtype)

    def _feature(self, feature: int) -> int:
        if isinstance(feature, bool) or not isinstance(feature, int) or not 0 <= feature < self.features:
            raise WorkbenchError(f"features count from 0 to {self.features - 1}; got {feature!r}")
        return feature

    # ------------------------------------------------------------ directions and files

    def decoder_norms(self) -> Tensor:
        """Norms of the writing directions, ``[F]``."""
        return self.W_O.norm(dim=1)

    @torch.no_grad()
    def normalise(self) -> None:
        """Writing directions of norm 1, their size moved into the reading directions; no output changes while k = F."""
        norms = self.decoder_norms().clamp(min=1e-12)
        self.W_O.div_(norms[:, None])
        self.W_V.mul_(norms)
        self.b_V.mul_(norms)

    def save(self, folder: str | Path) -> Path:
        """Write ``cfg.json`` and ``sae_weights.safetensors`` into the new folder; ``Lorsa.load`` reads it."""
        from safetensors.torch import save_file

        from workbench.results import new_folder

        cfg = {
            "architecture": ARCHITECTURE, "d_in": self.width, "d_out": self.width_out, "d_sae": self.features, "k": self.k,
            "groups": self.qk.heads, "dtype": str(self.W_V.dtype).removeprefix("torch."), "query_key": self.qk.settings,
            "about": self.about,
        }  # fmt: skip
        with new_folder(Path(folder)) as part:
            (part / "cfg.json").write_text(json.dumps(cfg, indent=1, allow_nan=False) + "\n")
            save_file({k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}, part / WEIGHTS)
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> Lorsa:
        """The Lorsa in a folder that ``save`` wrote."""
        folder = Path(folder)
        cfg, state = read_cfg(folder, ARCHITECTURE), read_weights(folder / WEIGHTS)
        given = {name.removeprefix("qk."): value for name, value in state.items()}
        absent = [f"qk.{name}" for name in ("W_Q", "W_K") if name not in given]
        if absent:
            raise WorkbenchError(f"{folder / WEIGHTS} lacks {', '.join(absent)}")
        weights = QueryKeyWeights(
            given["W_Q"], given["W_K"], given.get("b_Q"), given.get("b_K"), q_norm=given.get("q_norm"),
            k_norm=given.get("k_norm"), rates=given.get("rates"), sink=given.get("sink"), **cfg["query_key"],
        )  # fmt: skip
        found = cls(weights, cfg["d_sae"], cfg["k"], width_out=cfg["d_out"])
        assign(found, state, folder / WEIGHTS)
        found.about = dict(cfg["about"])
        return found
