import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.kernels.mask import Mask, in_window


def literal(mask: Mask, b: int, q: int, k: int) -> bool:
    """The sentence in Mask's docstring, one pair at a time."""
    i = q + mask.offset
    near = True
    if mask.causal:
        near = k <= i
    if mask.window is not None:
        near = 0 <= i - k < mask.window if mask.causal else abs(i - k) < mask.window
    allowed = near or k < mask.prefix
    if mask.documents is not None:
        row = mask.documents[b % len(mask.documents)]
        allowed &= bool(row[i] == row[k])
    if mask.keys is not None:
        allowed &= bool(mask.keys[b % len(mask.keys), k])
    if mask.queries is not None:
        allowed &= bool(mask.queries[b % len(mask.queries), q])
    if mask.dense is not None:
        allowed &= bool(mask.dense[b % len(mask.dense), 0, q, k])
    return allowed


@st.composite
def masks(draw: st.DrawFn) -> tuple[Mask, int, int]:
    queries, offset = draw(st.integers(1, 7)), draw(st.integers(0, 5))
    keys = draw(st.integers(1, 12))
    seed = torch.Generator().manual_seed(draw(st.integers(0, 999)))

    def maybe(make):
        return make() if draw(st.booleans()) else None

    fits = offset + queries <= keys
    return (
        Mask(
            causal=draw(st.booleans()),
            window=draw(st.none() | st.integers(1, 8)),
            prefix=draw(st.integers(0, 4)),
            offset=offset,
            documents=maybe(lambda: torch.randint(0, 3, (2, keys), generator=seed).sort(-1).values) if fits else None,
            keys=maybe(lambda: torch.rand(2, keys, generator=seed) > 0.4),
            queries=maybe(lambda: torch.rand(1, queries, generator=seed) > 0.3),
            dense=maybe(lambda: torch.rand(2, 1, queries, keys, generator=seed) > 0.4),
        ),
        queries,
        keys,
    )


def tabled(mask: Mask, queries: int, keys: int) -> torch.Tensor:
    return torch.tensor([[[literal(mask, b, q, k) for k in range(keys)] for q in range(queries)] for b in range(2)])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(masks())
def test_tile_span_open_and_covers_agree_with_the_literal_mask(case: tuple[Mask, int, int]) -> None:
    mask, queries, keys = case
    mask.check((2, 3, queries, keys))
    table = tabled(mask, queries, keys)
    tile = mask.tile(slice(0, queries), slice(0, keys))
    full = torch.ones(2, 1, queries, keys, dtype=torch.bool) if tile is None else tile.expand(2, 1, queries, keys)
    assert torch.equal(full[:, 0], table)
    for lo in range(queries):
        for hi in range(lo + 1, queries + 1):
            first, last = mask.span(lo, hi, keys)
            assert 0 <= first <= last <= keys
            assert not table[:, lo:hi, :first].any()
            assert not table[:, lo:hi, last:].any()
            start, stop = mask.open(lo, hi, first, last)
            assert first <= start <= stop <= last
            assert table[:, lo:hi, start:stop].all()
    if mask.covers(queries, keys):
        assert table.any(-1).all()
    example = mask.select(slice(1, 2)).tile(slice(0, queries), slice(0, keys))
    assert example is None or torch.equal(example.expand(1, 1, queries, keys)[0, 0], table[1])


def test_common_masks_are_known_to_cover_their_rows() -> None:
    padded = torch.tensor([[True, True, False]])
    assert Mask(causal=True).covers(9, 9)
    assert Mask().covers(4, 7)
    assert Mask(causal=True, window=3).covers(9, 9)
    assert Mask(causal=True, documents=torch.zeros(1, 9, dtype=torch.long)).covers(9, 9)
    assert Mask(causal=True, keys=padded).covers(3, 3)
    assert not Mask(causal=True, keys=padded.flip(1)).covers(3, 3)
    assert not Mask(window=2).covers(9, 4)


def test_causal_span_and_open_region_are_tight() -> None:
    assert Mask(causal=True).span(4, 8, 100) == (0, 8)
    assert Mask(causal=True).open(4, 8, 0, 8) == (0, 5)
    assert Mask(causal=True, window=3).span(4, 8, 100) == (2, 8)
    assert Mask(causal=True, window=6).open(4, 8, 0, 8) == (2, 5)
    assert Mask(causal=True, documents=(torch.arange(20) // 5)[None]).span(10, 12, 20) == (10, 12)


def test_window_keeps_exactly_that_many_keys() -> None:
    q, k = torch.arange(9)[:, None], torch.arange(9)[None]
    assert in_window(q, k, 3).sum(1).tolist() == [1, 2, 3, 3, 3, 3, 3, 3, 3]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Mask(window=0), "window"),
        (lambda: Mask(prefix=-1), "prefix"),
        (lambda: Mask(offset=-2), "offset"),
        (lambda: Mask(keys=torch.ones(3, dtype=torch.bool)), r"keys is \[B, K\]"),
        (lambda: Mask(keys=torch.ones(1, 3)), "keys holds bools"),
        (lambda: Mask(documents=torch.ones(1, 3)), "documents holds integers"),
        (lambda: Mask(dense=torch.ones(1, 1, 3, 3)), "dense is bool"),
        (lambda: Mask(keys=torch.ones(2, 4, dtype=torch.bool)).check((2, 1, 4, 5)), "mask.keys"),
        (lambda: Mask(queries=torch.ones(3, 4, dtype=torch.bool)).check((2, 1, 4, 5)), "mask.queries"),
        (lambda: Mask(documents=torch.zeros(1, 5).long(), offset=2).check((2, 1, 4, 5)), "last query stands at 5"),
        (lambda: Mask(dense=torch.ones(1, 1, 4, 4, dtype=torch.bool)).check((2, 1, 4, 5)), "mask.dense"),
        (lambda: Mask(documents=torch.zeros(1, 3).long()).tile(slice(2, 4), slice(0, 3)), "asked up to 3"),
    ],
)
def test_masks_that_do_not_fit_raise_naming_the_part(make, said) -> None:
    with pytest.raises(ValueError, match=said):
        make()
