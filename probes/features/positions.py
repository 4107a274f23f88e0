"""Activations at chosen tokens, as the arrays that probes of labels take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.models.protocol import Model
from workbench.probes.features.reading import Texts, batches, count, site_rows
from workbench.sites import Site


@dataclass(frozen=True)
class TokenRows:
    """``x`` ``[N, D]``: the site at N tokens, heads concatenated; ``text`` and ``position`` ``[N]`` say which, ``tokens`` ``[N]``
    how they read and ``ids`` ``[N]`` their token ids."""

    x: Tensor
    text: Tensor
    position: Tensor
    ids: Tensor
    tokens: tuple[str, ...]


@torch.no_grad()
def activations_at(
    model: Model,
    site: str | Site,
    texts: Texts,
    positions: int | Sequence[int | Sequence[int]] | None = None,
    *,
    batch: int = 8,
) -> TokenRows:
    """Read ``site`` at the given positions of each text, in the order of the texts.

    ``positions``: None for every token, one number for the same place in every text, or one number (or several) per text.
    Positions count real tokens from 0, whichever side the padding is on; negative ones count from the end, -1 being the last.
    Refused: positions outside of a text, another number of them than of texts.
    """
    where, total = Site.parse(site), count(texts)
    if positions is not None and not isinstance(positions, int) and len(positions) != total:
        raise WorkbenchError(f"positions are given per text: {total} texts, {len(positions)} entries")
    found, text, place, ids, said = [], [], [], [], []
    for first, tokens in batches(model, texts, batch):
        run = model.run(tokens, read=[where], logits=None)
        real = run.tokens.mask.cpu()
        labels = run.tokens.labels or tuple(tuple(f"#{i}" for i in row) for row in run.tokens.ids.tolist())
        chosen = torch.zeros_like(real)
        order: list[tuple[int, int, int]] = []
        for b, row in enumerate(real):
            columns = row.nonzero()[:, 0].tolist()
            for p in _asked(positions, first + b, len(columns)):
                chosen[b, columns[p]] = True
                order.append((b, p, columns[p]))
        rows = site_rows(run.acts[where], chosen, where)
        index = {(int(b), int(c)): i for i, (b, c) in enumerate(chosen.nonzero().tolist())}
        found.append(rows[[index[b, c] for b, _, c in order]])
        for b, p, c in order:
            text.append(first + b)
            place.append(p)
            ids.append(int(run.tokens.ids[b, c]))
            said.append(labels[b][c])
    if not text:
        raise WorkbenchError("no position was asked for")
    return TokenRows(torch.cat(found), torch.tensor(text), torch.tensor(place), torch.tensor(ids), tuple(said))


def _asked(positions: int | Sequence[int | Sequence[int]] | None, text: int, length: int) -> list[int]:
    if positions is None:
        return list(range(length))
    one = positions if isinstance(positions, int) else positions[text]
    out = []
    for p in [one] if isinstance(one, int) else one:
        p = int(p)
        if not -length <= p < length:
            raise WorkbenchError(f"text {text} has {length} tokens; position {p} is outside")
        out.append(p % length)
    return out
