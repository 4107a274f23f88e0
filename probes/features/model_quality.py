"""``coder_quality``: a coder judged inside its model, with its output spliced into the forward pass (see ``quality``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.coders.use import check_use
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.protocol import Edit, Model
from workbench.probes.features.quality import CoderQuality, Tally
from workbench.probes.features.reading import Places, Rows, Sites, Texts, count, places, replaced, rows
from workbench.sites import Site

if TYPE_CHECKING:
    from workbench.coders.coder import Coder

ABLATIONS = ("zero", "mean")
_POSITIONS = 256
"""Positions whose distributions over the vocabulary are compared at once."""


@torch.no_grad()
def coder_quality(
    coder: Coder,
    model: Model,
    texts: Texts,
    site: Sites | None = None,
    target: Sites | None = None,
    *,
    ablation: str | Sequence[str] = ABLATIONS,
    batch: int = 8,
    ignore: Sequence[int] = (),
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> CoderQuality:
    """Judge a coder on the texts of its model, batch by batch.

    ``site`` and ``target`` are where it reads and writes, if not where it says itself. Its output is put at the written site in a
    run of its own, every judged position at once; several written sites are all replaced, each computed from the unchanged run.
    ``ablation`` names what the recovered loss is measured against: ``"zero"``, ``"mean"`` or both. ``ignore`` are token ids that
    are neither judged nor replaced. A batch takes one run to find the mean, and one for each of: the model itself, the coder, the
    shuffled decoder, each ablation. Warns where the coder says that it belongs to another model, site or length of text.

    Refused: models that do not predict next tokens (use ``array_quality`` on rows), unknown ablations, texts of a single token.
    """
    wanted = (ablation,) if isinstance(ablation, str) else tuple(dict.fromkeys(ablation))
    for name in wanted:
        if name not in ABLATIONS:
            raise UnknownName("ablation", name, ABLATIONS)
    if model.shape.vocab is None or not model.shape.causal:
        raise Refused(
            f"{model.name} does not predict next tokens; judge the coder on rows with array_quality(coder, X, Y)"
        )
    where = places(coder, site, target)
    mean, longest = _mean(model, texts, where, batch, ignore)
    check_use(coder, model, site, longest, stacklevel=4)
    tally = Tally(coder, count(texts), mean, seed)
    tally.ablations = wanted
    provenance = None
    for found in rows(model, texts, where, batch=batch, ignore=ignore, logits="all", progress=progress):
        y, null = tally.add(found.text + found.first, found.x, found.target)
        provenance = provenance or found.run.provenance
        constants = {
            "zero": torch.zeros_like(found.target),
            "mean": mean.to(found.target.device, found.target.dtype).expand_as(found.target),
        }
        _outcomes(tally, model, where, found, {"coder": y, "null": null, **{name: constants[name] for name in wanted}})
    if not float(tally.sums["predicted"].sum()):
        raise WorkbenchError("no judged position has a token after it: the loss needs texts of at least two tokens")
    assert provenance is not None
    return tally.result([str(s) for s in where.reads], [str(s) for s in where.writes], provenance)


def _mean(model: Model, texts: Texts, where: Places, batch: int, ignore: Sequence[int]) -> tuple[Tensor, int]:
    """Mean of the written sites over all judged positions, ``[D_out]`` float64, and the tokens of the longest text."""
    total, seen, longest = torch.zeros(sum(where.write_widths), dtype=torch.float64), 0, 0
    for found in rows(model, texts, where, batch=batch, ignore=ignore):
        total += found.target.double().sum(0).cpu()
        seen += len(found.target)
        longest = max(longest, int(found.run.tokens.mask.sum(1).max()))
    return total / seen, longest


def _outcomes(tally: Tally, model: Model, where: Places, found: Rows, changes: Mapping[str, Tensor]) -> None:
    """Add loss and KL of the model itself and of each changed one."""
    tokens, mask = found.run.tokens, found.run.tokens.mask.cpu()
    following = torch.zeros_like(mask)
    following[:, :-1] = mask[:, 1:]
    scored = found.real & following
    own = found.run.logits
    assert own is not None
    text, position = scored.nonzero(as_tuple=True)
    next_ids = tokens.ids.cpu()[text, position + 1] if len(text) else tokens.ids.cpu().new_zeros(0)
    tally.into("predicted", text + found.first, torch.ones(len(text)))
    _losses(tally, "ce", own, text, position, next_ids, found.first)
    for name, y in changes.items():
        edit: Mapping[Site | str, Edit | Tensor] = dict(replaced(where, found.real, y))
        logits = model.run(tokens, edit=edit, logits="all").logits
        assert logits is not None
        said = "null_ce_coder" if name == "null" else f"ce_{name}"
        _losses(tally, said, logits, text, position, next_ids, found.first)
        _divergences(tally, "null_kl_coder" if name == "null" else f"kl_{name}", own, logits, found)


def _losses(tally: Tally, name: str, logits: Tensor, text: Tensor, position: Tensor, ids: Tensor, first: int) -> None:
    for i in range(0, len(text), _POSITIONS):
        part = slice(i, i + _POSITIONS)
        says = logits[text[part], position[part]].double().log_softmax(-1)
        loss = -says.gather(-1, ids[part].to(says.device)[:, None])[:, 0]
        tally.into(name, text[part] + first, loss)


def _divergences(tally: Tally, name: str, own: Tensor, changed: Tensor, found: Rows) -> None:
    for i in range(0, len(found.text), _POSITIONS):
        at = found.text[i : i + _POSITIONS], found.position[i : i + _POSITIONS]
        p, q = (logits[at].double().log_softmax(-1) for logits in (own, changed))
        tally.into(name, at[0] + found.first, (p.exp() * (p - q)).sum(-1))
