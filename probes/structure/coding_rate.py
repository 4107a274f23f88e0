"""Are tokens compressed and made sparse from layer to layer?

The two quantities that white-box transformers are built to lower (Yu et al., arXiv 2306.01129; CRATE): the coding rate
of the tokens in the heads' subspaces U_h,

    R^c = 1/2 sum_h log det(I + p / (m eps) W_h^T W_h),     W_h = Z U_h   [m, p],     eps = 0.01,

with Z the m tokens of a text normalised to length 1, and the sparsity, the share of non-zero entries after one step of
ISTA. Both should fall with depth in a network that compresses; ordinary transformers need not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workbench.errors import Refused, WorkbenchError
from workbench.models.protocol import Model
from workbench.probes.bootstrap import interval
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import SENTENCE, bundled
from workbench.probes.heads.weights import weight_layers
from workbench.probes.sources import prompts_of
from workbench.probes.tables import LayerTable

EPSILON = 0.01


def coding_rate(tokens: Tensor, subspaces: Tensor, epsilon: float = EPSILON) -> Tensor:
    """R^c in nats of tokens ``[..., m, D]`` in the subspaces ``[H, D, p]`` (orthonormal columns), ``[...]``;
    differentiable.

    Tokens are normalised to length 1. The closed form for m tokens spread evenly over the p axes of one of them is
    p/2 log(1 + 1/eps).
    """
    if tokens.ndim < 2 or subspaces.ndim != 3 or tokens.shape[-1] != subspaces.shape[1]:
        raise WorkbenchError(
            f"tokens are [..., m, D] and subspaces [H, D, p]; got {list(tokens.shape)} and {list(subspaces.shape)}"
        )
    if not epsilon > 0:
        raise WorkbenchError(f"epsilon is positive; got {epsilon}")
    z = torch.nn.functional.normalize(tokens, dim=-1)
    w = torch.einsum("...md,hdp->...hmp", z, subspaces.to(z))
    m, p = w.shape[-2:]
    gram = p / (m * epsilon) * w.transpose(-1, -2) @ w + torch.eye(p, dtype=w.dtype, device=w.device)
    return 0.5 * torch.linalg.slogdet(gram).logabsdet.sum(-1)


def ista_sparsity(tokens: Tensor, dictionary: Tensor, step: float = 0.1, penalty: float = 0.1) -> Tensor:
    """Share of non-zero entries of ReLU(z + step D^T (z - D z) - step penalty), tokens z ``[..., m, D]`` as rows,
    ``dictionary`` D ``[D, D]``; the published step and penalty. ``[...]``."""
    if dictionary.shape != (tokens.shape[-1], tokens.shape[-1]):
        raise WorkbenchError(f"the dictionary is [D, D] with D={tokens.shape[-1]}; got {list(dictionary.shape)}")
    d = dictionary.to(tokens)
    found = torch.relu(tokens + step * (tokens - tokens @ d.T) @ d - step * penalty)
    return (found > 0).double().mean((-1, -2))


@torch.no_grad()
def coding_rates(model: Model, inputs: Any, *, epsilon: float = EPSILON, seed: int = 0) -> LayerTable:
    """Coding rate and sparsity of the stream after every layer, with intervals over texts.

    The subspaces of a layer are the row spaces that its values read, W_V of each head orthonormalised; those of the
    last layer serve all layers, so that the rate can be compared from layer to layer. The null has random subspaces of
    the same size. ``sparsity`` is the share of active units of the MLP where the model has one with a ReLU-like
    activation (entries above 0 of ``hook_post``); it is NaN elsewhere. Padding does not count.
    """
    weights, _ = weight_layers(model)
    last = weights[max(weights)].v.double()
    spaces = torch.linalg.qr(last).Q
    generator = torch.Generator().manual_seed(seed)
    blind = torch.linalg.qr(torch.randn(spaces.shape, generator=generator, dtype=torch.float64)).Q
    known = set(model.manifest().sites)
    layers = range(model.shape.layers)
    streams = [f"blocks.{layer}.hook_resid_post" for layer in layers]
    posts = [site for layer in layers if (site := f"blocks.{layer}.mlp.hook_post") in known]
    if not set(streams) <= known:
        raise Refused(f"{model.name} does not serve hook_resid_post of its layers")
    run = model.run(prompts_of(inputs), read=[*streams, *posts], logits=None)
    rows = [m.nonzero()[:, 0] for m in run.tokens.mask.cpu()]
    rate, null, sparse = ([] for _ in range(3))
    for layer in layers:
        texts = [run.acts[streams[layer]][b, kept].double().cpu() for b, kept in enumerate(rows)]
        rate.append(torch.stack([coding_rate(text, spaces, epsilon) for text in texts]))
        null.append(torch.stack([coding_rate(text, blind, epsilon) for text in texts]))
        site = f"blocks.{layer}.mlp.hook_post"
        units = (
            [(run.acts[site][b, kept] > 0).double().mean().cpu() for b, kept in enumerate(rows)]
            if site in posts
            else []
        )
        sparse.append(torch.stack(units) if units else torch.full((len(rows),), float("nan"), dtype=torch.float64))
    each = {"rate": torch.stack(rate), "sparsity": torch.stack(sparse)}
    spans = {name: interval(values.T) for name, values in each.items()}
    return LayerTable(
        "Coding rate",
        tuple(layers),
        {name: values.mean(1) for name, values in each.items()},
        {"rate": "nats", "sparsity": "share of active units"},
        {name: span[0] for name, span in spans.items()},
        {name: span[1] for name, span in spans.items()},
        {"rate": torch.stack(null).mean(1)},
        provenance=run.provenance,
    )


ANALYSES = (
    Analysis(
        name="coding-rates",
        question="Are tokens compressed and made sparse from layer to layer?",
        function=coding_rates,
        example=lambda: {"model": bundled(), "inputs": [SENTENCE]},
        paper="Yu et al. 2023 (arXiv 2306.01129)",
        source="model",
        null="random subspaces of the same size",
        definition="outside of CRATE: subspaces are what the values of the last layer read, sparsity is that of MLP units; "
        "tokens have length 1 before they are projected, in the authors' script after it",
    ),
)
