"""Probes of fused attention against softmax written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import variants
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.mixers.probes import (
    block_probe,
    identity_probe,
    identity_probed_attention,
    softmax_probe,
    transpose_probe,
)

Operator = Callable[..., tuple[Tensor, AttentionMap]]


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows_of_softmax(q: Tensor, k: Tensor, causal: bool = True) -> Tensor:
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * q.shape[3] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[2:]).triu(1).bool(), -torch.inf)
    return scores.softmax(-1)


def identity_columns_are_the_softmax(op: Operator) -> None:
    given = variants()["identity-probe"].example(1, 11, torch.float64)
    wanted = rows_of_softmax(given["q"], given["k"])
    out, found = op(**given)
    torch.testing.assert_close(found.dense(), wanted)
    torch.testing.assert_close(out, wanted @ given["v"].repeat_interleave(2, 1))


def block_columns_are_sums_of_softmax(op: Operator) -> None:
    given = variants()["block-probe"].example(1, 11, torch.float64)
    weights = rows_of_softmax(given["q"], given["k"], causal=False)
    wanted = torch.stack([part.sum(-1) for part in weights.split(4, 3)], 3)
    out, found = op(**given)
    assert found.domain == "block"
    torch.testing.assert_close(found.dense(), wanted)
    torch.testing.assert_close(out, wanted @ given["v"].repeat_interleave(2, 1))


def block_rows_are_means_of_softmax(op: Operator) -> None:
    given = variants()["transpose-probe"].example(1, 11, torch.float64)
    weights = rows_of_softmax(given["q"], given["k"], causal=False)
    wanted = torch.stack([part.mean(2) for part in weights.split(4, 2)], 2)
    out, found = op(**given)
    torch.testing.assert_close(found.dense(), wanted)
    torch.testing.assert_close(out, wanted @ given["v"].repeat_interleave(2, 1))


def entropy_and_position_follow_from_two_values(op: Operator) -> None:
    given = variants()["softmax-probe"].example(1, 11, torch.float64)
    weights = rows_of_softmax(given["q"], given["k"])
    out, found = op(**given)
    torch.testing.assert_close(out, weights @ given["v"].repeat_interleave(2, 1))
    torch.testing.assert_close(found.entropy(), torch.special.entr(weights).sum(-1))
    torch.testing.assert_close(found.position(), weights @ torch.arange(11.0).double())
    torch.testing.assert_close(found.received(), weights.sum(2))


IDENTITIES: dict[str, Callable[[Operator], None]] = {
    "identity-probe": identity_columns_are_the_softmax,
    "block-probe": block_columns_are_sums_of_softmax,
    "transpose-probe": block_rows_are_means_of_softmax,
    "softmax-probe": entropy_and_position_follow_from_two_values,
}

Q, K, V = rand(0, 2, 4, 300, 8), rand(1, 2, 2, 300, 8), rand(2, 2, 2, 300, 8)
WEIGHTS = rows_of_softmax(Q, K)


def stock(v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(Q.to(v), K.to(v), v, is_causal=True, enable_gqa=True)


def test_probes_of_a_stock_kernel() -> None:
    torch.testing.assert_close(identity_probe(stock, V).dense(), WEIGHTS)
    torch.testing.assert_close(
        block_probe(stock, V, 64), torch.stack([part.sum(-1) for part in WEIGHTS.split(64, 3)], 3)
    )
    y = rand(3, 2, 4, 300, 3)
    torch.testing.assert_close(transpose_probe(stock, V, y), WEIGHTS.mT @ y)
    found = softmax_probe(stock, Q, K, mask=Mask(causal=True))
    torch.testing.assert_close(found.entropy, torch.special.entr(WEIGHTS).sum(-1))
    torch.testing.assert_close(found.position, WEIGHTS @ torch.arange(300.0).double())
    lse = (Q @ K.repeat_interleave(2, 1).mT * 8**-0.5).masked_fill(torch.ones(300, 300).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(softmax_probe(stock, Q, K, lse.logsumexp(-1)).entropy, found.entropy)


def test_positions_survive_bfloat16() -> None:
    q, k = torch.zeros(1, 1, 600, 8).bfloat16(), torch.zeros(1, 1, 600, 8).bfloat16()
    q[:, :, 577, 0], k[:, :, 577, 0] = 100.0, 100.0
    found = softmax_probe(lambda v: F.scaled_dot_product_attention(q, k, v), q, k)
    assert found.position[0, 0, 577].item() == 577


def test_probes_of_a_plain_module() -> None:
    conv = torch.nn.Conv1d(1, 1, 3, padding=1, bias=False, dtype=torch.float64)
    found = identity_probe(
        lambda v: conv(v.transpose(2, 3).reshape(-1, 1, 9)).view(2, 2, 4, 9).transpose(2, 3), rand(0, 2, 2, 9, 4)
    )
    taps = conv.weight[0, 0].detach()
    torch.testing.assert_close(found.dense()[0, 0, 4, 3:6], taps)
    assert found.dense()[0, 0, 4].count_nonzero() == 3


def test_rows_without_keys_are_zero() -> None:
    mask = Mask(keys=torch.tensor([[False] * 5, [True] * 5]))
    given: dict[str, Any] = {"q": rand(0, 2, 2, 5, 4), "k": rand(1, 2, 2, 5, 4), "v": rand(2, 2, 2, 5, 4), "mask": mask}
    for name in ("identity-probe", "softmax-probe"):
        out, found = variants()[name](**given)
        assert not out[0].any()
        assert not found.dense()[0].any()
        assert found.row_sum == "<=1"
        assert not found.entropy()[0].any()


def test_refusals() -> None:
    with pytest.raises(WorkbenchError, match="no gradient with respect to its values"):
        transpose_probe(lambda v: stock(v.detach()), V, rand(3, 2, 4, 300, 3))
    with pytest.raises(WorkbenchError, match="weights is floating point"):
        transpose_probe(stock, V, rand(3, 2, 4, 299, 3))
    with pytest.raises(WorkbenchError, match="not linear"):
        identity_probe(lambda v: v.exp(), V)
    given = variants()["block-probe"].example(1, 11, torch.float64)
    for name in ("block-probe", "transpose-probe"):
        with pytest.raises(WorkbenchError, match="a block has at least one token"):
            variants()[name](**{**given, "size": 0})
    with pytest.raises(WorkbenchError, match=r"v is floating point \[2, 2, 3, V\]"):
        variants()["block-probe"](**{**given, "v": given["k"]})
    with pytest.raises(WorkbenchError, match="k is"):
        identity_probed_attention(Q, K[..., :3], V)


def test_types_that_differ_and_sizes_that_are_no_number_are_refused() -> None:
    for name in ("identity-probe", "block-probe", "transpose-probe", "softmax-probe"):
        given = variants()[name].example(1, 11, torch.float64)
        with pytest.raises(WorkbenchError, match="v has the type of q"):
            variants()[name](**{**given, "v": given["v"].float()})
        if "size" in given:
            with pytest.raises(WorkbenchError, match="a block has at least one token; got size='4'"):
                variants()[name](**{**given, "size": "4"})
