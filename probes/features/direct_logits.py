"""What a feature says to the logits on the direct path, and through which heads it writes.

A row d of the decoder, in the stream (for z through W_O: sum over heads of d[head slice] W_O[head]), times W_U with the last norm
folded in: the change of each logit, relative to the mean logit, for one unit of activation and a stream that the last norm leaves
as large as it is. Layers in between are not passed; features of early layers may act otherwise.

Heads of a feature of concatenated z: |d[head slice]| / sum over heads (Kissane et al., arXiv 2406.17759).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.errors import Refused, WorkbenchError
from workbench.models.protocol import Model
from workbench.probes.features.reading import check_features
from workbench.probes.heads.weights import head_weights, unembedding
from workbench.sites import Site

if TYPE_CHECKING:
    from workbench.coders.coder import Coder

_STREAM = ("embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")


@dataclass(frozen=True)
class DirectLogits:
    """The tokens that each feature raises and lowers most: ids and changes ``[S, K]``, strongest first."""

    top: Tensor
    top_values: Tensor
    bottom: Tensor
    bottom_values: Tensor


@torch.no_grad()
def direct_logits(
    coder: Coder, model: Model, site: Site | str, features: Sequence[int] | Tensor, *, count: int = 10
) -> DirectLogits:
    """Top and bottom tokens of the decoder rows of ``features``, which write at ``site`` (of several written sites the last).

    Refused: sites that do not write to the stream, models without a W_U or W_O that is known.
    """
    where = Site.parse(site)
    rows = stream_rows(coder, model, where, features)
    matrix = unembedding(model).matrix
    count = min(count, matrix.shape[1])
    if count < 1:
        raise WorkbenchError(f"at least one token is named; got count={count}")
    tops, bottoms = [], []
    for part in rows.split(64):
        change = part.to(matrix) @ matrix
        tops.append(change.topk(count))
        bottoms.append(change.topk(count, largest=False))
    return DirectLogits(
        torch.cat([t.indices for t in tops]).cpu(),
        torch.cat([t.values for t in tops]).cpu(),
        torch.cat([b.indices for b in bottoms]).cpu(),
        torch.cat([b.values for b in bottoms]).cpu(),
    )


@torch.no_grad()
def stream_rows(coder: Coder, model: Model, site: Site, features: Sequence[int] | Tensor) -> Tensor:
    """Decoder rows of ``features`` as directions of the stream, ``[S, D]``."""
    chosen = check_features(features, coder.features)
    rows = coder.W_dec.detach()[chosen].split(list(coder.writes), dim=1)[-1]
    if site.kind in _STREAM and site.head is None:
        return rows
    if site.kind == "z" and site.layer is not None:
        out = head_weights(model, site.layer).o
        out = out if site.head is None else out[site.head : site.head + 1]
        parts = rows.unflatten(1, (len(out), -1)).to(out)
        return torch.einsum("she,hed->sd", parts, out)
    raise Refused(
        f"{site} does not write to the residual stream by itself: its features have no direct path to the logits"
    )


@torch.no_grad()
def head_shares(coder: Coder, features: Sequence[int] | Tensor, heads: int) -> Tensor:
    """Share of each head in the decoder rows of ``features``, ``[S, H]``; rows sum to 1."""
    chosen = check_features(features, coder.features)
    rows = coder.W_dec.detach()[chosen]
    if heads < 1 or rows.shape[1] % heads:
        raise WorkbenchError(f"decoder rows of width {rows.shape[1]} are no {heads} heads side by side")
    norms = rows.unflatten(1, (heads, -1)).norm(dim=2)
    return norms / norms.sum(1, keepdim=True).clamp(min=torch.finfo(norms.dtype).tiny)
