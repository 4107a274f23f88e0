"""Counts over runs of keys against the mask written out pair by pair."""

import pytest
import torch

from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap
from workbench.probes.visibility import Visibility, looks_ahead, visibility

B, Q, K = 2, 5, 7
HIDDEN = torch.tensor([[False, True, True, True, True, True, True], [True, True, True, False, True, False, True]])
REAL = torch.tensor([[True, True, True, True, True], [True, True, True, True, False]])
GENERATOR = torch.Generator().manual_seed(0)

MASKS = {
    "open": Mask(offset=2),
    "causal": Mask(causal=True, offset=2),
    "causal without offset": Mask(causal=True),
    "window": Mask(causal=True, window=3, offset=2),
    "two-sided window": Mask(window=2, offset=2),
    "prefix": Mask(causal=True, window=2, prefix=2, offset=2),
    "prefix before causal": Mask(causal=True, prefix=4, offset=2),
    "prefix alone": Mask(prefix=3, offset=2),
    "hidden keys": Mask(causal=True, keys=HIDDEN, offset=2),
    "hidden keys, one row": Mask(keys=HIDDEN[1:], offset=2),
    "hidden keys and prefix": Mask(causal=True, window=2, prefix=2, keys=HIDDEN, offset=2),
    "documents": Mask(causal=True, documents=torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 1]]), offset=2),
    "dense": Mask(dense=torch.rand(B, 3, Q, K, generator=GENERATOR) > 0.5, offset=2),
    "dense and causal": Mask(causal=True, dense=torch.rand(1, 1, Q, K, generator=GENERATOR) > 0.3, offset=2),
}


def by_hand(mask, q, k, b, h):
    at = q + mask.offset
    near = True
    if mask.window is not None:
        near = 0 <= at - k < mask.window if mask.causal else abs(at - k) < mask.window
    elif mask.causal:
        near = k <= at
    seen = near or k < mask.prefix
    if mask.keys is not None:
        seen = seen and bool(mask.keys[b % len(mask.keys), k])
    if mask.documents is not None:
        seen = seen and int(mask.documents[b, at]) == int(mask.documents[b, k])
    if mask.dense is not None:
        seen = seen and bool(mask.dense[b % len(mask.dense), h % mask.dense.shape[1], q, k])
    return seen


@pytest.mark.parametrize("real", [torch.ones(1, Q, dtype=torch.bool), REAL], ids=["all real", "padding"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_counts_are_those_of_the_pairs(mask, real, monkeypatch):
    monkeypatch.setattr("workbench.probes.visibility._CHUNK", 2 * B * K)
    heads = 3
    allowed = torch.tensor(
        [
            [
                [[by_hand(mask, q, k, b, h) and bool(real[b % len(real), q]) for k in range(K)] for q in range(Q)]
                for h in range(heads)
            ]
            for b in range(B)
        ],
        dtype=torch.float64,
    )
    seen = Visibility(mask, (Q, K), real)
    torch.testing.assert_close(seen.keys().expand(B, heads, Q), allowed.sum(-1))
    torch.testing.assert_close(seen.queries().expand(B, heads, K), allowed.sum(-2))
    gate = torch.rand(B, heads, Q, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    even = (gate / allowed.sum(-1).clamp(min=1))[..., None] * allowed
    expected = even.sum(-2) / allowed.sum(-2)  # 0 / 0 is undefined, as it should be
    torch.testing.assert_close(seen.uniform(gate).expand(B, heads, K), expected, equal_nan=True)
    torch.testing.assert_close(seen.spread(gate).expand(B, heads, K), (gate[..., None] * allowed).sum(-2))


def test_a_map_without_mask_is_causal_if_nothing_looks_ahead():
    causal = torch.eye(4).expand(1, 1, 4, 4)
    ahead = causal.clone()
    ahead[..., 0, 3] = 0.1
    assert not looks_ahead(AttentionMap.from_dense(causal))
    assert looks_ahead(AttentionMap.from_dense(ahead))
    assert visibility(AttentionMap.from_dense(causal)).queries().flatten().tolist() == [4, 3, 2, 1]
    assert visibility(AttentionMap.from_dense(ahead)).queries().flatten().tolist() == [4, 4, 4, 4]
    told = visibility(AttentionMap.from_dense(causal), mask=Mask(causal=True, window=2))
    assert told.queries().flatten().tolist() == [2, 2, 2, 1]


@pytest.mark.parametrize(
    "mask",
    [
        Mask(keys=torch.ones(1, 5).bool()),
        Mask(queries=torch.ones(3, 4).bool()),
        Mask(dense=torch.ones(1, 2, 4, 4).bool()),
    ],
)
def test_a_mask_of_other_sizes_is_refused(mask):
    with pytest.raises(WorkbenchError, match=r"does not fit a map of \[1, 1, 4, 4\]: mask\.(keys|queries|dense)"):
        visibility(AttentionMap.from_dense(torch.eye(4).expand(1, 1, 4, 4)), mask=mask)


def test_rows_the_mask_empties_do_not_count():
    mask = Mask(causal=True, queries=torch.tensor([[True, True, False, False]]))
    seen = visibility(AttentionMap.from_dense(torch.eye(4).expand(1, 1, 4, 4)), mask=mask)
    assert seen.queries().flatten().tolist() == [2, 1, 0, 0]
    assert seen.keys().flatten().tolist() == [1, 2, 0, 0]
