"""What every dictionary of features has: an encoder, an activation, a decoder.

    pre = (x - centre) W_enc + b_enc          centre = b_dec for autoencoders, 0 for transcoders and crosscoders
    f   = activation(pre) >= 0                the kind's own, see ``kinds/``
    y   = f W_dec + b_dec (+ x W_skip)

An autoencoder (SAE) has y approximate x. A transcoder reads one place of a model and has y approximate what another place
holds (Dunefsky et al. 2024, arXiv 2406.11944; with W_skip Paulo et al. 2025, arXiv 2501.18823). A crosscoder reads and writes
several places side by side (Lindsey et al. 2024): x and y are their concatenation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from workbench.coders.code import Code
from workbench.errors import UnknownName, WorkbenchError, check_types
from workbench.kernels.sparse_decode import sparse_decode


@dataclass(frozen=True, eq=False)
class Progress:
    """Where a training stands. ``silent`` ``[F]``: rows seen since each feature was last active; a feature that was silent for
    ``dead_after`` rows is dead."""

    step: int
    steps: int
    silent: Tensor
    dead_after: int

    @property
    def dead(self) -> Tensor:
        """``[F]`` bool."""
        return self.silent >= self.dead_after

    def ramp(self, share: float) -> float:
        """From 0 to 1 over the first ``share`` of the training."""
        return min(1.0, (self.step + 1) / max(1.0, share * self.steps))


@dataclass(frozen=True, eq=False)
class Terms:
    """What a training step comes to: the ``loss`` to go down, the ``output`` ``[N, D_out]``, in how many rows each feature was
    ``active`` ``[F]``, and the ``parts`` of the loss."""

    loss: Tensor
    output: Tensor
    active: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)


class Coder(nn.Module, ABC):
    """A dictionary of F features. ``W_enc [D_in, F]``, ``b_enc [F]``, ``W_dec [F, D_out]``, ``b_dec [D_out]``, ``W_skip
    [D_in, D_out]`` or None. ``reads`` and ``writes`` are the widths of the parts of x and y, one each unless it is a crosscoder.
    ``about`` says where it belongs (model, sites, recipe); it is saved with the coder and must be JSON.

    ``options`` are the kind's own numbers (``defaults``); unknown ones and wrong types are refused.
    """

    kind: ClassVar[str]
    defaults: ClassVar[dict[str, Any]] = {}
    paper: ClassVar[str] = ""
    unit_decoder: ClassVar[bool] = True
    """Whether training keeps the rows of W_dec at norm 1."""
    scaled: ClassVar[tuple[str, ...]] = ("b_enc",)
    """Parameters and buffers that scale with the activations."""

    def __init__(
        self,
        d_in: int,
        features: int,
        *,
        d_out: int | None = None,
        skip: bool = False,
        centred: bool | None = None,
        reads: Sequence[int] | None = None,
        writes: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        for name, number in (("d_in", d_in), ("features", features), ("d_out", d_in if d_out is None else d_out)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise WorkbenchError(f"{name} of a coder is a whole number from 1; got {number!r}")
        for name in options:
            if name not in self.defaults:
                raise UnknownName(f"option of {self.kind} coders", name, self.defaults)
        self.options: dict[str, Any] = {**self.defaults, **options}
        check_types(f"coder {self.kind}", {name: _type(value) for name, value in self.defaults.items()}, options)
        self.reads = tuple(reads) if reads is not None else (d_in,)
        self.writes = tuple(writes) if writes is not None else (d_in if d_out is None else d_out,)
        if sum(self.reads) != d_in or sum(self.writes) != (d_in if d_out is None else d_out):
            raise WorkbenchError(f"parts {self.reads} and {self.writes} do not add up to D_in {d_in} and D_out {d_out}")
        autoencoder = d_out is None and len(self.reads) == 1 and not skip
        self.centred = autoencoder if centred is None else centred
        if self.centred and sum(self.writes) != d_in:
            raise WorkbenchError(f"b_dec cannot be taken off the input: it has width {sum(self.writes)}, x has {d_in}")
        self.features = features
        self.about: dict[str, Any] = {}
        rows = torch.randn(features, d_in, generator=generator)
        rows /= rows.norm(dim=1, keepdim=True)
        # Stored as the transpose of [F, D_in]: that is the layout its sparse gradient is made in.
        self.W_enc = nn.Parameter(rows.t())
        self.b_enc = nn.Parameter(torch.zeros(features))
        wide = sum(self.writes)
        out = rows.clone() if wide == d_in else torch.randn(features, wide, generator=generator)
        self.W_dec = nn.Parameter(out / out.norm(dim=1, keepdim=True))
        self.b_dec = nn.Parameter(torch.zeros(wide))
        self.W_skip = nn.Parameter(torch.zeros(d_in, wide)) if skip else None
        self._begin()

    def _begin(self) -> None:
        """Make the kind's further parameters and check its options."""

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_out(self) -> int:
        return self.W_dec.shape[1]

    @property
    def centre(self) -> Tensor | None:
        """What is taken off the input, ``[D_in]``."""
        return self.b_dec if self.centred else None

    def pre(self, x: Tensor) -> Tensor:
        """Pre-activations ``[..., F]``."""
        self._check(x)
        return (x if self.centre is None else x - self.centre) @ self.W_enc + self.b_enc

    @abstractmethod
    def activate(self, pre: Tensor) -> Tensor:
        """The code of pre-activations ``[..., F]``, as it is at inference."""

    def encode(self, x: Tensor) -> Tensor:
        """The code of x as ``[..., F]``, almost everywhere 0."""
        return self.activate(self.pre(x))

    def sparse(self, x: Tensor) -> Code:
        """The code of the rows of x, flattened to ``[N, D_in]``."""
        return Code.of(self.encode(x.reshape(-1, x.shape[-1])))

    def decode(self, f: Tensor | Code) -> Tensor:
        """``f W_dec + b_dec``: ``[..., D_out]`` of a dense ``[..., F]``, ``[N, D_out]`` of a ``Code``."""
        if isinstance(f, Code):
            return sparse_decode(f.values, f.indices, self.W_dec, self.b_dec)
        if f.shape[-1] != self.features:
            raise WorkbenchError(f"a code of this coder has {self.features} features; got {list(f.shape)}")
        return f @ self.W_dec + self.b_dec

    def skipped(self, x: Tensor) -> Tensor | float:
        """``x W_skip``, 0 without one."""
        return 0.0 if self.W_skip is None else x @ self.W_skip

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D_out]``: the reconstruction of x, or the prediction of what it becomes."""
        return self.decode(self.encode(x)) + self.skipped(x)

    def objective(self, x: Tensor, target: Tensor, now: Progress) -> Terms:
        """The training loss of rows ``x [N, D_in]`` and ``target [N, D_out]``; for an autoencoder they are the same."""
        f = self.activate(self.pre(x))
        output = self.decode(f) + self.skipped(x)
        error = squared(output, target)
        return Terms(error, output, (f > 0).sum(0), {"error": error})

    def strength(self, x: Tensor, size: Tensor, features: Tensor) -> Tensor:
        """How active ``features`` ``[N]`` shall be, each on its row of x ``[N, D_in]``, when they are drawn anew to explain the
        ``size`` ``[N]`` of its error, ``[N]``; more where less would not make them active."""
        return size

    def decoder_norms(self) -> Tensor:
        """Norm of each feature's row ``[F]``; of a crosscoder the sum over its parts (Lindsey et al. 2024)."""
        return torch.stack([part.norm(dim=1) for part in self.W_dec.split(self.writes, 1)]).sum(0)

    @torch.no_grad()
    def fold(self, scale_in: Tensor, scale_out: Tensor) -> None:
        """Turn a coder of ``x * scale_in`` and ``y * scale_out`` (``[D_in]``, ``[D_out]``) into one of x and y itself.

        Activations are divided by the mean of ``scale_in``; decoder rows keep their norm if both scales are one number."""
        mean = scale_in.mean()
        self.W_enc.mul_((scale_in / mean)[:, None])
        for name in self.scaled:
            getattr(self, name).div_(mean)
        self.W_dec.mul_(mean / scale_out)
        self.b_dec.div_(scale_out)
        if self.W_skip is not None:
            self.W_skip.mul_(scale_in[:, None] / scale_out)

    def save(self, folder: str | Path) -> Path:
        """Write the new folder ``folder`` in the layout of SAELens: ``cfg.json`` and ``sae_weights.safetensors``."""
        from workbench.coders.folder import save_coder

        return save_coder(self, folder)

    @classmethod
    def load(cls, folder: str | Path) -> Coder:
        """The coder in a folder, whoever wrote it; ``wb.load_coder`` tells what can be read."""
        from workbench.coders.folder import load_coder

        return load_coder(folder)

    def _check(self, x: Tensor) -> None:
        if x.shape[-1:] != (self.d_in,):
            raise WorkbenchError(f"this {self.kind} coder reads rows of width {self.d_in}; got {list(x.shape)}")

    def extra_repr(self) -> str:
        said = ", ".join(f"{name}={value}" for name, value in self.options.items())
        place = f", {self.about['reads']}" if "reads" in self.about else ""
        return f"{self.kind}, {self.d_in} -> {self.features} -> {self.d_out}{place}, {said}"


def squared(output: Tensor, target: Tensor) -> Tensor:
    """Squared error, summed over the width, mean over rows."""
    return (output - target).pow(2).sum(-1).mean()


def _type(value: Any) -> Any:
    return int | None if value is None else tuple[float, ...] if isinstance(value, tuple) else type(value)
