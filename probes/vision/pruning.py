"""What does a model lose without some tokens of the image?

The test of every method that prunes image tokens: a run in which the tokens are gone from some layer on, beside runs in which as
many random ones are. Gone means one of two things. ``mean``: the token becomes the mean of those that stay, and layers still look
at it. ``remove``: no later layer sees it (its column of the pattern is emptied and the rows are divided by their sums, which is
the softmax over the others), and a model that answers with the mean patch answers with the mean of the patches that stay.
Positions are not renumbered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.protocol import Edit, Model, Tokens
from workbench.probes.ablation import AblationCurve
from workbench.probes.catalogue import Analysis
from workbench.probes.hidden_keys import without_keys
from workbench.probes.removal import attention_layers
from workbench.probes.vision.erasure import mean_patch, random_vision_model
from workbench.probes.vision.grid import Grid
from workbench.run import Run
from workbench.sites import Site

WAYS = ("mean", "remove")
START = -1
"""The layer before the first one: tokens that go there are never seen."""


@torch.no_grad()
def pruning_curve(
    model: Model,
    inputs: Any,
    kept: Tensor | Sequence[Tensor],
    grid: Grid,
    *,
    layer: int = START,
    how: str = "mean",
    random: int = 8,
    seed: int = 0,
) -> AblationCurve:
    """How far the prediction moves if image tokens are pruned, and if as many random ones are.

    ``kept`` ``[B, N]`` bool: the tokens that stay, the same number in every image, or a list of such with different numbers.
    They go after block ``layer`` of the stack of ``grid`` (-1: before the first block). The measure is the KL divergence of the
    prediction (of the last real token, for a text) from that of the whole image in nats, and for a model without a head one
    minus the cosine of its output (class token, else mean of the patches that stay). ``how="remove"`` edits patterns, which a
    Hugging Face model allows if it was loaded with ``attn_implementation="eager"``; before the first block of a text it needs
    none.
    """
    masks = [kept] if isinstance(kept, Tensor) else list(kept)
    if random < 1:
        raise WorkbenchError(f"random is the number of random draws, at least 1; got {random}")
    gone = {pruned_count(mask, grid): ~mask.cpu() for mask in masks}
    if len(gone) < len(masks) or not gone:
        raise WorkbenchError("kept holds at least one choice of tokens, each with another number of them")
    given = as_inputs(inputs)
    plain = model.run(given)
    generator = torch.Generator().manual_seed(seed)
    base = moved(plain, plain, grid)
    counts = tuple(sorted(gone))
    ranked, drawn = [], []
    for count in counts:
        lost = gone[count]
        if len(lost) != len(base):
            raise WorkbenchError(f"kept is of {len(lost)} images, the run of {len(base)}")
        ranked.append(moved(pruned_run(model, given, lost, grid, layer=layer, how=how), plain, grid, ~lost))
        others = [random_patches(lost, generator) for _ in range(random)]
        drawn.append(
            torch.stack(
                [moved(pruned_run(model, given, o, grid, layer=layer, how=how), plain, grid, ~o) for o in others]
            )
        )
    what = "mean of the others" if how == "mean" else "no longer seen"
    where = "before the first block" if layer == START else f"after block {layer}"
    name = "KL divergence of the prediction (nats)" if plain.logits is not None else "1 - cosine to the whole image"
    order = tuple(f"{count} tokens pruned" for count in counts)
    return AblationCurve(
        name, f"{what}, {where}", counts, base, torch.stack(ranked), torch.stack(drawn, 1), order, plain.provenance
    )


def pruned_count(kept: Tensor, grid: Grid) -> int:
    """How many tokens of each image ``kept`` ``[B, N]`` leaves out; refuses masks of another shape and uneven ones."""
    if kept.ndim != 2 or kept.shape[1] != grid.patches or kept.dtype != torch.bool:
        raise WorkbenchError(
            f"kept says of each patch whether it stays, bool [B, {grid.patches}]; got {kept.dtype} {list(kept.shape)}"
        )
    counts = {int(n) for n in (~kept).sum(1)}
    if len(counts) != 1 or counts & {0, grid.patches}:
        raise WorkbenchError(f"every image loses the same number of tokens, some but not all; got {sorted(counts)}")
    return counts.pop()


def random_patches(like: Tensor, generator: torch.Generator) -> Tensor:
    """As many patches of every image as ``like`` ``[B, N]`` has, drawn at random."""
    order = torch.rand(like.shape, generator=generator).argsort(1)
    return torch.zeros_like(like).scatter_(1, order, torch.arange(like.shape[1]) < like.sum(1, keepdim=True))


def top_patches(weight: Tensor, k: int) -> Tensor:
    """The ``k`` largest of every row of ``weight`` ``[..., N]`` as bool; among equals the first."""
    order = weight.argsort(dim=-1, descending=True, stable=True)[..., :k]
    return torch.zeros(weight.shape, dtype=torch.bool).scatter_(-1, order, True)


@torch.no_grad()
def pruned_run(
    model: Model,
    inputs: Any,
    gone: Tensor,
    grid: Grid,
    *,
    layer: int = START,
    how: str = "mean",
    read: Sequence[Site] = (),
) -> Run:
    """A run in which the patches ``gone`` ``[B, N]`` are pruned after block ``layer``."""
    if how not in WAYS:
        raise UnknownName("way of pruning", how, WAYS)
    given = as_inputs(inputs)
    if how == "mean":
        return model.run(given, read=read, edit={entry(layer, grid): mean_patch(gone, grid)})
    if grid.stack == "text" and layer == START:
        return model.run(without_tokens(given, gone, grid), read=read)
    return model.run(given, read=read, edit=unseen(model, gone, grid, layer))


def entry(layer: int, grid: Grid) -> Site:
    """The residual stream after block ``layer``; before the first one for -1."""
    if layer < START:
        raise WorkbenchError(f"tokens go after a block, 0 or more, or before the first one, -1; got {layer}")
    return Site("resid_pre", 0, None, grid.stack) if layer == START else Site("resid_post", layer, None, grid.stack)


def unseen(model: Model, gone: Tensor, grid: Grid, layer: int) -> dict[Site | str, Edit | Tensor]:
    """Edits that take the patches ``gone`` out of all blocks after ``layer``, and out of the mean that a native model of images
    answers with."""
    layers = [at for at in attention_layers(model, grid.stack) if at > layer]
    edits: dict[Site | str, Edit | Tensor] = {
        Site("pattern", at, None, grid.stack): without_columns(gone, grid) for at in layers
    }
    last = Site("final_norm")
    if not grid.stack and grid.cls is None and str(last) in model.manifest().sites:
        edits[last] = mean_patch(gone, grid)
    return edits


def without_columns(gone: Tensor, grid: Grid) -> Edit:
    """An edit of a pattern ``[B, H, Q, K]``: nobody sees the patches ``gone``; softmax over the keys that stay. A row that saw
    nothing else is left empty."""

    def edit(pattern: Tensor) -> Tensor:
        grid.check(pattern.shape[-1], "this pattern")
        lost = torch.zeros(len(gone), pattern.shape[-1], dtype=torch.bool, device=pattern.device)
        lost[:, grid.index.to(pattern.device)] = gone.to(pattern.device)
        return without_keys(pattern, ~lost[:, None, None])

    return edit


def without_tokens(inputs: Any, gone: Tensor, grid: Grid) -> dict[str, Tensor]:
    """Inputs of a text whose attention mask hides the image tokens ``gone``."""
    if isinstance(inputs, Tokens):
        ids, mask, rest = inputs.ids, inputs.mask, dict(inputs.inputs)
    else:
        ids, rest = inputs["input_ids"], {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
        mask = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    grid.check(ids.shape[1], "this text")
    hidden = mask.clone()
    hidden[:, grid.index] &= ~gone.to(mask.device)
    return {"input_ids": ids, "attention_mask": hidden.long(), **rest}


def as_inputs(inputs: Any) -> Any:
    """Images ``[B, C, height, width]`` as the mapping that ``model.run`` takes; anything else as it is."""
    images = isinstance(inputs, Tensor) and inputs.is_floating_point()
    if images and inputs.ndim != 4:
        raise WorkbenchError(f"images are [B, C, height, width]; got {list(inputs.shape)}")
    if isinstance(inputs, Tokens | Mapping) or not isinstance(inputs, Tensor):
        return inputs
    return {"pixel_values": inputs} if images else inputs


def last_token(run: Run) -> Tensor:
    """The last real token of each sequence, ``[B]``."""
    mask = run.tokens.mask
    return mask.shape[1] - 1 - mask.flip(1).long().argmax(1)


def prediction(run: Run) -> Tensor:
    """The logits that answer, ``[B, V]`` in float64: of the image, or of the last real token of a text."""
    if run.logits is None:
        raise Refused(f"{run.provenance.model} gives no logits")
    logits = run.logits.detach().cpu().double()
    return logits if logits.ndim == 2 else logits[torch.arange(len(logits)), last_token(run).cpu()]


def moved(run: Run, plain: Run, grid: Grid, kept: Tensor | None = None) -> Tensor:
    """KL divergence of the prediction from that of ``plain``, or one minus the cosine of the outputs, ``[B]`` in float64."""
    if plain.logits is not None:
        p, q = prediction(plain).log_softmax(-1), prediction(run).log_softmax(-1)
        return torch.where(p.exp() > 0, p.exp() * (p - q), 0.0).sum(-1)
    if plain.output is None or run.output is None:
        raise Refused(f"{plain.provenance.model} gives neither logits nor an output to compare")
    return 1 - torch.cosine_similarity(summary(run.output, grid, kept), summary(plain.output, grid), dim=1)


def summary(values: Tensor, grid: Grid, kept: Tensor | None = None) -> Tensor:
    """The class token of ``values`` ``[B, T, D]``, or the mean of the patches (of those ``kept``), ``[B, D]`` in float64."""
    rows = values.detach().cpu().double()
    if grid.cls is not None:
        return rows[:, grid.cls]
    patches = rows[:, grid.index]
    if kept is None:
        return patches.mean(1)
    return (patches * kept[..., None]).sum(1) / kept.sum(1, keepdim=True)


def _example() -> dict[str, Any]:
    model, images, grid = random_vision_model()
    kept = [torch.arange(grid.patches).expand(len(images), -1) < n for n in (3, 6, 9)]
    return {"model": model, "inputs": images, "kept": kept, "grid": grid, "how": "remove", "random": 2}


ANALYSES = (
    Analysis(
        name="image-token-pruning",
        question="What does a model lose without some tokens of the image?",
        function=pruning_curve,
        example=_example,
        paper="Liu et al. 2025 (arXiv 2508.00553), section 4",
        source="model",
        null="as many random tokens pruned",
        cause="pruning_curve: tokens become the mean of the others, or are no longer seen",
        definition="the paper measures tasks; the divergence of the prediction is ours, and positions are not renumbered",
    ),
)
