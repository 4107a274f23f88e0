"""Matching pursuit coders: features are found one after another, each from what the ones before left over.

    r = x - centre;   repeat:  j = argmax_i ReLU(r . d_i),  v = ReLU(r . d_j),  f_j += v,  r -= v d_j

until ``max_iterations`` (D_in if None), until |r| < ``residual_threshold`` (0 never stops), or with ``stop_on_duplicate_support``
when a step adds no new feature; a row that has stopped stays as it is. Encoder and decoder are the same directions d_i. A file
says whether b_dec is used; if it is not taken off the input it is not added to the output either. Files come from SAELens;
there is no training here.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from workbench.coders.code import Code
from workbench.coders.coder import Coder, Progress, Terms
from workbench.errors import Refused
from workbench.kernels.sparse_decode import sparse_decode


class MatchingPursuit(Coder):
    kind = "matching-pursuit"
    defaults: ClassVar[dict[str, Any]] = {
        "residual_threshold": 0.01, "max_iterations": None, "stop_on_duplicate_support": True,
    }  # fmt: skip

    def activate(self, pre: Tensor) -> Tensor:
        raise Refused("a matching pursuit has no pre-activations; coder.encode(x) finds its code from x")

    def pre(self, x: Tensor) -> Tensor:
        raise Refused("a matching pursuit has no pre-activations; coder.encode(x) finds its code from x")

    def encode(self, x: Tensor) -> Tensor:
        self._check(x)
        options, rest = self.options, x.reshape(-1, x.shape[-1])
        if self.centre is not None:
            rest = rest - self.centre
        f = rest.new_zeros(len(rest), self.features)
        done, support = torch.zeros(len(rest), dtype=torch.bool, device=x.device), f != 0
        limit = self.d_in if options["max_iterations"] is None else options["max_iterations"]
        for _ in range(limit):
            found = (rest @ self.W_dec.t()).argmax(1)
            chosen = self.W_dec[found]
            value = ((rest * chosen).sum(1).relu() * ~done)[:, None]
            f = f.scatter_add(1, found[:, None], value)
            rest = rest - value * chosen
            if options["stop_on_duplicate_support"]:
                done |= ((f != 0) == support).all(1)
                support = f != 0
            if options["residual_threshold"] > 0:
                done |= rest.norm(dim=1) < options["residual_threshold"]
            if bool(done.all()):
                break
        return f.view(*x.shape[:-1], self.features)

    def decode(self, f: Tensor | Code) -> Tensor:
        if self.centred:
            return super().decode(f)
        return sparse_decode(f.values, f.indices, self.W_dec) if isinstance(f, Code) else f @ self.W_dec

    def objective(self, x: Tensor, target: Tensor, now: Progress) -> Terms:
        raise Refused("matching pursuit coders are read from files and not trained here")

    def fold(self, scale_in: Tensor, scale_out: Tensor) -> None:
        raise Refused("a matching pursuit coder reads and writes in one scale; it cannot be rescaled")
