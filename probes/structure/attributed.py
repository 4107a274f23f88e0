"""Through which tokens does the attention lead that this output depends on?

Attribution-weighted rollout (Chefer et al., arXiv 2103.15679, for self-attention): the weights of every head are
multiplied by the gradient of the output with respect to them, only what speaks for the output is kept, and layers are
accumulated,

    Abar_l = mean_h max(0, A o dm/dA),     R <- R + Abar_l R,     R = I at the start.

Row q of R - I is the relevance of the input tokens to what happens at q.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.errors import Refused, WorkbenchError
from workbench.models.protocol import Edit, Model
from workbench.pairs import Pairs, logit_difference
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import bundled, needles
from workbench.probes.hidden_keys import without_keys
from workbench.probes.tables import TokenTable
from workbench.sites import Site


def attributed_rollout(model: Model, pairs: Pairs, *, seed: int = 0) -> TokenTable:
    """Relevance of every token of the clean prompts to the logit difference of the answer, ``[B, T]``.

    The null multiplies with gradients of a random logit instead. Read at the answer's position. Needs a model whose
    pattern can be edited: native softmax mixers, Hugging Face models in eager attention.
    """
    generator = torch.Generator().manual_seed(seed)
    vocab = model.shape.vocab
    if vocab is None or len(pairs) == 0:
        raise Refused(f"{model.name} has no logits to attribute" if vocab is None else "there are no pairs")
    other = torch.randint(vocab, (len(pairs), 1), generator=generator)
    random = Pairs(pairs.clean, pairs.corrupt, other, pairs.wrong, pairs.position, pairs.spans)
    found, null = (_relevance(model, wanted) for wanted in (pairs, random))
    names = model.tokenizer.convert_ids_to_tokens if model.tokenizer is not None else None
    tokens = tuple(tuple(map(str, names(row))) for row in pairs.clean.tolist()) if names else ()
    with torch.no_grad():
        provenance = model.run(pairs.clean[:1]).provenance
    return TokenTable(
        "Attribution-weighted rollout", {"relevance": found}, {"relevance": "relevance"}, tokens, null={"relevance": null},
        provenance=provenance,
    )  # fmt: skip


@torch.no_grad()
def erased(
    model: Model, pairs: Pairs, relevance: Tensor, count: int, *, random: int = 8, seed: int = 0
) -> dict[str, float]:
    """Mean KL divergence in nats of the answer's prediction when the ``count`` most relevant tokens of each prompt are
    hidden from all queries, and when as many random ones are (mean over ``random`` draws). The last token and the first
    are never hidden."""
    length = pairs.clean.shape[1]
    if relevance.shape != pairs.clean.shape or not 0 < count < length - 2:
        raise WorkbenchError(
            f"relevance is [B, T] = {list(pairs.clean.shape)}, count below {length - 2}; got {list(relevance.shape)}, {count}"
        )
    plain = model.run(pairs.clean)
    generator = torch.Generator().manual_seed(seed)
    spared = (torch.arange(length) == 0) | (torch.arange(length) == pairs.position[:, None])

    def moved(order: Tensor) -> float:
        hidden = order.masked_fill(spared, float("-inf")).argsort(dim=1, descending=True).argsort(dim=1) < count

        def edit(pattern: Tensor) -> Tensor:
            return without_keys(pattern, ~hidden[:, None, None])

        edits: dict[Site | str, Edit | Tensor] = {Site("pattern", layer): edit for layer in range(model.shape.layers)}
        run = model.run(pairs.clean, edit=edits)
        assert run.logits is not None
        assert plain.logits is not None
        rows = torch.arange(len(pairs))
        ends = [x.logits[rows, pairs.position] for x in (run, plain) if x.logits is not None]
        logp, want = (x.double().log_softmax(-1) for x in ends)
        return float((want.exp() * (want - logp)).sum(-1).mean())

    noise = [moved(torch.rand(relevance.shape, generator=generator)) for _ in range(random)]
    return {"relevant": moved(relevance.double()), "random": sum(noise) / len(noise)}


def _relevance(model: Model, pairs: Pairs) -> Tensor:
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def watch(layer: int) -> Edit:
        def edit(pattern: Tensor) -> Tensor:
            nothing = torch.zeros_like(pattern, requires_grad=True)
            seen[layer] = (pattern.detach(), nothing)
            return pattern + nothing

        return edit

    edits: dict[Site | str, Edit | Tensor] = {
        Site("pattern", layer): watch(layer) for layer in range(model.shape.layers)
    }
    with torch.enable_grad():
        run = model.run(pairs.clean, edit=edits)
        if run.logits is None:
            raise Refused(f"{model.name} gives no logits to attribute")
        total = logit_difference(run.logits.float(), pairs).sum()
        layers = sorted(seen)
        grads = torch.autograd.grad(total, [seen[layer][1] for layer in layers])
    b, length = pairs.clean.shape
    relevance = torch.eye(length, dtype=torch.float64).repeat(b, 1, 1)
    for layer, grad in zip(layers, grads, strict=True):
        weight = (seen[layer][0].double() * grad.double()).clamp(min=0).mean(1).cpu()
        relevance = relevance + weight @ relevance
    start = torch.eye(length, dtype=torch.float64)
    rows = torch.arange(b)
    return (relevance - start)[rows, pairs.position]


ANALYSES = (
    Analysis(
        name="attributed-rollout",
        question="Through which tokens does the attention lead that this output depends on?",
        function=attributed_rollout,
        example=lambda: {"model": bundled(), "pairs": needles(bundled(), n=2)},
        paper="Chefer et al. 2021 (arXiv 2103.15679), section 3",
        source="model",
        null="the gradient of a random logit",
        cause="workbench.probes.structure.attributed.erased",
    ),
)
