"""Generate text and capture the attention of every step: the rows of the queries that produced the new tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.captures import Capture
from workbench.errors import Refused, WorkbenchError
from workbench.maps import AttentionMap, GatedMap
from workbench.models.hf import HFModel
from workbench.models.inputs import given_tokens
from workbench.models.protocol import Model, Tokens
from workbench.models.requests import check_ids, check_layers, check_logits, kept
from workbench.patterns.explicit import ExplicitMap
from workbench.patterns.softmax import SoftmaxMap
from workbench.run import Generation, Maps


def generate(
    model: Model,
    tokens: str | Sequence[str] | Tensor | Tokens | Mapping[str, Tensor],
    steps: int,
    maps: Capture | None = None,
    *,
    logits: bool = False,
    **options: Any,
) -> Generation:
    """Generate up to ``steps`` tokens after a prompt, greedily unless told otherwise, capturing attention on the way.

    ``maps[layer]`` of the result has a row for every step: row s is that of the query which produced token s, it stands at
    position ``prompt - 1 + s``, and its keys are all positions of the final text but the last. Statistics are those of the same
    rows of one forward pass over the final text. While generating, a chosen layer only puts its new query and key aside;
    everything named in ``maps`` is computed in one pass at the end. Tokens and logits are those of generation without capture.

    Hugging Face models run their own ``generate`` and take its options (``do_sample``, ``temperature``, ``eos_token_id`` ...);
    beam search and whatever else reorders or takes back the cache is refused. Native models and bridges take ``eos_token_id``
    alone; a bridge captures the pattern it builds in every step. Prompts of different lengths are padded on the left, also
    where their tokenizer pads on the right. After the end of a text its positions are padding: masked in ``tokens``, zero rows in
    the maps. ``logits=True`` returns ``[B, S, V]``, the numbers each token was chosen from before any processing.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise WorkbenchError(f"steps is a number of tokens to generate, at least 1; got {steps!r}")
    from workbench.models.native import NativeModel

    if isinstance(model, HFModel):
        from workbench.models.hf_generate import hf_generate

        with model._lock:
            given = _checked(model, given_tokens(model.model, tokens, model.tokenizer, model.shape), steps, logits)
            if any(module.training for module in model.model.modules()):
                raise WorkbenchError(f"{model.name} is in training mode; call .eval() on the model first")
            return hf_generate(model, given, steps, maps, logits, options)
    ends = options.pop("eos_token_id", getattr(model.tokenizer, "eos_token_id", None))
    if options:
        raise WorkbenchError(f"{model.name} generates greedily and takes eos_token_id alone; got {', '.join(options)}")
    if isinstance(model, NativeModel):
        with model._lock:
            return _native(model, _checked(model, model._given(tokens), steps, logits), steps, maps, logits, ends)
    bridge: Any = model
    return _by_runs(bridge, _checked(model, bridge._given(tokens), steps, logits), steps, maps, logits, ends)


def _checked(model: Model, given: Tokens, steps: int, logits: bool) -> Tokens:
    if not model.shape.causal:
        raise Refused(f"{model.name} does not generate text: its tokens see those after them")
    if not given.ids.shape[1] and not given.inputs:
        raise WorkbenchError("the input has no tokens")
    check_ids(given.ids, model.shape)
    length, most = given.ids.shape[1] + steps - 1, model.shape.context
    if most is not None and length > most:
        raise WorkbenchError(
            f"a prompt of {given.ids.shape[1]} tokens and {steps} steps reach position {length}, {length - most} more than "
            f"the model's context of {most}; take fewer steps or a shorter prompt"
        )
    check_logits("all" if logits else None, len(given.ids), steps, model.shape)
    return _left(given)


def _left(given: Tokens) -> Tokens:
    """The same prompts with their padding on the left, so that all go on from the last position."""
    if not given.mask.shape[1] or bool(given.mask[:, -1].all()):
        return given
    behind = given.mask.flip(1).int().argmax(1).tolist()
    ids, mask = (torch.stack([r.roll(n) for r, n in zip(t, behind, strict=True)]) for t in (given.ids, given.mask))
    labels = tuple(row[len(row) - n :] + row[: len(row) - n] for row, n in zip(given.labels, behind, strict=False))
    return Tokens(ids, mask, labels, given.inputs)


class _Text:
    """Greedy choice of tokens, and which rows have come to their end."""

    def __init__(self, given: Tokens, ends: Any, pad: int | None) -> None:
        self.ids, self.mask, self.prompt = given.ids, given.mask, given.ids.shape[1]
        self.ends = torch.as_tensor([] if ends is None else ends).flatten().to(given.ids.dtype)
        self.pad = 0 if pad is None else pad
        self.going = torch.ones(len(given.ids), dtype=torch.bool)

    def add(self, logits: Tensor) -> bool:
        """Take the likeliest token of ``[B, V]``; whether any text goes on."""
        new = torch.where(self.going, logits.argmax(-1).cpu().to(self.ids.dtype), self.pad)
        self.ids = torch.cat([self.ids, new[:, None]], 1)
        self.mask = torch.cat([self.mask, self.going[:, None]], 1)
        self.going = self.going & ~torch.isin(new, self.ends)
        return bool(self.going.any())

    def tokens(self, tokenizer: Any) -> Tokens:
        return Tokens(self.ids, self.mask, Tokens.of(self.ids, tokenizer).labels)


@torch.no_grad()
def _native(model: Any, given: Tokens, steps: int, request: Capture | None, logits: bool, ends: Any) -> Generation:
    if model.net.training:
        raise WorkbenchError(f"{model.name} is in training mode; call .net.eval() first")
    wanted = check_layers(request, range(model.shape.layers))
    queries: dict[int | str, list[Tensor]] = {layer: [] for layer in wanted}
    gates: dict[int | str, list[Tensor]] = {layer: [] for layer in wanted}
    last: dict[int | str, SoftmaxMap] = {}

    def on_map(layer: int, found: Any) -> None:
        if layer not in queries:
            return
        if isinstance(found, GatedMap):
            gates[layer].append(found.gate[:, :, -1:].clone())
            found = found.raw
        queries[layer].append(found.scores.q[:, :, -1:].clone())
        last[layer] = found

    text = _Text(given, ends, getattr(model.tokenizer, "pad_token_id", None))
    device, cache, rows = model.net.W_E.device, None, []
    for step in range(steps):
        new = slice(0 if step == 0 else -1, None)
        mask = None if bool(text.mask.all()) else text.mask[:, new].to(device)
        hidden, cache = model.net(text.ids[:, new].to(device), mask, cache=cache, on_map=on_map, hidden=True)
        found = hidden[:, -1] @ model.net.unembed
        rows += [found] if logits else []
        if not text.add(found):
            break
    maps: dict[int | str, AttentionMap] = {}
    for layer in wanted:
        s = last[layer].scores
        amap: AttentionMap = SoftmaxMap(
            torch.cat(queries[layer], 2), s.k, mask=s.mask.at(text.prompt - 1), scale=s.scale
        )
        amap = GatedMap(amap, torch.cat(gates[layer], 2)) if gates[layer] else amap
        maps[layer] = kept(amap, request, layer)
    return Generation(
        tokens=text.tokens(model.tokenizer),
        prompt=text.prompt,
        logits=torch.stack(rows, 1) if logits else None,
        maps=Maps(maps),
        provenance=model._provenance(maps),
    )


@torch.no_grad()
def _by_runs(model: Any, given: Tokens, steps: int, request: Capture | None, logits: bool, ends: Any) -> Generation:
    """Step by step through ``model.run``; rows are kept as numbers, ``[B, H, S, K]``."""
    wanted = check_layers(request, model.layers())
    look = None if request is None else Capture(layers=wanted)
    text = _Text(given, ends, getattr(model.tokenizer, "pad_token_id", None))
    found: dict[int | str, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in wanted}
    heads: dict[int | str, int] = {}
    before = text.prompt - 1 if text.prompt > 1 and bool(given.mask[:, :-1].any(1).all()) else 0
    cache: Any = True
    if before:
        cache = model.run(Tokens(given.ids[:, :before], given.mask[:, :before]), logits=None, cache=True).cache
    rows = []
    for _ in range(steps):
        part = Tokens(text.ids[:, before:], text.mask[:, before:])
        run = model.run(part, maps=look, logits="all", cache=cache)
        before, cache = text.ids.shape[1], run.cache
        for layer, amap in run.maps.items():
            n = amap.shape[2]
            found[layer].append((amap.rows(n - 1, n), amap.lse[:, :, n - 1 :]))
            heads[layer] = amap.kv_heads
        rows += [run.logits[:, -1]] if logits else []
        if not text.add(run.logits[:, -1]):
            break
    maps: dict[int | str, AttentionMap] = {}
    for layer in wanted:
        width = found[layer][-1][0].shape[3]
        weights = torch.cat([torch.nn.functional.pad(w, (0, width - w.shape[3])) for w, _ in found[layer]], 2)
        lse = torch.cat([row for _, row in found[layer]], 2)
        amap = ExplicitMap(weights, lse, offset=text.prompt - 1, kv_heads=heads[layer])
        maps[layer] = kept(amap, request, layer)
    return Generation(
        tokens=text.tokens(model.tokenizer),
        prompt=text.prompt,
        logits=torch.stack(rows, 1) if logits else None,
        maps=Maps(maps),
        provenance=run.provenance,
    )
