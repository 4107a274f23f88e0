"""Through which features does a feature act? Indirect effects of edges between the nodes of a feature circuit.

The effect of the edge u -> d on the metric is (Marks et al., arXiv 2403.19647, eq. 5-6)

    (dm/dd) (dd/du) (u clean - u replaced)

with dm/dd the gradient that gave d its own effect, and dd/du the derivative of d's code with respect to u alone: the
gradient is stopped at every spliced site between the two. So an edge from one ``hook_resid_post`` to the next counts what
the stream carries over, and not what goes through the attention and MLP outputs that have coders of their own (the paper's
resid -> resid edges), and no path is counted twice. Errors are nodes like features, at both ends: a downstream error is
y - y_hat(y), with the gradient through both. Products are taken at each position of d and added up over the positions of u.

One backward pass per downstream node and batch gives its edges from all nodes upstream, because in a run with ``cut=True``
gradients end at the nearest sites.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.errors import Refused
from workbench.probes.features.feature_effects import Change, FeatureEffects, Sloped
from workbench.probes.features.node_gradients import Patching
from workbench.probes.features.splice import ERROR, SplicedRun, given
from workbench.sites import Site

_ENTRIES = 2**27


@dataclass(frozen=True)
class _Ends:
    """The circuit's nodes at one site in one batch. ``rows`` ``[n]``: their numbers in the circuit. ``here`` ``[B, T, n]``: the
    positions of each node's place. ``lost`` ``[B, T, n]``: clean minus replaced there, of features. ``rest`` ``[B, T, D]``: of
    the error."""

    site: Site
    rows: Tensor
    feature: Tensor
    here: Tensor
    lost: Tensor
    rest: Tensor

    def pulled(self, grad: Tensor, directions: Tensor) -> Tensor:
        """The effect ``[n]`` on a scalar with gradient ``grad`` ``[B, T, D]`` at this site."""
        known = self.feature != ERROR
        # For an error the index -1 picks some direction; it is overwritten.
        found = ((grad @ directions[self.feature].T) * self.lost).sum((0, 1))
        if not bool(known.all()):
            rest = ((grad * self.rest).sum(-1)[..., None] * self.here[..., ~known]).sum((0, 1))
            found = found.masked_scatter(~known, rest)
        return found.double().cpu()


def edge_effects(patching: Patching, batches: Sequence[Sloped], nodes: FeatureEffects) -> Tensor:
    """``[N, N + 1]`` float64: what node u (row) does through node d (column), mean over pairs; the last column is the
    metric itself.

    Into the metric: from nodes of the last site their own effect; from nodes of earlier sites the gradient at the clean run
    that reaches the metric past all later sites.
    """
    n = len(nodes)
    if n * (n + 1) > _ENTRIES:
        raise Refused(f"{n:,} nodes have {n * n:,} possible edges; raise node_threshold")
    matrix = torch.zeros(n, n + 1, dtype=torch.float64)
    for sloped in batches:
        _add(matrix, patching, sloped, nodes)
    matrix /= len(patching.setting.pairs)
    last = nodes.site == len(patching.sites) - 1
    matrix[last, n] = nodes.effect[last]
    return matrix


def _add(matrix: Tensor, patching: Patching, sloped: Sloped, nodes: FeatureEffects) -> None:
    splice, batch = patching.splice, sloped.batch
    with torch.no_grad():
        ends = [_ends(patching, sloped, nodes, number) for number in range(len(patching.sites))]
    with torch.enable_grad():
        run = splice.run(given(batch.pairs.clean, batch.mask), cut=True)
        for at, down in enumerate(ends):
            ups = [end for end in ends[:at] if len(end.rows)]
            slope = sloped.slopes[down.site]
            for j, row in enumerate(down.rows.tolist()):
                there, feature = down.here[..., j], int(down.feature[j])
                spliced = run.sites[down.site]
                if feature == ERROR:
                    total = ((spliced.left * slope.to(spliced.left)).sum(-1) * there).sum()
                else:
                    weight = slope.to(spliced.encoded) @ splice.coders[down.site].W_dec[feature].detach()
                    total = (spliced.encoded[..., feature] * weight * there).sum()
                _pull(matrix, row, total, ups, run, patching)
        whole = patching.measure(run.logits, batch.pairs).sum()
        _pull(matrix, len(nodes), whole, [end for end in ends if len(end.rows)], run, patching)


def _pull(
    matrix: Tensor, column: int, total: Tensor, ups: Sequence[_Ends], run: SplicedRun, patching: Patching
) -> None:
    """Add the effects of all nodes of ``ups`` through a scalar to its column."""
    if not ups or not total.requires_grad:
        return
    outputs = [run.sites[end.site].output for end in ups]
    grads = torch.autograd.grad(total, outputs, retain_graph=True, allow_unused=True)
    for end, grad in zip(ups, grads, strict=True):
        if grad is not None:
            directions = patching.splice.coders[end.site].W_dec.detach()
            matrix[end.rows, column] += end.pulled(grad.to(directions), directions)


def _ends(patching: Patching, sloped: Sloped, nodes: FeatureEffects, number: int) -> _Ends:
    site, batch = patching.sites[number], sloped.batch
    rows = (nodes.site == number).nonzero()[:, 0]
    clean = sloped.clean[site]
    if not len(rows):
        empty = clean.new_zeros(*clean.shape[:2], 0)
        return _Ends(site, rows, nodes.feature[rows], empty, empty, clean)
    before, after = patching.splice.coded(site, clean), sloped.codes(site)
    change = Change.of(patching, batch, site, clean, before, after)
    feature = nodes.feature[rows].to(clean.device)
    real = batch.real[..., None] & (batch.place[..., None] == nodes.place[rows])
    here = real.to(clean)
    return _Ends(site, rows, feature, here, change.features[..., feature] * here, change.error)
