"""The catalogue of attention variants: one record per mechanism, beside its operator in ``workbench/mixers``.

A variant is a function ``operator(**arguments) -> (output, AttentionMap)``. Its record says which paper it comes from, how to
make arguments for it, which of them the output is linear in, and how a native model runs it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from workbench.errors import UnknownName, WorkbenchError

if TYPE_CHECKING:
    import pandas as pd

    from workbench.attention_map import AttentionMap

FAMILIES = (
    "softmax",
    "weighted softmax",
    "routing",
    "linear",
    "delta",
    "two-stage",
    "channel",
    "convolution",
    "nonlinear",
    "probe",
)
"""Families by how the pattern is described: softmax under a mask; softmax with changed scores or weights; routing and block
selection; feature maps with decay; state transporters with erasure; products of two maps; channel maps and gates; convolution
and spectral mixing; operators that are not linear in their values; probes of any operator."""

MODULES: tuple[str, ...] = (
    "softmax",
    "latent",
    "flash",
    "windows",
    "block_masks",
    "neighborhood",
    "vision_windows",
    "volume_windows",
    "halo",
    "group_masks",
    "block_transformer",
    "causal_vit",
    "longlora",
    "flash_block",
    "relative",
    "gated",
    "sinks",
    "sigmoid",
    "averaging",
    "histogram",
    "urpe",
    "rcmha",
    "reversed",
    "crate",
    "cascaded",
    "selection",
    "probes",
    "linear",
    "decay",
    "rwkv",
    "aaren",
    "spiking",
    "mossformer",
    "kernelised",
    "deconstructed",
    "indexer",
    "convit",
    "head_mixture",
    "landmark",
    "karat",
    "mamba",
    "mamba2",
    "delta",
    "natsl",
    "titans",
    "titans_layouts",
    "miras",
    "gates",
    "transnext",
    "triple",
    "seer",
    "outlook",
    "contmix",
    "spatial_gates",
    "polarized",
    "routing",
    "agent",
    "hilo",
    "channel_attention",
    "gated_convolution",
    "spans",
    "long_convolution",
    "frequency_spatial",
    "pyramid",
    "selective",
    "pruning",
    "spectral",
    "hyper_zzw",
    "probing",
    "token_mlp",
    "rectangular",
    "objects",
    "hybrids",
    "space_time",
)
"""Modules of ``workbench.mixers`` that hold records, in the order of the catalogue."""


@dataclass(frozen=True)
class Learned:
    """An argument that a native model makes by a projection of the layer's input x ``[B, N, D]``.

    ``axes`` is ``"H"`` (one number per head and token, ``[B, H, N]``), ``"HE"`` (``[B, H, N, E]``), ``"G"`` or ``"GE"`` (key
    heads), or a head letter with a width (``"H16"``: ``[B, H, N, 16]``). ``bias`` is the initial bias, inside of
    ``activation``.
    """

    axes: str
    activation: Callable[[Tensor], Tensor] | None = None
    bias: float = 0.0


@dataclass(frozen=True)
class Parameter:
    """A learned argument that does not depend on the input; ``axes`` as in ``Learned`` without the tokens: ``"H"`` is ``[H]``,
    ``"HE"`` ``[H, E]``, ``"H3"`` ``[H, 3]``, ``"5"`` ``[5]``."""

    axes: str
    init: Callable[[tuple[int, ...]], Tensor] = torch.zeros


@dataclass(frozen=True)
class Recipe:
    """How a native model runs a variant.

    ``prepare`` turns ``q`` ``[B, H, N, E]``, ``k``, ``v`` ``[B, G, N, E]`` (after positions), ``mask``, ``grid`` (rows and
    columns of an image, or None), ``x`` ``[B, N, D]`` and the learned arguments into the operator's keyword arguments; without
    it the operator takes q, k, v, mask and all learned arguments by their names. ``finish`` turns the output into
    ``[B, H, N, E]``.
    """

    learned: Mapping[str, Learned] = field(default_factory=dict)
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    prepare: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    finish: Callable[[Tensor], Tensor] | None = None
    ignores: tuple[str, ...] = ()
    """Those of ``q``, ``k`` and ``v`` that the operator has no use for: the model has no weights and no hook points for them."""
    steps: bool = True
    """Whether tokens can be added one by one: False where the length of the whole text enters what earlier tokens see, so that
    no cache can be kept."""


@dataclass(frozen=True, eq=False)
class Variant:
    """One attention mechanism.

    ``paper`` is ``#n Title (year)`` with the number in the project's list of papers, or ``Title (year)``. ``value_input`` names
    the argument that the output is linear in, with ``output == map.matvec(arguments[value_input])``; None where there is none.
    ``causal`` tells that query i has no weight on keys after it. ``reference`` says where the mathematics was checked (empty: no
    code was found, only the paper's text), ``note`` what is doubtful. Calling the record calls the operator.
    """

    name: str
    paper: str
    family: str
    priority: str
    operator: Callable[..., tuple[Tensor, AttentionMap]]
    example: Callable[[int, int, torch.dtype], dict[str, Any]]
    value_input: str | None = "v"
    causal: bool = False
    reference: str = ""
    note: str = ""
    recipe: Recipe | None = None

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise UnknownName("family", self.family, FAMILIES)
        if self.priority not in ("A", "B", "C"):
            raise UnknownName("priority", self.priority, ("A", "B", "C"))

    def __call__(self, **arguments: Any) -> tuple[Tensor, AttentionMap]:
        return self.operator(**arguments)

    def __repr__(self) -> str:
        return f"Variant({self.name!r}, {self.family}, {self.paper})"


class Variants(Sequence[Variant]):
    """All records; ``variants["longformer"]`` finds one by name, ``variants[0]`` by place."""

    def __init__(self, records: Sequence[Variant]) -> None:
        self._records = tuple(records)
        self._named = {record.name: record for record in self._records}
        if len(self._named) != len(self._records):
            names = [record.name for record in self._records]
            raise WorkbenchError(f"variants share names: {sorted({n for n in names if names.count(n) > 1})}")

    @overload
    def __getitem__(self, key: int | str) -> Variant: ...
    @overload
    def __getitem__(self, key: slice) -> Sequence[Variant]: ...
    def __getitem__(self, key: int | str | slice) -> Variant | Sequence[Variant]:
        if not isinstance(key, str):
            return self._records[key]
        if key not in self._named:
            raise UnknownName("attention variant", key, self._named)
        return self._named[key]

    def __iter__(self) -> Iterator[Variant]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._named)

    def frame(self) -> pd.DataFrame:
        """One row per variant: what its record says."""
        import pandas as pd

        columns = ("name", "family", "priority", "paper", "value_input", "causal", "reference", "note")
        rows = [{**{c: getattr(record, c) for c in columns}, "in models": record.recipe is not None} for record in self]
        return pd.DataFrame(rows)

    def _repr_html_(self) -> str:
        from workbench.fragments import table_view

        return table_view(self.frame(), "Variants", rows=len(self))

    def __repr__(self) -> str:
        return f"Variants({len(self)} mechanisms: {', '.join(self.names[:4])}, ...)"


@cache
def variants() -> Variants:
    """Every attention variant of the workbench."""
    found: list[Variant] = []
    for module in MODULES:
        found += importlib.import_module(f"workbench.mixers.{module}").VARIANTS
    return Variants(found)


def nearest_grid(tokens: int, axes: int = 2) -> tuple[int, ...]:
    """Sides of the most even grid with about ``tokens`` cells: of all with the nearest number of cells, the one nearest to
    a cube; larger sides last."""
    if tokens < 1:
        raise WorkbenchError(f"a grid has at least one cell; got {tokens} tokens")
    if axes == 1:
        return (tokens,)
    best: tuple[tuple[int, int], tuple[int, ...]] | None = None
    side = max(1, round(tokens ** (1 / axes)))
    for first in range(max(1, side - 2), side + 1):
        rest = nearest_grid(max(1, round(tokens / first)), axes - 1)
        sides = tuple(sorted((first, *rest)))
        cells = 1
        for length in sides:
            cells *= length
        key = (abs(cells - tokens), sides[-1] - sides[0])
        if best is None or key < best[0]:
            best = (key, sides)
    assert best is not None
    return best[1]


def example_tensors(seed: int, dtype: torch.dtype, **shapes: Sequence[int]) -> dict[str, Tensor]:
    """Normal random tensors of the given shapes, the same for the same seed; drawn in float64 and rounded to ``dtype``."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(*shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return {name: value.to(dtype) for name, value in drawn.items()}
