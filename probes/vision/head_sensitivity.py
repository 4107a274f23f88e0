"""Which heads change when the image is taken away, and what happens if they are made louder?

The divergence of a head (VHD of He et al., ACL 2025, arXiv 2412.13949) is how far its output before ``W_O`` at the token that
predicts the first new one moves without the image:

    VHD[l, h] = || z[l, h](with image) - z[l, h](without) ||_2,      T-VHD = sum of the largest k of them

Without means the text alone (published: the image's tokens are removed), or an image of zeros or of its own mean colour. A model
of images has no text left to run on; there it is the mean colour, at the class token, or at every patch (root mean square over
patches). The null is how far z moves between two images of noise with the mean and spread of the given one: a head that moves
as much as that answers to pixels, not to what is on them.

Reinforcement (VHR) multiplies the more sensitive half of each layer's heads by 2. Heads whose own output surges without the
image are no visual heads and are left out; the paper's rule is read here as ||z(without)|| > 2 ||z(with)||.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.protocol import Edit, Model, Tokens
from workbench.probes.ablation import AblationCurve, Metric
from workbench.probes.catalogue import Analysis
from workbench.probes.removal import attention_layers
from workbench.probes.sources import site_at
from workbench.probes.tables import HeadTable
from workbench.probes.vision.erasure import random_vision_model
from workbench.probes.vision.grid import Grid, grid_of
from workbench.probes.vision.pruning import as_inputs, last_token, moved
from workbench.run import Run
from workbench.sites import Site

WITHOUT = ("removed", "zero", "mean")
SURGE = "its output surges without the image (no visual head)"


@torch.no_grad()
def head_sensitivity(
    model: Model, inputs: Any, *, without: str | None = None, grid: Grid | None = None, draws: int = 4, seed: int = 0
) -> HeadTable:
    """VHD of every head: ``sensitivity`` without the image, ``other_image`` (the image of the next example in its place; NaN for
    a batch of one), and ``surge`` = ||z(without)|| / ||z(with)||. Means over examples, with 95% intervals over them; the null of
    the first two is the distance between two noise images, mean over ``draws``.

    ``inputs``: what ``model.run`` takes, with ``pixel_values`` ``[B, ...]``, or images alone. ``without``: ``removed`` (a model
    of text and images), ``zero`` or ``mean``; by default ``removed`` where there is text, else ``mean``. ``grid``: by default
    ``grid_of(model, inputs)``.
    """
    given = _mapping(inputs)
    place = grid_of(model, given) if grid is None else grid
    how = without if without is not None else "removed" if "input_ids" in given else "mean"
    if how not in WITHOUT:
        raise UnknownName("way to take the image away", how, WITHOUT)
    if draws < 1:
        raise WorkbenchError(f"draws is the number of pairs of noise images, at least 1; got {draws}")
    pixels = given["pixel_values"]
    plain = _look(model, given, place)
    present = _outputs(plain, place)
    absent = _outputs(_look(model, without_image(given, place, how), place), place)
    generator = torch.Generator().manual_seed(seed)
    noises = [{**given, "pixel_values": _noise(pixels, generator)} for _ in range(2 * draws)]
    noise = [_outputs(_look(model, each, place), place) for each in noises]
    chance = {
        layer: torch.stack([distance(noise[2 * i][layer], noise[2 * i + 1][layer]) for i in range(draws)]).mean(0)
        for layer in present
    }
    undefined = {}
    if len(pixels) > 1:
        swapped = _outputs(_look(model, {**given, "pixel_values": pixels.roll(1, 0)}, place), place)
        other = {layer: distance(z, swapped[layer]) for layer, z in present.items()}
    else:
        other = {layer: torch.full_like(chance[layer], float("nan")) for layer in present}
        undefined["other_image"] = "a batch of one holds no other image"
    moved_by = {layer: distance(z, absent[layer]) for layer, z in present.items()}
    surge = {layer: _size(absent[layer]) / _size(z) for layer, z in present.items()}
    measures = {"sensitivity": moved_by, "other_image": other, "surge": surge}
    null = {layer: row.mean(0) for layer, row in chance.items()}
    for layer, row in surge.items():
        undefined |= {
            f"surge, layer {layer}, head {head}": "its output is zero with the image"
            for head in (~row.isfinite()).any(0).nonzero()[:, 0].tolist()
        }
    return HeadTable.averaged(
        f"Sensitivity to the image ({how})",
        measures,
        {"sensitivity": "L2 distance of z", "other_image": "L2 distance of z", "surge": "norm without / with"},
        null={"sensitivity": null, "other_image": null},
        undefined=undefined,
        provenance=plain.provenance,
    )


def total_sensitivity(table: HeadTable, k: int, measure: str = "sensitivity") -> tuple[float, float]:
    """T-VHD: the sum of the ``k`` largest divergences of all heads, and the same sum of the null's ``k`` largest."""
    if measure not in table.null:
        raise UnknownName("measure with a null", measure, table.null)
    total = []
    for part in (table.values[measure], table.null[measure]):
        values = torch.cat([row.double() for row in part.values()])
        if not 1 <= k <= len(values):
            raise WorkbenchError(f"k is a number of heads, 1 ... {len(values)}; got {k}")
        total.append(float(values.nan_to_num(0.0).topk(k).values.sum()))
    return total[0], total[1]


def visual_heads(table: HeadTable, *, share: float = 0.5, surge: float = 2.0) -> list[Site]:
    """The more sensitive ``share`` of each layer's heads, most sensitive first, those left out that surge without the image."""
    if not 0 < share <= 1 or surge <= 0:
        raise WorkbenchError(f"share lies in (0, 1] and surge above 0; got {share!r}, {surge!r}")
    found: list[tuple[float, Site]] = []
    for layer, row in table.values["sensitivity"].items():
        fine = ~(table.values["surge"][layer] > surge)
        ranked = row.masked_fill(~fine, float("-inf")).argsort(dim=0, descending=True, stable=True)
        chosen = ranked[: round(share * len(row))].tolist()
        found += [(float(row[head]), site_at("z", layer, head)) for head in chosen if bool(fine[head])]
    return [site for _, site in sorted(found, key=lambda pair: -pair[0])]


@torch.no_grad()
def head_amplification(
    model: Model,
    inputs: Any,
    heads: Sequence[Site],
    *,
    factor: float = 2.0,
    counts: Sequence[int] | None = None,
    metric: Metric | None = None,
    grid: Grid | None = None,
    random: int = 8,
    seed: int = 0,
) -> AblationCurve:
    """What the model says with ``heads`` (``visual_heads(table)``) made ``factor`` times louder, and with as many random heads of
    the same layers.

    ``counts``: how many of them, by default all. The measure is the divergence of the prediction from the unchanged model's
    (``pruning_curve``), or ``metric`` of a run, ``[B]``. All tokens' outputs are multiplied, as in a generation step that the
    whole prompt precedes.
    """
    sites = [Site.parse(site) for site in heads]
    if not sites or any(site.kind != "z" or site.head is None for site in sites) or len(set(sites)) < len(sites):
        raise WorkbenchError("heads are hook_z of different heads, at least one; visual_heads(table) names them")
    if random < 1:
        raise WorkbenchError(f"random is the number of random draws, at least 1; got {random}")
    steps = (len(sites),) if counts is None else tuple(counts)
    if not steps or min(steps) < 1 or max(steps) > len(sites):
        raise WorkbenchError(f"counts lie between 1 and the {len(sites)} heads; got {list(steps)}")
    given = _mapping(inputs)
    place = grid_of(model, given) if grid is None else grid
    layers = [site.whole for site in sites]
    widths = {site: model.run(given, read=[site]).acts[site].shape[2] for site in dict.fromkeys(layers)}
    plain = model.run(given)

    def measure(run: Run) -> Tensor:
        return moved(run, plain, place) if metric is None else metric(run).detach().double().cpu()

    def louder(chosen: Sequence[Site]) -> Tensor:
        return measure(model.run(given, edit=amplified(chosen, factor)))

    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(random):
        order = {whole: torch.randperm(n, generator=generator).tolist() for whole, n in widths.items()}
        picks = [Site("z", site.layer, order[site.whole].pop(), site.stack) for site in sites]
        drawn.append(torch.stack([louder(picks[:count]) for count in steps]))
    ranked = torch.stack([louder(sites[:count]) for count in steps])
    name = "divergence from the unchanged model" if metric is None else getattr(metric, "__name__", "metric")
    names = tuple(map(str, sites))
    return AblationCurve(
        name, f"heads times {factor:g}", steps, measure(plain), ranked, torch.stack(drawn), names, plain.provenance
    )


def amplified(heads: Sequence[Site], factor: float) -> dict[Site | str, Edit | Tensor]:
    """Edits that multiply the outputs z of some heads."""

    def edit_of(chosen: list[int]) -> Edit:
        def edit(z: Tensor) -> Tensor:
            out = z.clone()
            out[:, :, chosen] *= factor
            return out

        return edit

    by_layer: dict[Site, list[int]] = {}
    for site in heads:
        assert site.head is not None
        by_layer.setdefault(site.whole, []).append(site.head)
    return {whole: edit_of(chosen) for whole, chosen in by_layer.items()}


def without_image(inputs: Mapping[str, Tensor], grid: Grid, how: str) -> dict[str, Tensor]:
    """The same inputs with the image's tokens taken out of the text, or with an image of zeros or of its mean colour."""
    pixels = inputs["pixel_values"]
    if how == "zero":
        return {**inputs, "pixel_values": torch.zeros_like(pixels)}
    if how == "mean":
        return {**inputs, "pixel_values": pixels.mean((-2, -1), keepdim=True).expand_as(pixels).contiguous()}
    if "input_ids" not in inputs or grid.stack != "text":
        raise Refused(
            "a model of images alone has nothing to run on if the image is removed; use without='mean' or 'zero'"
        )
    ids = inputs["input_ids"]
    stay = torch.ones(ids.shape[1], dtype=torch.bool)
    first = int(grid.index[0]) if grid.cls is None else grid.cls
    last = int(grid.index[-1]) + grid.step - grid.cols
    stay[first : last + 1] = False
    rest = {"input_ids": ids[:, stay]}
    if "attention_mask" in inputs:
        rest["attention_mask"] = inputs["attention_mask"][:, stay]
    return rest


def distance(one: Tensor, two: Tensor) -> Tensor:
    """L2 distance of outputs ``[B, P, H, E]`` per head, root mean square over the places P: ``[B, H]``."""
    return _size(one - two)


def _size(z: Tensor) -> Tensor:
    return z.square().sum(-1).mean(1).sqrt()


def _look(model: Model, given: Mapping[str, Tensor], grid: Grid) -> Run:
    """A run that read z of the grid's stack."""
    return model.run(given, read=[Site("z", layer, None, grid.stack) for layer in attention_layers(model, grid.stack)])


def _outputs(run: Run, grid: Grid) -> dict[int | str, Tensor]:
    """z at the token that answers, or at every patch: layer -> ``[B, P, H, E]`` in float64."""
    found: dict[int | str, Tensor] = {}
    for site in map(Site.parse, run.acts):
        z = run.acts[site].detach().cpu().double()
        assert site.layer is not None
        if grid.stack == "text":
            z = z[torch.arange(len(z)), last_token(run).cpu()][:, None]
        else:
            grid.check(z.shape[1], f"layer {site.layer}")
            z = z[:, grid.index] if grid.cls is None else z[:, grid.cls, None]
        found[site.layer if not grid.stack else f"{grid.stack}.{site.layer}"] = z
    return found


def _noise(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Independent pixels with the mean and the spread of every channel of every image."""
    grain = torch.randn(pixels.shape, generator=generator).to(pixels)
    spread = pixels.std((-2, -1), keepdim=True, unbiased=False)
    return pixels.mean((-2, -1), keepdim=True) + spread * grain


def _mapping(inputs: Any) -> dict[str, Tensor]:
    given = as_inputs(inputs)
    if isinstance(given, Tokens):
        ids = {"input_ids": given.ids, "attention_mask": given.mask.long()} if given.ids.shape[1] else {}
        given = {**ids, **given.inputs}
    if not isinstance(given, Mapping) or "pixel_values" not in given:
        raise WorkbenchError("inputs hold an image: a mapping with pixel_values, or images [B, C, height, width]")
    return dict(given)


def _example() -> dict[str, Any]:
    model, images, grid = random_vision_model()
    return {"model": model, "inputs": images, "grid": grid, "draws": 2}


def _amplify_example() -> dict[str, Any]:
    model, images, grid = random_vision_model()
    heads = visual_heads(head_sensitivity(model, images, grid=grid, draws=1))
    return {"model": model, "inputs": images, "heads": heads, "grid": grid, "random": 2}


PAPER = "He et al. 2025 (ACL; arXiv 2412.13949), section 3"

ANALYSES = (
    Analysis(
        name="head-sensitivity",
        question="Which heads change when the image is taken away?",
        function=head_sensitivity,
        example=_example,
        paper=PAPER,
        source="model",
        null="the distance between two noise images of the same mean and spread; another image beside it",
        cause="head_amplification: the sensitive heads are multiplied by 2",
        definition="for models of images alone: the image becomes its mean colour, at the class token or all patches",
    ),
    Analysis(
        name="head-amplification",
        question="What does the model say if the visual heads are made louder?",
        function=head_amplification,
        example=_amplify_example,
        paper="He et al. 2025 (ACL; arXiv 2412.13949), section 4",
        source="model",
        null="as many random heads of the same layers",
        cause="head_amplification: hook_z times 2",
        definition="heads that surge without the image are those whose norm more than doubles; all layers are scaled at once",
    ),
)
