import pytest
import torch
from torch import Tensor

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap, GatedMap
from workbench.patterns.diagonal import DiagonalMap
from workbench.probes.visibility import visibility


def rows(*values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor([[list(values)]], dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_row_sums_are_read_off_within_the_rounding_of_the_type(dtype: torch.dtype) -> None:
    weights = torch.randn(1, 2, 50, 50, generator=torch.Generator().manual_seed(0)).softmax(-1)
    assert AttentionMap.from_dense(weights.to(dtype)).row_sum == "1"
    assert AttentionMap.from_dense((weights * 0.95).to(dtype)).row_sum == "<=1"
    assert AttentionMap.from_dense((weights * 1.05).to(dtype)).row_sum == "free"
    assert AttentionMap.from_dense((weights * 0).to(dtype)).row_sum == "<=1"


def test_signed_weights_have_free_rows_and_no_entropy() -> None:
    amap = AttentionMap.from_dense(rows([1.5, -0.5], [0.0, 1.0]))
    assert (amap.sign, amap.row_sum) == ("signed", "free")
    with pytest.raises(Refused, match="entropy is undefined"):
        amap.entropy()
    assert amap.topk(2).indices.flatten().tolist() == [0, 1, 1, 0]


def test_entropy_and_distance_leave_missing_mass_out() -> None:
    amap = AttentionMap.from_dense(rows([0.25, 0.25], [0.0, 0.0]))
    assert amap.entropy().flatten().tolist() == pytest.approx([0.5 * torch.tensor(4.0).log().item(), 0.0])
    assert amap.distance().flatten().tolist() == [0.25, 0.0]


def test_the_last_query_stands_on_the_last_key_unless_told_otherwise() -> None:
    weights = torch.eye(5)[3:][None, None]
    assert AttentionMap.from_dense(weights).offset == 3
    assert AttentionMap.from_dense(weights).distance().sum() == 0
    assert AttentionMap.from_dense(weights, offset=0).distance().flatten().tolist() == [3.0, 3.0]


def test_a_mask_tells_who_may_see_whom_where_zeros_do_not() -> None:
    weights = torch.eye(4).expand(1, 2, 4, 4).clone()
    per_head = torch.ones(1, 2, 4, 4, dtype=torch.bool)
    per_head[:, 1, 3, 0] = False
    assert visibility(AttentionMap.from_dense(weights)).queries().flatten().tolist() == [4, 3, 2, 1]
    amap = AttentionMap.from_dense(weights, mask=Mask())
    assert visibility(amap).queries().flatten().tolist() == [4, 4, 4, 4]
    chosen = AttentionMap.from_dense(weights, mask=Mask(dense=per_head)).heads([1])
    assert visibility(chosen).queries().flatten().tolist() == [3, 4, 4, 4]


def test_the_mask_of_a_dense_map_stands_at_its_offset() -> None:
    amap = AttentionMap.from_dense(torch.full((1, 1, 2, 4), 0.0), mask=Mask(causal=True))
    assert visibility(amap).queries().flatten().tolist() == [2, 2, 2, 1]


def test_a_mask_that_contradicts_the_weights_raises() -> None:
    weights = torch.full((1, 1, 3, 3), 1 / 3)
    with pytest.raises(WorkbenchError, match=r"mask hides 3 places that have weight, the first at .* = \[0, 0, 0, 1\]"):
        AttentionMap.from_dense(weights, mask=Mask(causal=True))
    with pytest.raises(WorkbenchError, match=r"does not fit weights of \[1, 1, 3, 3\]: mask\.keys"):
        AttentionMap.from_dense(weights, mask=Mask(keys=torch.ones(1, 4, dtype=torch.bool)))


def test_half_precision_weights_are_summed_in_float32() -> None:
    weights = torch.full((1, 1, 3000, 1), 1.0, dtype=torch.bfloat16)
    amap = AttentionMap.from_dense(weights)
    assert amap.received().dtype == torch.float32
    assert amap.received().item() == 3000.0
    assert amap.blocks(4000).item() == 3000.0


@pytest.mark.parametrize(
    ("weights", "options", "said"),
    [
        (torch.zeros(3, 3), {}, r"weights are \[B, H, Q, K\], not empty; got \[3, 3\]"),
        (torch.zeros(1, 1, 0, 3), {}, "not empty"),
        (torch.ones(1, 1, 2, 2, dtype=torch.long), {}, "floating point; got torch.int64"),
        (rows([float("nan"), 1.0]), {}, "NaN or infinity"),
        (rows([float("inf"), 1.0]), {}, "NaN or infinity"),
        (rows([0.5, 0.5]), {"domain": "tokens"}, "no map domain 'tokens'; known: token, block"),
        (rows([0.5, 0.5]), {"colour": "red"}, "no map metadata 'colour'"),
        (rows([0.5, 0.1]), {"row_sum": "1"}, "row_sum='1', but rows sum to 0.6"),
        (rows([0.9, 0.9]), {"row_sum": "<=1"}, r"row_sum='<=1', but rows sum to 1.8"),
        (rows([1.5, -0.5]), {"sign": "nonnegative"}, "smallest weight is -0.5"),
    ],
)
def test_weights_that_are_no_such_map_are_refused(weights: Tensor, options: dict[str, str], said: str) -> None:
    with pytest.raises(WorkbenchError, match=said):
        AttentionMap.from_dense(weights, **options)


def test_unknown_names_are_listed() -> None:
    with pytest.raises(UnknownName, match="known: token, block, agent, channel, frequency"):
        AttentionMap.from_dense(rows([0.5, 0.5]), domain="space")


def test_a_gate_scales_rows() -> None:
    raw = AttentionMap.from_dense(rows([0.5, 0.5], [0.25, 0.75]))
    amap = GatedMap(raw, torch.tensor([[[0.5, 0.0]]]))
    assert amap.row_sum == "gate"
    assert amap.received().flatten().tolist() == [0.25, 0.25]
    assert amap.row_sums().flatten().tolist() == [0.5, 0.0]
    assert amap.topk(1).indices.flatten().tolist() == [0, -1]
    with pytest.raises(WorkbenchError, match=r"a gate is \[B, H, Q\] = \[1, 1, 2\]; got \[1, 2\]"):
        GatedMap(raw, torch.ones(1, 2))
    with pytest.raises(WorkbenchError, match="a gate is floating point"):
        GatedMap(raw, torch.ones(1, 1, 2, dtype=torch.long))


def test_gated_rows_are_not_rounded_to_half_precision() -> None:
    weights, gate = torch.rand(1, 2, 5, 7).bfloat16(), torch.rand(1, 2, 5)
    gated = GatedMap(AttentionMap.from_dense(weights), gate)
    expected = weights.double() * gate.double()[..., None]
    torch.testing.assert_close(gated.rows(1, 4).double(), expected[:, :, 1:4], rtol=1e-6, atol=0)
    torch.testing.assert_close(
        gated.tile(slice(2, 5), slice(3, 6)).double(), expected[:, :, 2:, 3:6], rtol=1e-6, atol=0
    )
    torch.testing.assert_close(gated.received().double(), expected.sum(2), rtol=1e-6, atol=0)


def test_entropy_of_gates_above_one_is_refused() -> None:
    raw = AttentionMap.from_dense(rows([0.5, 0.5]))
    with pytest.raises(Refused, match=r"a gate of 1.5 .* raw.entropy\(\)"):
        GatedMap(raw, torch.full((1, 1, 1), 1.5)).entropy()


def test_gates_over_rows_without_a_contract_have_none_and_no_entropy() -> None:
    weights = 5 * torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    found = GatedMap(AttentionMap.from_dense(weights, offset=0), torch.full((1, 2, 4), 0.5))
    assert (found.sign, found.row_sum) == ("nonnegative", "free")
    with pytest.raises(Refused, match="no distribution"):
        found.entropy()
    with pytest.raises(Refused, match="a gate of 1.5 makes rows that are no distribution"):
        DiagonalMap(torch.full((1, 2, 4), 1.5)).entropy()
