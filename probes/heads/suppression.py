"""Which heads hold back a token that the model is about to repeat?

Copy suppression (McDougall et al., arXiv 2310.04625): a token x stands in the text, the layers before a head already predict x,
the head attends to the earlier x and lowers its logit. At every query q let x be the token that the stream before the head's
layer predicts (largest logit through the last norm and W_U), and C(q) the keys k < q that hold it, the first token of the
text left out. Over the queries where C(q) is not empty:

    attention   sum of A[q, k] over C(q)
    own_logit   sum over C(q) of A[q, k] (v_k W_O) (u_x - mean u) / s_q     u: column of W_U, s_q: size the last norm divides by
    effect      log p(x) with the head's output replaced by its mean, minus log p(x) as it is (nats)

A copy-suppression head has attention above its null, an own_logit below 0 and an effect above 0; a copying head, own_logit
above and effect below. The effect is total: heads on which later ones depend have one too, whatever they attend to. Nulls: the
same with another query's x of the same sequence, out of those that occur (``effect``: log p of that other token).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.captures import capture
from workbench.errors import Refused
from workbench.models.protocol import Model, Tokens
from workbench.mods import Mod
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import bundled
from workbench.probes.heads.kinds import identities
from workbench.probes.heads.repeats import repeats, task_words
from workbench.probes.heads.weights import Unembedding, grouped, head_weights, unembedding, weight_layers
from workbench.probes.sources import prompts_of, real_mean
from workbench.probes.tables import HeadTable
from workbench.sites import Site

UNITS = {"attention": "mean attention mass", "own_logit": "logits", "effect": "nats"}
_CHUNK = 2**24


@torch.no_grad()
def copy_suppression(
    model: Model,
    inputs: Any = None,
    *,
    sequences: int = 8,
    period: tuple[int, int] = (12, 24),
    words: Sequence[int | str] | None = None,
    cause: bool = True,
    layers: Sequence[int] | None = None,
    per: str = "query",
    seed: int = 0,
) -> HeadTable:
    """``attention``, ``own_logit`` and ``effect`` of every head with their nulls and intervals over sequences.

    ``inputs``: what ``model.run`` takes; without it, ``sequences`` rows of random tokens repeated after a random period (see
    ``head_scores``), where a model with induction heads predicts tokens that stand in the text. ``cause=False`` leaves out the
    effect, which costs a run per head. ``per``: ``query`` heads, or ``kv`` / ``kv-max`` for the mean / largest of heads that
    share keys and values. Layers whose weights or maps are not known are left out. NaN where no prediction stands in the text.
    The divisor of a norm between W_O and the stream, where a model has one, is left out of ``own_logit``.
    """
    if layers is None:
        known, undefined = weight_layers(model)
        chosen = list(known)
    else:
        chosen, undefined = list(layers), {}
    out = unembedding(model)
    if inputs is None:
        generator = torch.Generator().manual_seed(seed)
        words = task_words(model) if words is None else words
        inputs = next(repeats(model, 1, sequences, period, generator, words))[0]
    inputs = prompts_of(inputs)
    last = model.shape.layers - 1
    sites = [Site(kind, layer) for layer in chosen for kind in ("resid_pre", "v", *(["z"] if cause else []))]
    run = model.run(inputs, [*sites, Site("resid_post", last)], maps=capture(layers=chosen))
    if run.logits is None or run.logits.shape[1] != run.tokens.ids.shape[1]:
        raise Refused(f"{model.name}: copy suppression needs logits of every token")
    size = out.size(run.acts[Site("resid_post", last)])
    plain = run.logits.float().log_softmax(-1)
    each: dict[str, dict[int | str, Tensor]] = {}
    nulls: dict[str, dict[int | str, Tensor]] = {}
    found_any = False
    for layer in chosen:
        predicted = _predictions(out, run.acts[Site("resid_pre", layer)], run.tokens)
        queries = predicted >= 0
        found_any = found_any or bool(queries.any())
        other = _exchanged(predicted)
        weights = head_weights(model, layer)
        v = run.acts[Site("v", layer)].transpose(1, 2)  # [B, G, K, E]
        own = _own(v[:, weights.groups], weights.o, out, run.tokens.ids)
        amap = run.maps[layer]
        numbers: dict[str, list[Tensor]] = {"attention": [], "own_logit": []}
        for target in (predicted, other):
            seek = _occurrences(target, run.tokens)
            numbers["attention"].append(real_mean(amap.mass(seek), target >= 0))
            lowered = amap.mass(_weighted(seek, own)) / size[:, None].to(own)
            numbers["own_logit"].append(real_mean(lowered, target >= 0))
        if cause:
            numbers["effect"] = [
                torch.stack(parts, 1)
                for parts in zip(
                    *(
                        _effect(model, inputs, run, Site("z", layer, head), plain, (predicted, other))
                        for head in range(len(weights.q))
                    ),
                    strict=True,
                )
            ]
        for name, parts in numbers.items():
            for store, part in zip((each, nulls), parts, strict=True):
                store.setdefault(name, {})[layer] = grouped(part, len(weights.k), per)
    if not found_any:
        undefined["attention"] = "the model predicts no token that stands in the text: there is nothing to suppress"
    units = {name: UNITS[name] for name in each}
    return HeadTable.averaged(
        "Copy suppression", each, units, null=nulls, undefined=undefined, provenance=run.provenance
    )


def _predictions(out: Unembedding, stream: Tensor, tokens: Tokens) -> Tensor:
    """The token that the stream predicts at every real query ``[B, T]``, -1 where it does not stand in the text by then."""
    ids = _candidates(tokens)
    b, t = ids.shape
    best = torch.empty(b, t, dtype=torch.long)
    step = max(1, _CHUNK // max(1, b * out.matrix.shape[1]))
    for lo in range(0, t, step):
        best[:, lo : lo + step] = out.logits(stream[:, lo : lo + step]).argmax(-1).cpu()
    occurs = torch.zeros(b, t, dtype=torch.bool)
    for lo in range(0, t, 512):
        hi = min(t, lo + 512)
        earlier = torch.arange(t) < torch.arange(lo, hi)[:, None]
        occurs[:, lo:hi] = ((best[:, lo:hi, None] == ids[:, None, :]) & earlier).any(-1)
    return torch.where(occurs & tokens.mask.cpu(), best, -1)


def _candidates(tokens: Tokens) -> Tensor:
    """Token ids, -1 on padding and on the first real token of each row."""
    ids = identities(tokens)
    return ids.scatter(1, (ids >= 0).int().argmax(1, keepdim=True), -1)


def _exchanged(predicted: Tensor) -> Tensor:
    """Another query's prediction in the place of each, half way around those of the sequence; -1 where it is the same one."""
    other = torch.full_like(predicted, -1)
    for row, source in zip(other, predicted, strict=True):
        places = (source >= 0).nonzero()[:, 0]
        row[places] = source[places.roll(max(1, len(places) // 2))]
    return torch.where(other == predicted, -1, other)


def _occurrences(target: Tensor, tokens: Tokens) -> Mod:
    ids = _candidates(tokens)

    def mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        wanted = target.to(q.device)[b, q]
        return (ids.to(q.device)[b, k] == wanted) & (wanted >= 0) & (k < q)

    return mod


def _weighted(condition: Mod, weights: Tensor) -> Mod:
    """A condition on pairs times a weight per head and key ``[B, H, K]``."""
    return lambda b, h, q, k: condition(b, h, q, k) * weights.to(q.device)[b, h, k]


def _own(v: Tensor, o: Tensor, out: Unembedding, ids: Tensor) -> Tensor:
    """What each key's value ``[B, H, K, E]`` adds to the logit of the key's own token, ``[B, H, K]``, before the last norm
    divides."""
    columns = out.matrix.T[ids.to(out.matrix.device)].to(v.dtype)
    return (v * torch.einsum("hed,bkd->bhke", o, columns)).sum(-1)


def _effect(
    model: Model, inputs: Any, run: Any, site: Site, plain: Tensor, targets: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Change of log p of each query's target without the head, mean over queries, ``[B]`` for each of ``targets``."""
    z = run.acts[site]
    mean = z[run.tokens.mask.to(z.device)].mean(0)
    logits = model.run(inputs, edit={site: lambda x: mean.to(x.dtype).expand_as(x)}).logits
    assert logits is not None
    change = logits.float().log_softmax(-1) - plain
    found = []
    for target in targets:
        picked = change.gather(-1, target.clamp(min=0)[..., None].to(change.device))[..., 0]
        found.append(real_mean(picked[:, None], target >= 0)[:, 0])
    return tuple(found)


ANALYSES = (
    Analysis(
        name="copy-suppression",
        question="Which heads hold back a token that the model is about to repeat?",
        function=copy_suppression,
        example=lambda: {"model": bundled("tiny-softmax"), "sequences": 4, "period": (8, 8), "layers": (1, 3)},
        paper="McDougall et al. 2023 (arXiv 2310.04625), sections 2 and 3",
        source="model",
        null="another token that the model predicts in the same text",
        cause="the head's output replaced by its mean, the change of log p of the token",
        definition="the predicted token is the largest logit of the stream before the layer, through the last norm and W_U",
    ),
)
