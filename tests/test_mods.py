import pytest
import torch
from torch import Tensor

from workbench import mods
from workbench.errors import WorkbenchError
from workbench.maps import AttentionMap
from workbench.mods import Mod


def table(mod: Mod, queries: int = 5, keys: int = 5, *, batch: int = 1, offset: int = 0) -> list:
    """The mod written out, ``[B, Q, K]`` or ``[Q, K]`` for one example."""
    found = mod(
        torch.arange(batch)[:, None, None, None],
        torch.zeros(1, 1, 1, 1, dtype=torch.long),
        torch.arange(queries)[None, None, :, None] + offset,
        torch.arange(keys)[None, None, None, :],
    )
    out = found.expand(batch, 1, queries, keys)[:, 0].int()
    return (out[0] if batch == 1 else out).tolist()


def test_plain_conditions_written_out() -> None:
    assert table(mods.causal(), 3, 3) == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert table(mods.full(), 2, 3) == [[1, 1, 1], [1, 1, 1]]
    assert table(mods.window(2), 3, 3) == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    assert table(mods.prefix(1), 2, 3) == [[1, 0, 0], [1, 0, 0]]
    assert table(mods.sink(), 3, 3) == [[0, 0, 0], [1, 0, 0], [1, 0, 0]]
    assert table(mods.sink(2), 3, 3) == [[0, 0, 0], [0, 0, 0], [1, 1, 0]]
    assert table(mods.previous(), 3, 3) == [[0, 0, 0], [1, 0, 0], [0, 1, 0]]
    assert table(mods.diagonal(), 2, 2) == [[1, 0], [0, 1]]
    assert table(mods.span(1, 3), 2, 4) == [[0, 1, 1, 0], [0, 1, 1, 0]]
    assert table(mods.distance(), 3, 3) == [[0, 1, 2], [1, 0, 1], [2, 1, 0]]
    assert table(mods.distance(1), 3, 3) == [[0, 1, 1], [1, 0, 1], [1, 1, 0]]


def test_positions_are_absolute() -> None:
    assert table(mods.previous(), 1, 5, offset=3) == [[0, 0, 1, 0, 0]]
    assert table(mods.window(2), 1, 5, offset=3) == [[0, 0, 1, 1, 0]]


def test_conditions_on_tokens_written_out() -> None:
    ids = torch.tensor([7, 8, 7, 8, 7])
    assert table(mods.same_token(ids)) == [[0] * 5, [0] * 5, [1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [1, 0, 1, 0, 0]]
    assert table(mods.induction(ids)) == [[0] * 5, [0] * 5, [0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 1, 0, 1, 0]]
    assert table(mods.induction(torch.tensor([4, 4, 4])), 3, 3) == [[0, 0, 0], [0, 1, 0], [0, 1, 1]]
    assert table(mods.document(torch.tensor([0, 0, 1])), 3, 3) == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]


def test_every_example_has_its_own_tokens_and_spans() -> None:
    ids = torch.tensor([[1, 1], [1, 2]])
    assert table(mods.same_token(ids), 2, 2, batch=2) == [[[0, 0], [1, 0]], [[0, 0], [0, 0]]]
    assert table(mods.same_token(ids[:1]), 2, 2, batch=2) == [[[0, 0], [1, 0]]] * 2
    ranges = torch.tensor([[1, 3], [-1, -1]])
    assert table(mods.spans(ranges), 1, 4, batch=2) == [[[0, 1, 1, 0]], [[0, 0, 0, 0]]]


def test_both_is_conjunction_and_product() -> None:
    assert table(mods.both(mods.causal(), mods.window(2), mods.span(0, 1)), 3, 3) == [[1, 0, 0], [1, 0, 0], [0, 0, 0]]
    near = mods.both(mods.distance(), mods.causal())
    assert table(near, 3, 3) == [[0, 0, 0], [1, 0, 0], [2, 1, 0]]
    square = mods.both(mods.distance(), mods.distance())
    assert table(square, 3, 3) == [[0, 1, 4], [1, 0, 1], [4, 1, 0]]


def test_a_mod_weighs_a_map() -> None:
    uniform = AttentionMap.from_dense(torch.full((1, 1, 4, 4), 0.25))
    assert uniform.mass(mods.prefix(3)).flatten().tolist() == [0.75] * 4
    assert uniform.mass(mods.distance()).flatten().tolist() == [1.5, 1.0, 1.0, 1.5]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: mods.window(0), "at least one key"),
        (lambda: mods.sink(0), "at least one key"),
        (lambda: mods.span(3, 3), r"\[3, 3\)"),
        (lambda: mods.spans(torch.zeros(3)), r"spans are \[B, 2\]"),
        (lambda: mods.distance(0), "one token or more"),
        (lambda: mods.both(), "at least one mod"),
        (lambda: mods.induction(torch.zeros(3)), "ids are integers"),
        (lambda: table(mods.same_token(torch.zeros(3).long()), 3, 5), "ids for 3 positions, asked for position 4"),
        (lambda: table(mods.document(torch.zeros(2, 5).long()), batch=3), "ids of 2 examples, asked for example 2"),
        (lambda: table(mods.spans(torch.zeros(2, 2).long()), batch=3), "spans of 2 examples"),
    ],
)
def test_bad_mods_raise(make, said) -> None:
    with pytest.raises(WorkbenchError, match=said):
        make()


def test_mods_need_no_full_tables() -> None:
    sizes: list[int] = []

    def watch(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        sizes.extend(t.numel() for t in (b, h, q, k))
        return q == k

    AttentionMap.from_dense(torch.eye(6).expand(2, 3, 6, 6)).mass(watch)
    assert sizes == [2, 3, 6, 6]
