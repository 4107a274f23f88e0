"""Errors of maps against sums written out; held keys against the rule written out."""

import pytest
import torch

import workbench as wb
from workbench.errors import Refused, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap
from workbench.models.protocol import Tokens
from workbench.patterns.softmax import SoftmaxMap
from workbench.probes.map_errors import held_key_errors, map_error
from workbench.run import Run

GENERATOR = torch.Generator().manual_seed(0)
Q = torch.randn(1, 4, 21, 8, generator=GENERATOR, dtype=torch.float64)
K = torch.randn(1, 2, 21, 8, generator=GENERATOR, dtype=torch.float64).cumsum(2) / 4


def test_moved_mass_is_half_the_sum_of_differences() -> None:
    a, b = (torch.randn(2, 3, 9, 9, generator=GENERATOR, dtype=torch.float64).softmax(-1) for _ in range(2))
    found = map_error(AttentionMap.from_dense(a), AttentionMap.from_dense(b), size=4)
    torch.testing.assert_close(found.moved, ((a - b).abs().sum(-1) / 2).mean(0))
    torch.testing.assert_close(found.worst, (a - b).abs().amax((0, 2, 3)))
    torch.testing.assert_close(found.signed[1, 2, 0], (b - a)[:, 1, 8:, :4].sum((1, 2)).mean())
    torch.testing.assert_close(found.absolute[1, 0, 1], (b - a)[:, 1, :4, 4:8].abs().sum((1, 2)).mean())
    assert found.plot().get_ylabel() == "query block"
    with pytest.raises(WorkbenchError, match="one shape and domain"):
        map_error(AttentionMap.from_dense(a), AttentionMap.from_dense(b[:, :2]))


def test_held_keys_move_nothing_at_threshold_zero_and_more_later(tmp_path) -> None:
    run = Run(Tokens.of(torch.zeros(1, 21, dtype=torch.int64)), maps={0: SoftmaxMap(Q, K, mask=Mask(causal=True))})
    found = held_key_errors(run, (0.0, 0.2, 5.0), window=3, size=4)
    assert not found.moved[0][0].any()
    assert not found.held[0][0].any()
    assert (found.held[0].diff(dim=0) > 0).all()
    held = torch.zeros_like(K)
    held[:, :, 0] = K[:, :, 0]
    for j in range(1, 21):
        step = (K[:, :, j] - K[:, :, j - 1]).abs() >= 0.2
        held[:, :, j] = torch.where(step, K[:, :, j], held[:, :, j - 1])
    near = Q @ K.repeat_interleave(2, 1).transpose(-1, -2)
    far = Q @ held.repeat_interleave(2, 1).transpose(-1, -2)
    gap = torch.arange(21)[:, None] - torch.arange(21)
    scores = torch.where(gap < 3, near, far).mul(8**-0.5).masked_fill(gap < 0, float("-inf"))
    exact = near.mul(8**-0.5).masked_fill(gap < 0, float("-inf")).softmax(-1)
    wanted = (scores.softmax(-1) - exact).abs().sum(-1).mean(-1)[0] / 2
    torch.testing.assert_close(found.moved[0][1], wanted)
    torch.testing.assert_close(found.held[0][1], (held != K).double().mean((0, 2, 3)).repeat_interleave(2))
    assert found.plot().get_xlabel() == "share of key entries held"
    assert (found.save(tmp_path / "held") / "table.parquet").is_file()


def test_on_a_model_and_where_it_is_refused() -> None:
    run = wb.load("tiny-softmax").run("Mary and John went to the store .", maps=wb.capture())
    table = held_key_errors(run, (0.0, 1.0), window=2).frame()
    assert (table[table["threshold"] == 0]["moved"] < 1e-6).all()
    dense = Run(
        Tokens.of(torch.zeros(1, 3, dtype=torch.int64)),
        maps={0: AttentionMap.from_dense(torch.full((1, 1, 3, 3), 1 / 3))},
    )
    with pytest.raises(Refused, match="keys are held in softmax attention"):
        held_key_errors(dense)
    with pytest.raises(WorkbenchError, match="thresholds are not negative"):
        held_key_errors(run, (-1.0,))
