"""First- and current-token scores, and scores per group of heads that share keys and values."""

import pytest
import torch

from workbench.errors import UnknownName
from workbench.maps import AttentionMap
from workbench.models.protocol import Tokens
from workbench.probes.examples import random_rows
from workbench.probes.heads.kinds import KINDS, head_scores
from workbench.run import Maps, Provenance, Run

IDS = torch.tensor([[0, 5, 2, 5, 3, 2, 5, 4]])


def run_of(amap, ids=IDS, mask=None):
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    return Run(Tokens(ids, real), maps=Maps({0: amap}), provenance=Provenance("by hand"))


def test_first_and_current_are_the_column_and_the_diagonal():
    rows = random_rows(1, 2, 8)
    found = head_scores(run_of(AttentionMap.from_dense(rows)), kinds=("first", "current"))
    assert found.value[0][0].tolist() == pytest.approx(rows[0, :, 1:, 0].mean(1).tolist())
    assert found.value[0][1].tolist() == pytest.approx(rows[0].diagonal(dim1=1, dim2=2).mean(1).tolist())
    assert found.uniform[0][0, 0] == pytest.approx(sum(1 / (q + 1) for q in range(1, 8)) / 7)
    eye = torch.eye(8, dtype=torch.float64)[None, None]
    current = head_scores(run_of(AttentionMap.from_dense(eye)), kinds="current")
    assert current.value[0].item() == 1
    assert current.null[0].item() == 0


def test_the_first_token_is_the_first_real_one():
    rows = torch.zeros(1, 1, 11, 11, dtype=torch.float64)
    rows[:, :, 3:, 3] = 1
    ids = torch.cat([torch.zeros(1, 3, dtype=torch.long), IDS], 1)
    found = head_scores(run_of(AttentionMap.from_dense(rows), ids, torch.arange(11)[None] >= 3), kinds="first")
    assert found.value[0].item() == 1
    assert found.null[0].item() < 0.7


@pytest.mark.parametrize("kind", KINDS)
def test_heads_of_a_group_are_averaged_or_the_best_is_taken(kind):
    rows = random_rows(3, 4, 8, seed=2)
    run = run_of(AttentionMap.from_dense(rows, kv_heads=2), IDS.repeat(3, 1))
    each, mean, best = (head_scores(run, kinds=kind, per=per) for per in ("query", "kv", "kv-max"))
    torch.testing.assert_close(mean.value[0][0], each.value[0][0].view(2, 2).mean(1))
    torch.testing.assert_close(mean.null[0][0], each.null[0][0].view(2, 2).mean(1))
    assert (best.value[0][0] >= each.value[0][0].view(2, 2).amax(1) - 1e-12).all()
    assert best.null[0].sum() > mean.null[0].sum()
    assert len(best.frame()) == 2
    # one sequence: the largest mean is the mean of the largest
    one = run_of(AttentionMap.from_dense(rows[:1], kv_heads=2))
    single, group = (head_scores(one, kinds=kind, per=per).value[0][0] for per in ("query", "kv-max"))
    torch.testing.assert_close(group, single.view(2, 2).amax(1))


def test_an_unknown_grouping_is_refused():
    with pytest.raises(UnknownName, match="query, kv, kv-max"):
        head_scores(run_of(AttentionMap.from_dense(random_rows(1, 2, 8))), per="layer")
