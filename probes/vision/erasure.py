"""Does the model need the patches that a map points at?

The causal test of every map over an image: patches are erased in the order of a weight, in the image or in the residual
stream, and as many random ones beside it. Erased pixels become the mean of their image, an erased token the mean patch of its
image, so that neither is a signal of its own. ``first="most"`` is the deletion curve (a good map makes it fall early),
``first="least"`` the insertion curve read from its end: what is left are the patches that the map ranks highest (Petsiuk et
al., arXiv 1806.07421).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.protocol import Edit, Model
from workbench.probes.ablation import AblationCurve
from workbench.probes.catalogue import Analysis
from workbench.probes.vision.grid import Grid
from workbench.run import Run
from workbench.sites import Site

Metric = Callable[[Run], Tensor]


@torch.no_grad()
def erasure_curve(
    model: Model,
    images: Tensor,
    weight: Tensor,
    grid: Grid,
    *,
    site: Site | str | None = None,
    first: str = "most",
    metric: Metric | None = None,
    counts: Sequence[int] | None = None,
    allowed: Tensor | None = None,
    limit: Tensor | None = None,
    random: int = 8,
    seed: int = 0,
) -> AblationCurve:
    """The metric as patches are erased in the order of ``weight`` ``[B, N]``, and as random ones are.

    ``images`` ``[B, C, height, width]``. Without ``site`` pixels are erased; with a site of one vector per token, as
    ``blocks.0.hook_resid_post``, its tokens. ``metric``: by default the probability of the class that the whole image is given,
    or for a model without a head the cosine between its output (class token, else mean patch) and that of the whole image.
    ``counts``: how many to erase; ``limit`` ``[B]`` is the most that an image loses. ``allowed`` ``[B, N]`` bool: patches that
    random draws take (all by default).
    """
    rank = torch.as_tensor(weight).detach().cpu().double()
    if images.ndim != 4 or tuple(rank.shape) != (len(images), grid.patches):
        raise WorkbenchError(
            f"images are [B, C, height, width] with a weight for each of {grid.patches} patches, [B, N]; got "
            f"{list(images.shape)} and {list(rank.shape)}"
        )
    if site is None and tuple(images.shape[2:]) != grid.size:
        raise WorkbenchError(f"patches cover an image of {list(grid.size)} pixels; got {list(images.shape[2:])}")
    if first not in ("most", "least"):
        raise UnknownName("order of erasure", first, ("most", "least"))
    if bool(rank.isnan().any()):
        raise Refused("a weight is undefined (NaN): patches without one cannot be ranked")
    if random < 1:
        raise WorkbenchError(f"random is the number of random rankings, at least 1; got {random}")
    steps = _counts(grid.patches) if counts is None else tuple(counts)
    if not steps or min(steps) < 1 or max(steps) > grid.patches:
        raise WorkbenchError(f"counts lie between 1 and the {grid.patches} patches; got {list(steps)}")
    able = torch.ones_like(rank, dtype=torch.bool) if allowed is None else allowed.cpu()
    most = torch.full((len(images),), max(steps)) if limit is None else limit.cpu().clamp(max=max(steps))
    if bool((able.sum(1) < most).any()):
        raise Refused(f"random draws take {int(most.max())} patches of the {int(able.sum(1).min())} that are allowed")
    plain = model.run({"pixel_values": images})
    name, measure = _metric(plain, grid, metric)
    place = None if site is None else Site.parse(site)

    def erased(order: Tensor) -> Tensor:
        found = []
        for count in steps:
            taken = torch.arange(grid.patches) < most.clamp(max=count)[:, None]
            gone = torch.zeros_like(able).scatter_(1, order, taken)
            found.append(measure(_run(model, images, gone, grid, place)).detach().cpu().double())
        return torch.stack(found)

    generator = torch.Generator().manual_seed(seed)
    ranked = erased(rank.argsort(dim=1, descending=first == "most", stable=True))
    draws = [torch.rand(rank.shape, generator=generator).masked_fill(~able, 2.0).argsort(1) for _ in range(random)]
    what = f"mean pixel, {first} first" if place is None else f"mean patch at {place}, {first} first"
    base = measure(plain).detach().cpu().double()
    order = tuple(f"{i + 1}. patch by weight" for i in range(grid.patches))
    return AblationCurve(
        name, what, steps, base, ranked, torch.stack([erased(o) for o in draws]), order, plain.provenance
    )


def _run(model: Model, images: Tensor, gone: Tensor, grid: Grid, site: Site | None) -> Run:
    if site is None:
        hidden = grid.pixels(gone)[:, None].to(images.device)
        return model.run({"pixel_values": torch.where(hidden, images.mean((2, 3), keepdim=True), images)})
    return model.run({"pixel_values": images}, edit={site: mean_patch(gone, grid)})


def mean_patch(gone: Tensor, grid: Grid) -> Edit:
    """An edit of one vector per token, ``[B, T, ...]``: the patches ``gone`` ``[B, N]`` become the mean of the patches that
    stay (of all, if none does)."""

    def edit(values: Tensor) -> Tensor:
        if values.ndim != 3:
            raise Refused(
                f"a patch is replaced in a site of one vector per token, [B, T, D]; this one is {list(values.shape)}"
            )
        index, lost = grid.index.to(values.device), gone.to(values.device)
        grid.check(values.shape[1], "this site")
        patches = values[:, index]
        kept = torch.where(lost.all(1, keepdim=True), torch.ones_like(lost), ~lost).to(values.dtype)
        mean = (patches * kept[..., None]).sum(1, keepdim=True) / kept.sum(1)[:, None, None]
        out = values.clone()
        out[:, index] = torch.where(lost[..., None], mean, patches)
        return out

    return edit


def _metric(plain: Run, grid: Grid, metric: Metric | None) -> tuple[str, Metric]:
    if metric is not None:
        return getattr(metric, "__name__", "metric"), metric
    if plain.logits is not None and plain.logits.ndim == 2:
        said = plain.logits.argmax(1)
        return "probability of the class", lambda run: _logits(run).double().softmax(1).gather(1, said[:, None])[:, 0]
    if plain.output is not None and plain.output.ndim == 3:
        whole = _summary(plain.output, grid)
        return "cosine to the whole image", lambda run: torch.cosine_similarity(
            _summary(_output(run), grid), whole, dim=1
        )
    raise Refused(f"{plain.provenance.model} gives neither logits [B, V] nor an output [B, T, D]; pass metric=")


def _logits(run: Run) -> Tensor:
    assert run.logits is not None
    return run.logits


def _output(run: Run) -> Tensor:
    assert run.output is not None
    return run.output


def _summary(output: Tensor, grid: Grid) -> Tensor:
    values = output.double()
    return values[:, grid.cls] if grid.cls is not None else values[:, grid.index].mean(1)


def _counts(patches: int) -> tuple[int, ...]:
    return tuple(sorted({max(1, round(patches * share)) for share in (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75)}))


def random_vision_model() -> tuple[Model, Tensor, Grid]:
    """A small model of images with random weights, two images for it, and its grid."""
    from workbench.models.native import NativeModel
    from workbench.models.native_net import NativeConfig, NativeNet

    config = NativeConfig(
        layers=1, heads=2, width=16, head_width=8, vocab=3, positions="learned", causal=False, grid=(3, 4), patch=2, channels=1
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = NativeModel(NativeNet(config).eval(), name="random weights")
    return model, torch.randn(2, 1, 6, 8, generator=torch.Generator().manual_seed(0)), Grid(3, 4, (2, 2), tokens=12)


def _example() -> dict[str, Any]:
    model, images, grid = random_vision_model()
    weight = images.abs().unflatten(3, (4, 2)).unflatten(2, (3, 2)).mean((1, 3, 5)).flatten(1)
    return {"model": model, "images": images, "weight": weight, "grid": grid, "random": 2}


ANALYSES = (
    Analysis(
        name="patch-erasure",
        question="Does the model need the patches that a map points at?",
        function=erasure_curve,
        example=_example,
        paper="Petsiuk et al. 2018 (arXiv 1806.07421), section 3.2",
        source="model",
        null="as many random patches erased",
        cause="erasure_curve: patches become the mean pixel, or their tokens the mean patch",
        definition="insertion is read as erasing the least attended patches first",
    ),
)
