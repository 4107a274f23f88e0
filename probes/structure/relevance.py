"""Which input tokens, layers and heads does a logit come from?

Layer-wise relevance propagation through a transformer, as gradient times input with a changed backward pass: AttnLRP
(Achtibat et al., arXiv 2402.05602) and RelP (Jafari et al., arXiv 2508.21258); ``relevance_rules.py`` has the rules. With
x the residual stream before the first layer,

    R[b, t] = sum_d x[b, t, d] d logit[b] / d x[b, t, d].

In ``relp`` the logit is linear in x once norms, secants and patterns are given, so that relevances sum to the logit but for
what biases add. In ``attnlrp`` the softmax's gradient does not conserve; ``conserved`` says what is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from workbench.errors import Refused, WorkbenchError
from workbench.models.protocol import Edit, Model
from workbench.pairs import Pairs
from workbench.probes.ablation import AblationCurve
from workbench.probes.bootstrap import interval
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import bundled, needles
from workbench.probes.heads.weights import embedding
from workbench.probes.sources import prompts_of
from workbench.probes.structure.relevance_rules import propagating
from workbench.probes.tables import HeadTable, TokenTable
from workbench.run import Run
from workbench.sites import Site


@dataclass(frozen=True)
class Relevance(TokenTable):
    """``relevance`` ``[B, T]`` of every input token in logits, positive where it speaks for the target, and by plain
    ``gradient`` times input; NaN on padding. The null is the relevance to a random token's logit.

    ``by_layer`` ``[L, B, T]``: of the residual stream before each layer. ``heads``: of each head's z, summed over tokens, mean
    over texts with a 95% interval. ``logit`` ``[B]`` is what was explained, ``conserved`` ``[B]`` the sum of relevances as a
    share of it, NaN where the logit is 0. ``position`` ``[B]``: where the logit was read."""

    rule: str = ""
    logit: Tensor = field(default_factory=lambda: torch.empty(0))
    conserved: Tensor = field(default_factory=lambda: torch.empty(0))
    by_layer: Tensor = field(default_factory=lambda: torch.empty(0))
    position: Tensor = field(default_factory=lambda: torch.empty(0))
    heads: HeadTable | None = None


def relevance(
    model: Model,
    inputs: Any,
    target: int | Sequence[int] | Tensor | None = None,
    *,
    position: int | Sequence[int] | Tensor | None = None,
    rule: str = "attnlrp",
    seed: int = 0,
) -> Relevance:
    """Relevance of every token to a logit, with that of layers and heads.

    ``inputs``: ``Pairs`` (their clean prompts; what is explained is the logit difference of the answer), or what ``model.run``
    takes. ``target``: the token whose logit is explained, one or one per text, by default the most likely one. ``position``:
    where it is predicted, by default at the last real token. ``rule``: ``attnlrp``, ``relp`` or ``gradient``. Positions that
    are added to the embedding count as part of the token. Which models there are rules for: ``propagating``.
    """
    found = _propagated(model, inputs, target, position, rule, seed)
    plain = found if rule == "gradient" else _propagated(model, inputs, target, position, "gradient", seed)
    run, mask = found.run, found.run.tokens.mask.cpu()
    padded = ~mask

    def tokens(parts: Tensor) -> Tensor:
        return parts.masked_fill(padded, float("nan"))

    values, null = {"relevance": tokens(found.streams[0])}, {"relevance": tokens(found.null[0])}
    if rule != "gradient":
        values["gradient"], null["gradient"] = tokens(plain.streams[0]), tokens(plain.null[0])
    undefined = {"padding": "padding has no relevance"} if bool(padded.any()) else {}
    if bool((found.logit == 0).any()):
        undefined["conserved"] = "a share of a logit of 0"
    total = found.streams[0].sum(1)
    low, high = interval(found.heads.transpose(0, 1))
    layers = range(model.shape.layers)
    heads = HeadTable(
        f"Relevance of heads ({rule})",
        {"relevance": {layer: found.heads[layer].mean(0) for layer in layers}},
        {"relevance": "logits"},
        {"relevance": {layer: low[layer] for layer in layers}},
        {"relevance": {layer: high[layer] for layer in layers}},
        {"relevance": {layer: found.head_null[layer].mean(0) for layer in layers}},
        provenance=run.provenance,
    )
    return Relevance(
        f"Relevance of tokens ({rule})",
        values,
        dict.fromkeys(values, "logits"),
        run.tokens.labels,
        null=null,
        undefined=undefined,
        provenance=run.provenance,
        rule=rule,
        logit=found.logit,
        conserved=torch.where(found.logit == 0, float("nan"), total / found.logit),
        by_layer=tokens(found.streams),
        position=found.position,
        heads=heads,
    )


@torch.no_grad()
def deletion_curve(
    model: Model,
    inputs: Any,
    weight: Tensor,
    target: int | Sequence[int] | Tensor | None = None,
    *,
    position: int | Sequence[int] | Tensor | None = None,
    counts: Sequence[int] = (1, 2, 4, 8),
    random: int = 8,
    seed: int = 0,
) -> AblationCurve:
    """The explained logit as the tokens of largest ``weight`` ``[B, T]`` lose their word, and as random ones do.

    A token loses its word when its embedding becomes the mean embedding of the vocabulary; it keeps its place. The token at
    ``position`` and padding are never taken, undefined weights come last. Other arguments as in ``relevance``.
    """
    run = model.run(prompts_of(inputs))
    seek = _Target.of(model, run, inputs, target, position)
    mask = run.tokens.mask.cpu()
    free = mask & (torch.arange(mask.shape[1]) != seek.position[:, None])
    weight = torch.as_tensor(weight).detach().cpu().double()
    if weight.shape != mask.shape:
        raise WorkbenchError(f"weight is one number per token, {list(mask.shape)}; got {list(weight.shape)}")
    most = int(free.sum(1).min())
    if not counts or min(counts) < 1 or max(counts) > most or random < 1:
        raise WorkbenchError(
            f"counts lie between 1 and the {most} tokens that can go, and random is 1 or more; got {list(counts)}, {random}"
        )
    mean = embedding(model).mean(0)
    generator = torch.Generator().manual_seed(seed)

    def left(order: Tensor) -> Tensor:
        ranks = order.masked_fill(~free, float("-inf")).argsort(dim=1, descending=True, stable=True).argsort(1)
        rows = []
        for count in counts:
            gone = (ranks < count)[..., None]

            def edit(x: Tensor, gone: Tensor = gone) -> Tensor:
                return torch.where(gone.to(x.device), mean.to(x), x)

            rows.append(seek.read(model.run(run.tokens, edit={Site("embed"): edit})))
        return torch.stack(rows)

    ranked = left(weight.nan_to_num(nan=-1e300, neginf=-1e300))
    drawn = torch.stack([left(torch.rand(weight.shape, generator=generator)) for _ in range(random)])
    return AblationCurve(
        "logit difference" if isinstance(inputs, Pairs) else "logit",
        "tokens lose their word",
        tuple(counts),
        seek.read(run),
        ranked,
        drawn,
        tuple(f"token ranked {i + 1}" for i in range(max(counts))),
        run.provenance,
    )


@dataclass(frozen=True)
class _Target:
    """A logit or a difference of logits: ``weights`` ``[B, V]`` over the logits at ``position`` ``[B]``; ``first`` ``[B]`` is
    one token of it."""

    weights: Tensor
    position: Tensor
    first: Tensor

    @classmethod
    def of(cls, model: Model, run: Run, inputs: Any, target: Any, position: Any) -> _Target:
        if run.logits is None or run.logits.ndim != 3:
            raise Refused(f"{model.name} has no logits of tokens to explain")
        mask = run.tokens.mask.cpu()
        batch, vocab = len(mask), run.logits.shape[-1]
        if isinstance(inputs, Pairs):
            if target is not None or position is not None:
                raise WorkbenchError(
                    "pairs say what is explained and where; give inputs=pairs.clean with a target of your own"
                )
            weights = torch.zeros(batch, vocab, dtype=torch.float64)
            for ids, sign in ((inputs.answer, 1.0), (inputs.wrong, -1.0)):
                given = (ids >= 0).double()
                weights.scatter_add_(1, ids.clamp(min=0), sign * given / given.sum(1, keepdim=True).clamp(min=1))
            return cls(weights, inputs.position, inputs.answer[:, 0])
        last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
        at = last if position is None else torch.as_tensor(position).expand(batch)
        if bool((at < 0).any()) or bool((at >= mask.shape[1]).any()) or not bool(mask[torch.arange(batch), at].all()):
            raise WorkbenchError(
                f"position is that of a real token of each text, from 0 to {last.tolist()}; got {at.tolist()}"
            )
        best = run.logits.detach()[torch.arange(batch), at.to(run.logits.device)].argmax(-1).cpu()
        token = best if target is None else torch.as_tensor(target).expand(batch)
        if bool((token < 0).any()) or bool((token >= vocab).any()):
            raise WorkbenchError(f"target is a token of the vocabulary, 0 to {vocab - 1}; got {token.tolist()}")
        return cls(torch.nn.functional.one_hot(token, vocab).double(), at, token)

    def read(self, run: Run) -> Tensor:
        """What is explained, ``[B]`` in float64."""
        assert run.logits is not None
        device = run.logits.device
        at = run.logits[torch.arange(len(self.position), device=device), self.position.to(device)]
        return (at.double() * self.weights.to(device)).sum(-1).cpu()

    def random(self, seed: int) -> _Target:
        """The same with another token, drawn from the rest of the vocabulary, in the place of the target or of the answers."""
        vocab = self.weights.shape[1]
        step = torch.randint(1, vocab, (len(self.first),), generator=torch.Generator().manual_seed(seed))
        weights = self.weights.clamp(max=0)
        weights = weights + torch.nn.functional.one_hot((self.first + step) % vocab, vocab)
        return _Target(weights, self.position, self.first)


@dataclass(frozen=True)
class _Propagated:
    """``streams`` ``[L, B, T]`` and ``heads`` ``[L, B, H]`` of the target, ``null`` and ``head_null`` of a random one."""

    run: Run
    logit: Tensor
    position: Tensor
    streams: Tensor
    heads: Tensor
    null: Tensor
    head_null: Tensor


def _propagated(model: Model, inputs: Any, target: Any, position: Any, rule: str, seed: int) -> _Propagated:
    layers = range(model.shape.layers)
    seen: dict[Site | str, Tensor] = {}

    def watch(site: Site) -> Edit:
        def edit(x: Tensor) -> Tensor:
            # The graph starts here, so that models whose weights take no gradients serve too.
            seen[site] = x.detach().requires_grad_() if site == Site("resid_pre", 0) else x
            return seen[site]

        return edit

    watched = [Site(kind, layer) for kind in ("resid_pre", "z") for layer in layers]
    with torch.enable_grad(), propagating(model, rule) as edits:
        run = model.run(prompts_of(inputs), edit={**edits, **{site: watch(site) for site in watched}})
        seek = _Target.of(model, run, inputs, target, position)
        logit = seek.read(run)
        wanted = [seen[site] for site in watched]
        grads = torch.autograd.grad(logit.sum(), wanted, retain_graph=True)
        other = torch.autograd.grad(seek.random(seed).read(run).sum(), wanted)
    count = len(layers)
    parts = []
    for found in (grads, other):
        shares = [(x.detach().double() * grad.double()).cpu() for x, grad in zip(wanted, found, strict=True)]
        parts.append(torch.stack([share.sum(-1) for share in shares[:count]]))
        parts.append(torch.stack([share.sum((1, 3)) for share in shares[count:]]))
    plain = Run(run.tokens, provenance=run.provenance)
    return _Propagated(plain, logit.detach(), seek.position, *parts)


def _example() -> dict[str, Any]:
    model = bundled()
    return {"model": model, "inputs": needles(model, n=2)}


ANALYSES = (
    Analysis(
        name="relevance",
        question="Which input tokens, layers and heads does a logit come from?",
        function=relevance,
        example=_example,
        paper="Achtibat et al. 2024 (arXiv 2402.05602), section 3; Jafari et al. 2025 (arXiv 2508.21258)",
        source="model",
        null="the relevance to the logit of a random token",
        cause="workbench.probes.structure.relevance.deletion_curve",
        definition="a gate on heads is taken as given; positions added to the embedding count as part of the token",
    ),
)
