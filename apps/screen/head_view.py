"""What the head page shows of one run: which map, which heads, which part, and the code that gives the same numbers."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from workbench.errors import Refused, WorkbenchError

if TYPE_CHECKING:
    from torch import Tensor

    from workbench.attention_map import AttentionMap
    from workbench.run import Run
    from workbench.zooming import Zoom

CELLS = 512

Names: TypeAlias = tuple[tuple[str, ...], tuple[str, ...]]
_NAMES: dict[int, dict[int | str, Names]] = {}
"""Names of the tokens by run, as long as it is in memory, and by layer: a page asks for them whenever it draws."""


@dataclass(frozen=True)
class Heads:
    """One query head, or those that share a key-value head; their weights are averaged."""

    name: str
    indices: tuple[int, ...]

    def __str__(self) -> str:
        return self.name


def heads_of(amap: AttentionMap) -> list[Heads]:
    """Every head, then every group of heads with one key-value head, where there are groups."""
    count, groups = amap.shape[1], amap.kv_heads
    found = [Heads(str(head), (head,)) for head in range(count)]
    if groups < count:
        each = count // groups
        found += [Heads(f"kv{g}", tuple(range(g * each, (g + 1) * each))) for g in range(groups)]
    return found


@dataclass(frozen=True)
class Look:
    """How a head is looked at. ``view`` is ``(q0, q1, k0, k1)``; ``raw`` the map inside a gate; ``hide`` keys that are taken out,
    ``renormalise`` divides by what is left."""

    layer: int | str
    heads: Heads
    view: tuple[int, int, int, int]
    way: str = "mass"
    raw: bool = False
    hide: tuple[int, ...] = ()
    renormalise: bool = False

    def map(self, run: Run) -> AttentionMap:
        """The map of the layer, inside its gate if ``raw``."""
        amap = run.maps[self.layer]
        return getattr(amap, "raw", amap) if self.raw else amap

    def python(self, opened: str) -> str:
        """The code that gives ``zoom``, after the code that opens the run."""
        options = [f"way={self.way!r}"] if self.way != "mass" else []
        if self.hide:
            options.append(f"hide={self.hide}")
        if self.renormalise:
            options.append("renormalise=True")
        q0, q1, k0, k1 = self.view
        heads = self.heads.indices[0] if len(self.heads.indices) == 1 else list(self.heads.indices)
        amap = f"run.maps[{self.layer!r}]" + (".raw" if self.raw else "")
        said = ", ".join([amap, repr(heads), f"({q0}, {q1})", f"({k0}, {k1})", *options])
        return f"{opened}\nview = wb.zoom({said})\nview.plot()\nview.frame()"


def is_gated(amap: Any) -> bool:
    """Whether the map is the effective one of a gated head, with the raw one inside."""
    from workbench.maps import GatedMap

    return isinstance(amap, GatedMap)


def is_causal(amap: Any) -> bool:
    """Whether the map is one of a self-attention in which no query sees a later key."""
    mask = getattr(getattr(amap, "raw", amap), "mask", None)
    return bool(mask is not None and mask.causal and not amap.offset)


def fitted(view: Sequence[int], amap: AttentionMap) -> tuple[int, int, int, int]:
    """``view`` cut so that it lies in the map; the whole map if it lies beside it."""
    _, _, q, k = amap.shape
    q0, q1, k0, k1 = view
    if q0 >= q or k0 >= k:
        return 0, q, 0, k
    return max(0, q0), min(q1, q), max(0, k0), min(k1, k)


def part(run: Run, look: Look) -> Zoom:
    """The part of the map that is in view."""
    from workbench.zooming import zoom

    q0, q1, k0, k1 = look.view
    found = zoom(
        look.map(run), look.heads.indices, (q0, q1), (k0, k1), cells=CELLS, way=look.way, hide=look.hide,
        renormalise=look.renormalise,
    )  # fmt: skip
    return replace(found, title=f"{run.provenance.model}, layer {look.layer}, head {look.heads.name}")


def difference(ours: Zoom, theirs: Zoom) -> Zoom:
    """Ours minus theirs, cell by cell; refused where the cells are not the same."""
    if (ours.queries, ours.keys, ours.size) != (theirs.queries, theirs.keys, theirs.size):
        raise Refused(
            f"the two views have other cells: queries {ours.queries}, keys {ours.keys} in cells of {ours.size}, and queries "
            f"{theirs.queries}, keys {theirs.keys} in cells of {theirs.size}; compare runs of one length"
        )
    return replace(ours, values=ours.values - theirs.values, title=f"{ours.title} minus {theirs.title}")


def token_names(run: Run, layer: int | str) -> Names:
    """Texts of the queries and of the keys of a layer; positions where they have no text (patches, a cache)."""
    named = _NAMES.get(id(run))
    if named is None:
        named = _NAMES[id(run)] = {}
        weakref.finalize(run, _NAMES.pop, id(run), None)
    if layer not in named:
        named[layer] = _token_names(run, layer)
    return named[layer]


def _token_names(run: Run, layer: int | str) -> Names:
    from workbench.probes.padding import padding

    amap = run.maps[layer]
    _, _, q, k = amap.shape
    keys = tuple(padding(layer, amap, run.tokens).names[0]) or tuple(map(str, range(k)))
    keys = tuple(text or str(i) for i, text in enumerate(keys))
    across = isinstance(layer, str) and layer.startswith("cross.")
    if across or amap.offset + q > len(keys):
        return tuple(map(str, range(amap.offset, amap.offset + q))), keys
    return keys[amap.offset : amap.offset + q], keys


def weights_of(run: Run, look: Look, focus: int, direction: str) -> Tensor:
    """Weights of the query ``focus`` on every key (``from``), or of every query on the key ``focus`` (``to``)."""
    from workbench.zooming import column, row

    amap = look.map(run)
    _, _, q, k = amap.shape
    length = q if direction == "from" else k
    if not 0 <= focus < length:
        raise WorkbenchError(f"token {focus} is outside of the {length} {'queries' if direction == 'from' else 'keys'}")
    found = row(amap, look.heads.indices, focus) if direction == "from" else column(amap, look.heads.indices, focus)
    if direction == "from" and look.hide:
        hidden = float(found[list(look.hide)].sum())
        found[list(look.hide)] = 0.0
        if look.renormalise:
            found = found / max(1e-12, 1 - hidden)
    return found


def square(run: Run, look: Look, start: int, end: int) -> Any:
    """Exact weights among the tokens ``start`` .. ``end``, NaN where a query does not see a key; None where queries and keys are
    not the same tokens."""
    amap = look.map(run)
    _, _, q, k = amap.shape
    if amap.offset or q != k:
        return None
    return part(run, replace(look, view=(start, end, start, end), way="mass")).values
