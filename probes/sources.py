"""What an analysis reads: the maps of a run, or maps alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from workbench.errors import WorkbenchError
from workbench.maps import AttentionMap
from workbench.run import Provenance, Run

Source = Run | AttentionMap | Mapping[int | str, AttentionMap] | Sequence[AttentionMap]


def maps_of(source: object) -> dict[int | str, AttentionMap]:
    """The maps of a run, of a mapping, of a list, or the one map given, by layer."""
    if isinstance(source, Run):
        if not source.maps:
            raise WorkbenchError(
                "this run captured no attention; run it again with model.run(text, maps=wb.capture(stats=('received',)))"
            )
        return dict(source.maps)
    if isinstance(source, AttentionMap):
        return {0: source}
    if isinstance(source, Mapping):
        found = dict(source)
    elif isinstance(source, Sequence) and not isinstance(source, str):
        found = dict(enumerate(source))
    else:
        raise WorkbenchError(
            f"expected a Run or attention maps; got {type(source).__name__} (a tensor of weights becomes a map with "
            "AttentionMap.from_dense)"
        )
    for name, amap in found.items():
        if not isinstance(amap, AttentionMap):
            raise WorkbenchError(
                f"layer {name!r} is a {type(amap).__name__}, not an attention map; use AttentionMap.from_dense"
            )
    if not found:
        raise WorkbenchError("no attention maps given")
    return found


def one_map(source: object) -> AttentionMap:
    """The one map given; raises for anything else, and for several maps or a run of them."""
    if isinstance(source, AttentionMap):
        return source
    found = maps_of(source)
    raise WorkbenchError(
        f"expected one attention map; got a {type(source).__name__} of layers {', '.join(map(str, found))}: choose one, as "
        "in run.maps[0]"
    )


def provenance_of(source: object) -> Provenance:
    """Where the maps come from: that of the run, or ``maps``."""
    return source.provenance if isinstance(source, Run) else Provenance("maps")
