"""Greedy decoding that looks at one attention row per step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workbench.captures import capture
from workbench.errors import Refused
from workbench.models.protocol import Model
from workbench.run import Run


@dataclass(frozen=True)
class Decoded:
    """``tokens`` ``[B, S]`` generated greedily, ``alive`` ``[B, S]`` False from the end-of-text token on, and ``keys``
    ``[S, B, L, H]``: the key with the largest weight in the row that produced each token. ``last`` is the last run.
    """

    tokens: Tensor
    alive: Tensor
    keys: Tensor
    layers: tuple[int | str, ...]
    last: Run


@torch.no_grad()
def decode(model: Model, ids: Tensor, steps: int, *, cache: bool = True) -> Decoded:
    """``steps`` tokens after the prompts ``ids`` ``[B, T]``.

    With ``cache`` the prompt runs once without any capture, and every step sees one query: time and memory per step are
    linear in the context. ``cache=False`` is for models without one: every step runs the whole text and all its rows
    pass the statistics kernel, still without storing them.
    """
    request = capture(stats=("top1",), keep=False)
    end = getattr(model.tokenizer, "eos_token_id", None)
    text, tokens, alive, keys = ids, [], [], []
    going = torch.ones(len(ids), dtype=torch.bool)
    state: Any = True if cache else None
    if cache and ids.shape[1] > 1:
        state = model.run(ids[:, :-1], logits=None, cache=True).cache
        if state is None:
            raise Refused(f"{model.name} gave no key-value cache; call again with cache=False (slower, same numbers)")
    for _ in range(steps):
        run = model.run(text[:, -1:] if cache else text, maps=request, logits="last", cache=state)
        state = run.cache if cache else None
        assert run.logits is not None
        new = run.logits[:, -1].argmax(-1).cpu()
        keys.append(_favourites(run))
        tokens.append(new)
        going = going & (new != end) if end is not None else going
        alive.append(going)
        text = torch.cat([text, new[:, None].to(text)], 1)
        if not going.any():
            break
    return Decoded(torch.stack(tokens, 1), torch.stack(alive, 1), torch.stack(keys), tuple(run.maps), run)


def _favourites(run: Run) -> Tensor:
    """Key with the largest weight in the last row of every head, ``[B, L, H]``; -1 for a row without weight."""
    heads = {amap.shape[1] for amap in run.maps.values()}
    if len(heads) > 1:
        raise Refused(
            f"layers of this model have different numbers of heads ({sorted(heads)}); capture them one by one"
        )
    return torch.stack([amap.topk(1).indices[:, :, -1, 0].cpu() for amap in run.maps.values()], 1)
