"""How much attention can reach each token from a query, if no path may carry more than its weights allow?

Attention flow (Abnar and Zuidema, arXiv 2005.00928): tokens of all layers are the nodes of a graph whose edges carry at
most Abar_l[q, k] = row-normalised (1 - r) A_l + r I. The flow of an input token is the maximum flow from the query in
the last layer to that token in the input. Unlike rollout, paths share what their common edges allow.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from workbench.errors import Refused, WorkbenchError
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import random_maps
from workbench.probes.sources import Source, provenance_of
from workbench.probes.structure.rollout import placed, real_tokens_of, rollout, square_layers
from workbench.probes.tables import TokenTable
from workbench.run import Run

_UNIT = 10**7
"""Capacities are whole numbers of this part of 1: scipy's maximum flow counts in integers."""
_LIMIT = 2**29
"""Edges that all flows together may look at: half a minute."""
PADDING = "padding, and sequences without the query, have no flow"


def flow(source: Source, query: int = -1, *, residual: float = 0.5, raw: bool = False) -> TokenTable:
    """Maximum flow from a query to every input token, ``[B, T]``, beside its rollout.

    ``query`` is a position, by default the last; negative ones count back from the last real token of each sequence.
    Padding, and a sequence without such a token, are NaN. Capacities are rounded to 1e-7. Refused for signed and channel
    maps, and where one flow per token through layers x T x T edges takes more than half a minute.
    """
    layers = square_layers(source, raw)
    if not 0 <= residual < 1:
        raise WorkbenchError(f"residual is the share of the stream itself, in [0, 1); got {residual}")
    b, _, length, _ = layers[0].shape
    if not -length <= query < length:
        raise WorkbenchError(f"query is a position below {length}; got {query}")
    if len(layers) * length**3 > _LIMIT:
        raise Refused(
            f"{length} flows through the {len(layers) * length**2:,} edges of {len(layers)} layers take too long; use rollout"
        )
    steps = [residual_mean(amap.dense().detach().cpu().double().mean(1), residual) for amap in layers]
    real = real_tokens_of(source)
    found = torch.full((b, length), float("nan"), dtype=torch.float64)
    tops = placed([query], real)[:, 0].tolist()
    for i, top in enumerate(tops):
        if top >= 0 and bool(real[i, top]):
            own = real[i]
            found[i, own] = _flows([step[i][own][:, own] for step in steps], int(own[:top].sum()))
    rolled = rollout(source, queries=[query], residual=residual, raw=raw)[:, 0].masked_fill(~real, float("nan"))
    undefined = {} if bool(found.isfinite().all()) else {"flow": PADDING, "rollout": PADDING}
    tokens = source.tokens.labels if isinstance(source, Run) else ()
    units = {"flow": "attention", "rollout": "attention"}
    return TokenTable(
        f"Attention flow from token {tops[0] if len(set(tops)) == 1 else query}",
        {"flow": found, "rollout": rolled},
        units,
        tokens,
        undefined=undefined,
        provenance=provenance_of(source),
    )


def residual_mean(weights: Tensor, residual: float) -> Tensor:
    """Abar of head-mean weights ``[B, T, T]``."""
    mixed = (1 - residual) * weights + residual * torch.eye(weights.shape[-1], dtype=weights.dtype)
    return mixed / mixed.sum(-1, keepdim=True).clamp(min=1e-300)


def _flows(steps: list[Tensor], top: int) -> Tensor:
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import maximum_flow

    length, rows, columns, data = len(steps[0]), [], [], []
    for i, step in enumerate(reversed(steps)):  # from the last layer down to the input
        q, k = np.nonzero(step.numpy())
        rows.append(q + i * length)
        columns.append(k + (i + 1) * length)
        data.append(np.round(step.numpy()[q, k] * _UNIT).astype(np.int32))
    size = (len(steps) + 1) * length
    edges = np.concatenate(data), (np.concatenate(rows), np.concatenate(columns))
    graph = coo_array(edges, shape=(size, size)).tocsr()
    ends = range(size - length, size)
    return torch.tensor([maximum_flow(graph, top, end).flow_value / _UNIT for end in ends], dtype=torch.float64)


ANALYSES = (
    Analysis(
        name="flow",
        question="How much attention can reach each token from a query, path by path?",
        function=flow,
        example=lambda: {"source": random_maps(2, tokens=8)},
        paper="Abnar and Zuidema 2020 (arXiv 2005.00928)",
        source="maps",
        null="its rollout, in which paths do not share what edges allow",
    ),
)
