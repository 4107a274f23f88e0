"""Attention over the patches of an image: which weights a query patch has, where windows lie, whether the model needs them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.errors import Refused, UnknownName
from workbench.jobs.kinds.pictures import made_input, picture_input
from workbench.jobs.probes import Cell
from workbench.jobs.revisions import model_folder
from workbench.maps import AttentionMap
from workbench.models.protocol import Model
from workbench.patterns.sparse import SparseMap
from workbench.probes.ablation import AblationCurve
from workbench.probes.sources import ungated
from workbench.probes.vision.grid import Grid, grid_of
from workbench.run import Run

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from matplotlib.figure import Figure

Box = tuple[int, int, int, int]


def reads_images(name: str) -> bool:
    """Whether the config of a model names patches of an image, without loading it."""
    folder = model_folder(name)
    if folder is None:
        return False
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(config, dict):
        return False
    if config.get("model_type") == "workbench-native":
        return config.get("grid") is not None
    return "patch_size" in config and "image_size" in config


def grid_from(labels: Mapping[str, Any] | None) -> Grid | None:
    """A grid that was read back from JSON."""
    if labels is None:
        return None
    return Grid(**{**labels, "patch": tuple(labels["patch"]), "others": tuple(labels["others"])})


def order_of(grid: Grid, tokens: int) -> tuple[list[int], list[str]]:
    """Tokens in the order in which a picture of patches numbers them, those that are no patches first, and the names of these."""
    grid.check(tokens)
    patches = grid.index.tolist()
    taken = set(patches)
    extra = [token for token in range(tokens) if token not in taken]
    names = ["class token" if token == grid.cls else f"token {token}" for token in extra]
    return [*extra, *patches], names


def pixels_of(run: Run) -> np.ndarray:
    """The first image of a run as 8-bit ``[height, width(, 3)]``, from its darkest to its brightest value."""
    given = run.tokens.inputs.get("pixel_values")
    if given is None or given.ndim != 4 or given.shape[1] not in (1, 3):
        raise Refused("this run has no image of one or three channels among its inputs")
    image = given[0].detach().float().cpu()
    span = (image.max() - image.min()).clamp(min=1e-12)
    shown = ((image - image.min()) / span * 255).round().to(torch.uint8).permute(1, 2, 0)
    return (shown[..., 0] if shown.shape[2] == 1 else shown).numpy()


def weights_of(amap: AttentionMap, heads: Sequence[int], token: int, direction: str = "from", batch: int = 0) -> Tensor:
    """Weights ``[T]`` of one token on all (``from``) or of all on it (``to``), averaged over ``heads``; exact."""
    if amap.domain != "token":
        raise Refused(f"rows of a {amap.domain} map are no patches; choose a layer whose map joins tokens")
    part = amap.heads(heads)
    if direction == "from":
        found = part.rows(token, token + 1)[batch, :, 0]
    elif direction == "to":
        found = part.tile(slice(0, amap.shape[2]), slice(token, token + 1))[batch, :, :, 0]
    else:
        raise UnknownName("direction", direction, ("from", "to"))
    return found.detach().double().cpu().mean(0)


def table_of(weights: Tensor, order: Sequence[int], names: Sequence[str], grid: Grid) -> pd.DataFrame:
    """One row per token: ``token, name, row, column, weight``; tokens that are no patches have no row and column."""
    import pandas as pd

    places = grid.places.tolist()
    at = [(None, None)] * len(names) + [(int(row), int(column)) for row, column in places]
    return pd.DataFrame(
        {
            "token": list(order),
            "name": [*names, *(f"row {row}, column {column}" for row, column in places)],
            "row": pd.array([row for row, _ in at], dtype="Int64"),
            "column": pd.array([column for _, column in at], dtype="Int64"),
            "weight": weights[list(order)].tolist(),
        }
    )


def head_table(amap: AttentionMap, grid: Grid, token: int, direction: str = "from") -> pd.DataFrame:
    """``weights_of`` in every head, on patches: ``head, row, column, weight``."""
    import pandas as pd

    parts = []
    for head in range(amap.shape[1]):
        weights = grid.of_tokens(weights_of(amap, [head], token, direction))
        rows, columns = grid.places.unbind(1)
        parts.append(
            pd.DataFrame({"head": head, "row": rows.numpy(), "column": columns.numpy(), "weight": weights.numpy()})
        )
    return pd.concat(parts, ignore_index=True)


def head_panels(frame: pd.DataFrame, grid: Grid) -> Figure:
    """A picture of the patches for each head of ``head_table``, each from 0 to its own largest weight; signed ones about 0."""
    from matplotlib.figure import Figure

    heads = frame["head"].drop_duplicates().tolist()
    across = min(len(heads), 8)
    down = -(-len(heads) // across)
    picture = Figure(
        figsize=(1.35 * across + 0.3, (1.3 * grid.rows / grid.cols + 0.35) * down + 0.2), layout="constrained"
    )
    signed = bool((frame["weight"] < 0).any())
    for ax, head in zip(picture.subplots(down, across, squeeze=False).flat, heads, strict=False):
        values = frame.loc[frame["head"] == head, "weight"].to_numpy().reshape(grid.rows, grid.cols)
        top = float(abs(values).max()) or 1.0
        ax.imshow(
            values, vmin=-top if signed else 0, vmax=top, cmap="PuOr" if signed else "viridis", interpolation="nearest"
        )
        ax.set_title(f"head {head}, top {top:.2g}", fontsize=7)
    for ax in picture.axes:
        ax.set_axis_off()
    return picture


def windows_of(amap: AttentionMap, grid: Grid, query: int) -> list[Box]:
    """Rectangles of patches (first row, first column, ends excluded) that attention is confined to; none where it is not.

    Windows that do not overlap and are one rectangle each are all there; else the neighbourhood of the token ``query``, in as
    many rectangles as it takes. Read off the keys that the map holds for each query, not off the size of weights.
    """
    inside = ungated(amap)
    if not isinstance(inside, SparseMap) or inside.shape[2] != inside.shape[3]:
        return []
    queries = inside.shape[2]
    seen = torch.zeros(queries, inside.shape[3] + 1, dtype=torch.bool)
    at = inside.indices.where(inside.indices >= 0, inside.shape[3])
    seen.scatter_(1, at.permute(2, 0, 1, 3).reshape(queries, -1), True)
    patches = seen[:, :-1][:, grid.index][grid.index]
    if bool(patches.all()):
        return []
    groups = patches.unique(dim=0)
    boxes = [rectangles(grid.image(group)) for group in groups]
    if int(groups.sum()) == grid.patches and all(len(found) == 1 for found in boxes):
        return [found[0] for found in boxes]
    place = (grid.index == query).nonzero()
    return rectangles(grid.image(patches[int(place[0])])) if len(place) else []


def rectangles(mask: Tensor) -> list[Box]:
    """``mask`` ``[rows, columns]`` as rectangles that cover it without overlap."""
    done: list[Box] = []
    growing: dict[tuple[int, int], int] = {}
    for row, line in enumerate([*mask.tolist(), [False] * mask.shape[1]]):
        runs = _runs(line)
        for run in [run for run in growing if run not in runs]:
            done.append((growing.pop(run), run[0], row, run[1]))
        for run in runs:
            growing.setdefault(run, row)
    return sorted(done)


def _runs(line: Sequence[bool]) -> list[tuple[int, int]]:
    edges = [i for i, (a, b) in enumerate(zip([False, *line], [*line, False], strict=True)) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))


def erasure(
    model: Model,
    cell: Cell,
    seed: int,
    layer: int | str,
    head: int | None = None,
    image: int | None = None,
    picture: str | None = None,
    query: int | None = None,
) -> AblationCurve:
    """What the model says of an image as the patches that a head looks at are erased, beside as many random ones.

    The order is that of the weights of the token ``query``, by default of the class token, or of the mean patch where there is
    none; ``head`` None is the mean of the layer's heads. ``image`` and ``picture`` as ``capture`` takes them.
    """
    import workbench as wb

    grid = grid_of(model)
    if picture is not None:
        images = picture_input(picture, cell.uploads, model, grid.size, cell.job.model or "")
    else:
        images = made_input(image or 0, seed, model, grid.size, cell.job.model or "")
    run = model.run({"pixel_values": images}, maps=wb.capture(layers=[layer]))
    weight = wb.class_maps(run, grid, query=query).weight[layer]
    if head is not None and not 0 <= head < weight.shape[1]:
        raise UnknownName("head", head, range(weight.shape[1]))
    return wb.erasure_curve(model, images, weight.mean(1) if head is None else weight[:, head], grid, seed=seed)
