"""What an analysis reads: the maps of a run or maps alone, as they act or inside the gate, and what else a run has read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.maps import AttentionMap, GatedMap
from workbench.models.protocol import Tokens
from workbench.pairs import Pairs
from workbench.run import Provenance, Run
from workbench.sites import Site

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


def tokens_of(source: object) -> Tokens | None:
    """The tokens of a run; maps alone have none."""
    return source.tokens if isinstance(source, Run) else None


def prompts_of(inputs: Any) -> Any:
    """What ``model.run`` takes: the clean prompts of pairs, other inputs as they are."""
    return inputs.clean if isinstance(inputs, Pairs) else inputs


def ungated(amap: AttentionMap) -> AttentionMap:
    """The attention inside the gate of a gated map; other maps as they are."""
    return amap.raw if isinstance(amap, GatedMap) else amap


def inner(name: int | str, amap: AttentionMap, raw: bool) -> AttentionMap:
    """The map that is asked: as it acts, or with ``raw`` inside its gate. Refuses gates that cannot be taken off."""
    if raw and amap.row_sum == "gate" and not isinstance(amap, GatedMap):
        raise Refused(f"layer {name!r}: {amap!r} does not hold the attention inside its gate; ask with raw=False")
    return ungated(amap) if raw else amap


def need_shares(name: int | str, amap: AttentionMap, what: str) -> None:
    """Refuse maps whose rows are no shares of attention to tokens: signed ones, and those over channels, frequencies or blocks,
    which have no place among the tokens. ``what`` ends the sentence "weights of such a map ..."."""
    if amap.sign == "signed" or amap.domain != "token":
        raise Refused(f"layer {name!r}: weights of a {amap.sign} {amap.domain} map {what}")


def site_at(kind: str, layer: int | str, head: int | None = None) -> Site:
    """The site of a layer as maps and tables name it: 3, or ``"encoder.3"`` in models with several stacks."""
    stack, _, number = layer.rpartition(".") if isinstance(layer, str) else ("", "", layer)
    return Site(kind, int(number), head, stack)


def read_site(run: Run, kind: str, layer: int | str) -> Tensor:
    """What the run read at a site of a layer, without its graph."""
    site = site_at(kind, layer)
    try:
        return run.acts[site].detach()
    except UnknownName:
        raise WorkbenchError(f"this run did not read {site}; run it again with read=['{site}', ...]") from None


def sites_read(run: Run, *kinds: str) -> dict[int | str, Tensor]:
    """All that a run read of a kind, by layer, in order; of several kinds the first one that was read in a layer."""
    found: dict[tuple[str, int], tuple[int, Tensor]] = {}
    for key, value in run.acts.items():
        try:
            site = Site.parse(key)
        except UnknownName:  # a bridge has hooks that are no sites
            continue
        if site.kind in kinds and site.head is None:
            at, rank = (site.stack, site.layer or 0), kinds.index(site.kind)
            if at not in found or rank < found[at][0]:
                found[at] = rank, value.detach()
    if not found:
        hooks = " or ".join(Site(kind, 0).hook.split(".")[-1] for kind in kinds)
        hook = Site(kinds[0], 0).hook.replace("blocks.0", "blocks.{l}")
        raise WorkbenchError(f"this run read no {hooks}; run it again with read=[f'{hook}' for l in range(layers)]")
    return {f"{stack}.{layer}" if stack else layer: found[stack, layer][1] for stack, layer in sorted(found)}


def real_tokens(run: Run, values: Tensor) -> Tensor:
    """Which tokens of ``values`` ``[B, T, ...]`` are no padding, bool ``[B, T]``; all, where they are not the run's tokens."""
    mask = run.tokens.mask.cpu()
    return mask if mask.shape == values.shape[:2] else torch.ones(values.shape[:2], dtype=torch.bool)


def real_mean(values: Tensor, real: Tensor) -> Tensor:
    """Mean over the real ones of ``[B, H, T]``, ``[B, H]`` in float64; NaN where there is none. ``real`` is ``[B or 1, T]``."""
    kept = real.cpu()[:, None]
    return torch.where(kept, values.detach().cpu().double(), 0.0).sum(-1) / kept.sum(-1)
