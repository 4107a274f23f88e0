"""Greedy decoding that looks at one attention row per step."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workbench.captures import Capture, capture
from workbench.errors import Refused
from workbench.models.protocol import Edit, Model
from workbench.run import EMPTY, Run
from workbench.sites import Site

_LOOK = capture(stats=("top1",), keep=False)


@dataclass(frozen=True)
class Decoded:
    """``tokens`` ``[B, S]`` generated greedily, ``alive`` ``[B, S]`` False from the end-of-text token on, and after a token of
    ``stop``; ``keys`` ``[S, B, L, H]``: the key with the largest weight in the row that produced each token, empty without
    ``look``. ``first`` ``[B, V]``: the logits of the first step. ``last`` is the last run.
    """

    tokens: Tensor
    alive: Tensor
    keys: Tensor
    layers: tuple[int | str, ...]
    first: Tensor
    last: Run


@torch.no_grad()
def decode(
    model: Model,
    ids: Tensor,
    steps: int,
    *,
    cache: bool = True,
    stop: Collection[int] = (),
    look: bool = True,
    edit: Mapping[Site | str, Edit | Tensor] = EMPTY,
    edit_prompt: bool = True,
) -> Decoded:
    """``steps`` tokens after the prompts ``ids`` ``[B, T]``.

    With ``cache`` the prompt runs once without any capture, and every step sees one query: time and memory per step are
    linear in the context. ``cache=False`` is for models without one: every step runs the whole text and all its rows
    pass the statistics kernel, still without storing them. A token of ``stop`` is the last one of its text. ``edit`` changes
    sites as in ``model.run``; with ``edit_prompt=False`` only from the last token of the prompt on, which needs the cache.
    """
    if not (edit_prompt or cache):
        raise Refused("editing the answer alone needs the key-value cache: leave cache=False or edit_prompt=False out")
    request: Capture | None = _LOOK if look else None
    end = getattr(model.tokenizer, "eos_token_id", None)
    text, tokens, alive, keys = ids, [], [], []
    going = torch.ones(len(ids), dtype=torch.bool)
    state: Any = True if cache else None
    first: Tensor | None = None
    if cache and ids.shape[1] > 1:
        state = model.run(ids[:, :-1], logits=None, cache=True, edit=edit if edit_prompt else EMPTY).cache
        if state is None:
            raise Refused(f"{model.name} gave no key-value cache; call again with cache=False (slower, same numbers)")
    for _ in range(steps):
        run = model.run(text[:, -1:] if cache else text, maps=request, logits="last", cache=state, edit=edit)
        state = run.cache if cache else None
        assert run.logits is not None
        last = run.logits[:, -1].cpu()
        first = last if first is None else first
        new = last.argmax(-1)
        if look:
            keys.append(_favourites(run))
        tokens.append(new)
        going = going & (new != end) if end is not None else going
        alive.append(going)
        if stop:
            going = going & ~torch.isin(new, torch.tensor(sorted(stop)))
        text = torch.cat([text, new[:, None].to(text)], 1)
        if not going.any():
            break
    assert first is not None
    looked = torch.stack(keys) if look else torch.empty(0, len(ids), 0, 0, dtype=torch.long)
    return Decoded(torch.stack(tokens, 1), torch.stack(alive, 1), looked, tuple(run.maps), first, run)


def _favourites(run: Run) -> Tensor:
    """Key with the largest weight in the last row of every head, ``[B, L, H]``; -1 for a row without weight."""
    heads = {amap.shape[1] for amap in run.maps.values()}
    if len(heads) > 1:
        raise Refused(
            f"layers of this model have different numbers of heads ({sorted(heads)}); capture them one by one"
        )
    return torch.stack([amap.topk(1).indices[:, :, -1, 0].cpu() for amap in run.maps.values()], 1)
