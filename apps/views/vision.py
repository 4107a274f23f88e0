"""Vision: where the patches of an image look."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit as st

from workbench.apps.components.patches import DIRECTIONS, HELD, PATCHES, patches_data
from workbench.apps.screen import place, runs, state
from workbench.apps.screen.need import guarded, job, need
from workbench.apps.screen.runs import Captured
from workbench.apps.screen.shown import downloads, figure
from workbench.errors import WorkbenchError
from workbench.jobs.kinds.pictures import is_picture_name, keep_picture, picture_path

if TYPE_CHECKING:
    from torch import Tensor

    from workbench.maps import AttentionMap
    from workbench.probes.vision.grid import Grid
    from workbench.run import Run

_SOURCES = {"made": "a made image with a planted shape", "upload": "a picture of yours"}
_KINDS = ["png", "jpg", "jpeg", "webp", "bmp", "gif"]
_WAYS = {"raw": "head's weights", "rollout": "rollout"}
_BELOW = {
    "heads": "All heads of the layer",
    "class": "Class map",
    "distance": "How far heads look",
    "erasure": "Does the model need these patches?",
}
_MEAN = "mean"


def page() -> None:
    st.title("Vision")
    st.caption(
        "An image is read in patches. Choose one by a click or the arrow keys: the colours show how much attention it gives to "
        "every other patch, or gets from it. Frames show the windows that attention is confined to, where a layer has such."
    )
    from workbench.apps.work_vision import grid_from, reads_images

    models = [name for name in place.models() if reads_images(name)]
    row = st.columns([2, 2, 3], vertical_alignment="bottom")
    name = state.choose("Model", models, "model", show=lambda path: Path(path).name, where=row[0])
    given = _image(row[1], row[2])
    facts = need(job("workbench.apps.work_model:model_facts", name), f"Loading {Path(name).name}").load().labels
    done = need(job("capture", name, **given), f"Capturing {Path(name).name}")
    captured = Captured(done.key, done.job)
    run = runs.opened(captured)
    grid = grid_from(facts["grid"])
    if grid is None:
        raise WorkbenchError(f"the patches of {Path(name).name} do not lie in one grid; choose another model")
    look = _look(captured, run, grid, name, given)
    _shown(look)
    below = state.choose(
        "More about this image", list(_BELOW), "below", show=_BELOW.__getitem__, kind="segmented_control"
    )
    {"heads": _heads, "class": _classes, "distance": _distance, "erasure": _erasure}[below](look, given)


def _image(left: Any, right: Any) -> dict[str, Any]:
    """Arguments of the capture: the number of a made image, or the name of an uploaded one."""
    source = state.choose("Image", list(_SOURCES), "source", show=_SOURCES.__getitem__, where=left)
    if source == "made":
        return {"image": state.number("Number", 0, 63, "image", default=0, where=right, kind="number_input")}
    folder = place.cells().uploads
    file = right.file_uploader(
        "Picture", type=_KINDS, max_upload_size=10, help="It is kept small in the results folder."
    )
    if file is not None:
        state.put("picture", keep_picture(file.getvalue(), folder))
    name = state.held("picture", lambda asked: asked if is_picture_name(asked) else None, "")
    if not name:
        st.info("Choose a picture: PNG, JPEG, WebP, BMP or GIF, at most 10 MB.")
        st.stop()
    picture_path(name, folder)
    return {"picture": name}


@dataclass(frozen=True)
class _Look:
    """What is looked at. ``order`` are the model's tokens in the order of the picture, those that are no patches (``names``)
    first; ``query`` is a place in it. ``head`` None is the mean of all heads."""

    captured: Captured
    run: Run
    grid: Grid
    model: str
    layer: int | str
    head: int | None
    direction: str
    way: str
    order: list[int]
    names: list[str]
    query: int

    @property
    def amap(self) -> AttentionMap:
        return self.run.maps[self.layer]

    @property
    def heads(self) -> list[int]:
        return list(range(self.amap.shape[1])) if self.head is None else [self.head]

    @property
    def token(self) -> int:
        """The query as the model counts its tokens."""
        return self.order[self.query]

    @property
    def title(self) -> str:
        who = "mean of all heads" if self.head is None else f"head {self.head}"
        return "rollout" if self.way == "rollout" else f"layer {self.layer}, {who}"

    @property
    def code(self) -> str:
        """Opens the run and makes its grid."""
        return f"{self.captured.python}\ngrid = wb.grid_of(wb.load({self.model!r}))"


def _look(captured: Captured, run: Run, grid: Grid, model: str, given: dict[str, Any]) -> _Look:
    from workbench.apps.work_vision import order_of

    columns = st.columns([1, 1, 1, 2])
    layers = [name for name in run.maps if not grid.stack or str(name).split(".")[0] == grid.stack]
    layer = state.choose("Layer", layers, "layer", default=layers[-1], where=columns[0])
    heads = [*range(run.maps[layer].shape[1]), _MEAN]
    head = state.choose("Head", heads, "head", show=lambda h: "mean of all" if h == _MEAN else str(h), where=columns[1])
    direction = state.choose(
        "Direction", DIRECTIONS, "direction", where=columns[2], kind="segmented_control",
        help="from: where the chosen patch looks; to: which patches look at it",
    )  # fmt: skip
    way = state.choose(
        "Map", list(_WAYS), "way", show=_WAYS.__getitem__, where=columns[3], kind="segmented_control",
        help="Rollout multiplies the mean maps of all layers, each mixed half with what stays in place: where that which a patch "
        "holds in the end comes from, as far as attention moved it.",
    )  # fmt: skip
    order, names = order_of(grid, run.maps[layer].shape[3])
    first = _first(grid, len(names), given)
    query = state.held(
        "query", lambda asked: int(asked) if asked.isdigit() and int(asked) < len(order) else None, first
    )
    found = query if query < len(order) else first  # a larger image was looked at before
    return _Look(
        captured, run, grid, model, layer, None if head == _MEAN else head, direction, way, order, names, found
    )


def _first(grid: Grid, extra: int, given: dict[str, Any]) -> int:
    """The first query: a patch of the planted shape, where there is one, or the middle."""
    if "image" in given and (grid.rows, grid.cols) == (8, 8):
        from workbench.datasets.patches import planted_images

        planted = planted_images(given["image"] + 1).planted[given["image"]]
        return extra + int(planted.flatten().int().argmax())
    return extra + grid.rows // 2 * grid.cols + grid.cols // 2


def _shown(look: _Look) -> None:
    """The image with the query's weights over it."""
    from workbench.apps.work_vision import pixels_of, table_of, windows_of

    weights, tile = _weights(look)
    raw = look.way == "raw"
    windows = windows_of(look.amap, look.grid, look.token) if raw else []
    signed = raw and look.amap.sign == "signed"
    data = patches_data(
        pixels_of(look.run), weights[look.order], grid=(look.grid.rows, look.grid.cols), query=look.query, extra=look.names,
        direction=look.direction, tile=tile, windows=windows, signed=signed, title=f"{Path(look.model).name}, {look.title}",
    )  # fmt: skip
    PATCHES.show(data, key="patches", on={"query": lambda query: state.put("query", int(query))})
    if windows:
        st.caption(f"{len(windows)} frames: attention in this layer stays inside of them.")
    if signed:
        st.caption("Weights of this layer can be negative (orange), so they are no shares of attention.")
    if raw:
        made = f"weights_of(run.maps[{look.layer!r}], {look.heads}, {look.token}, {look.direction!r})"
    else:
        made = (
            f"wb.rollout(run)[0, {look.token}]" if look.direction == "from" else f"wb.rollout(run)[0, :, {look.token}]"
        )
    downloads(
        table_of(weights, look.order, look.names, look.grid),
        name="patches",
        python=f"{look.code}\nfrom workbench.apps.work_vision import order_of, table_of, weights_of\n\nweights = {made}\n"
        "table_of(weights, *order_of(grid, len(weights)), grid)",
    )


def _weights(look: _Look) -> tuple[Tensor, Tensor | None]:
    """Weights of the query ``[T]``, and of all tokens in the picture's order where they are few."""
    import workbench as wb
    from workbench.apps.work_vision import weights_of

    few, every = len(look.order) <= HELD, slice(0, len(look.order))
    if look.way == "raw":
        weights = weights_of(look.amap, look.heads, look.token, look.direction)
        whole = look.amap.heads(look.heads).tile(every, every)[0].detach().double().cpu().mean(0) if few else None
    else:
        layers = {name: amap for name, amap in look.run.maps.items() if amap.shape[3] == len(look.order)}
        if not few and look.direction == "from":
            return wb.rollout(layers, queries=[look.token])[0, 0], None
        whole = wb.rollout(layers)[0]
        weights = whole[look.token] if look.direction == "from" else whole[:, look.token]
    return weights, whole[look.order][:, look.order] if few and whole is not None else None


def _heads(look: _Look, given: dict[str, Any]) -> None:
    """The query's weights in every head of the layer."""
    from workbench.apps.work_vision import head_panels, head_table

    frame = head_table(look.amap, look.grid, look.token, look.direction)
    figure(
        lambda: head_panels(frame, look.grid),
        frame,
        name="heads",
        python=f"{look.code}\nfrom workbench.apps.work_vision import head_panels, head_table\n\n"
        f"frame = head_table(run.maps[{look.layer!r}], grid, {look.token}, {look.direction!r})\nhead_panels(frame, grid)",
        caption=f"What the chosen patch {'gives' if look.direction == 'from' else 'gets'} in each head of layer {look.layer}; "
        "every head on its own scale.",
    )


def _classes(look: _Look, given: dict[str, Any]) -> None:
    """The class token's row, or the mean of the patches' rows."""
    import workbench as wb

    found = wb.class_maps(look.run, look.grid)
    figure(
        lambda: found.plot(layer=look.layer, head=look.head),
        found.frame(),
        name="class-maps",
        width=520,
        python=f"{look.code}\nfound = wb.class_maps(run, grid)\n"
        f"found.plot(layer={look.layer!r}, head={look.head})\nfound.frame()",
        caption="Where the class token looks."
        if look.grid.cls is not None
        else "This model has no class token; shown is the mean over all patches of where they look.",
    )


def _distance(look: _Look, given: dict[str, Any]) -> None:
    """Mean distance of attention per head, in pixels."""
    import workbench as wb

    found = wb.attention_distance(look.run, look.grid)
    figure(
        found.plot,
        found.frame(),
        name="attention-distance",
        width=520,
        python=f"{look.code}\nfound = wb.attention_distance(run, grid)\nfound.plot()\nfound.frame()",
        caption="Mean distance between a patch and what it looks at. The numbers have the distance of even attention beside it.",
    )


def _erasure(look: _Look, given: dict[str, Any]) -> None:
    """The answer of the model as the patches with the largest weights are erased."""
    from workbench.apps.screen.charts import draw_curve

    own = state.flag(
        "Order by the chosen patch's weights", "own",
        help="Off: by those of the class token, or of the mean patch where there is none.",
    )  # fmt: skip
    query = look.token if own else None
    wanted = job(
        "workbench.apps.work_vision:erasure", look.model, layer=look.layer, head=look.head, query=query, **given
    )
    done = need(wanted, "Erasing patches")
    table, metric = done.table(), str(done.load().labels["metric"])
    weight = f"wb.class_maps(run, grid, query={query}).weight[{look.layer!r}]"
    figure(
        lambda: draw_curve(
            table, "removed", {"ranked": "by weight", "random": "random"}, base="base", labels=("patches erased", metric),
            title=look.title,
        ),
        table,
        name="erasure",
        width=620,
        python=f"{look.captured.python}\nmodel = wb.load({look.model!r})\ngrid = wb.grid_of(model)\n"
        f"weight = {weight}{'.mean(1)' if look.head is None else f'[:, {look.head}]'}\n"
        'found = wb.erasure_curve(model, run.tokens.inputs["pixel_values"], weight, grid)\nfound.plot()\nfound.frame()',
        caption="Patches become the mean of the image, those with the largest weights first; beside it as many random ones. "
        "Where the model needs what this head looks at, its line falls below the random one.",
    )  # fmt: skip


guarded(page)
