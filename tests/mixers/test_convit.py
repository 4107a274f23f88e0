"""ConViT: content and place apart, mixed by a gate, against literal scores of every pair of cells."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from workbench.attention_map import AttentionMap
from workbench.catalogue import example_tensors
from workbench.errors import WorkbenchError
from workbench.mixers.convit import gated_positional_attention, local_places

Operator = Callable[..., tuple[Tensor, AttentionMap]]
ROWS, COLUMNS = 3, 4


def drawn() -> dict[str, Any]:
    n = ROWS * COLUMNS
    shapes = {"q": (2, 4, n, 4), "k": (2, 2, n, 4), "v": (2, 2, n, 3), "place": (4, 3), "gating": (4,)}
    return {**example_tensors(1, torch.float64, **shapes), "grid": (ROWS, COLUMNS)}


def places(place: Tensor) -> Tensor:
    """Positional softmax, cell by cell."""
    cells = [(row, column) for row in range(ROWS) for column in range(COLUMNS)]
    scores = torch.zeros(4, len(cells), len(cells), dtype=torch.float64)
    for i, (row, column) in enumerate(cells):
        for j, (other, across) in enumerate(cells):
            x, y = across - column, other - row
            scores[:, i, j] = place @ torch.tensor([x, y, x * x + y * y], dtype=torch.float64)
    return scores.softmax(-1)


def shut_gates_are_plain_attention(op: Operator) -> None:
    """With sigmoid(lambda) = 0 softmax attention, with 1 the positions alone, in between the mixture of both patterns."""
    given = drawn()
    content = (given["q"] @ given["k"].repeat_interleave(2, 1).transpose(-1, -2) / 2).softmax(-1)
    out, _ = op(**{**given, "gating": torch.full((4,), -800.0, dtype=torch.float64)})
    torch.testing.assert_close(out, scaled_dot_product_attention(given["q"], given["k"], given["v"], enable_gqa=True))
    _, found = op(**{**given, "gating": torch.full((4,), 800.0, dtype=torch.float64)})
    torch.testing.assert_close(found.dense(), places(given["place"]).expand(2, -1, -1, -1))
    out, found = op(**given)
    gate = given["gating"].sigmoid()[:, None, None]
    wanted = (1 - gate) * content + gate * places(given["place"])
    torch.testing.assert_close(found.dense(), wanted)
    torch.testing.assert_close(out, wanted @ given["v"].repeat_interleave(2, 1))


IDENTITIES: dict[str, Callable[[Operator], None]] = {"gated-positional-attention": shut_gates_are_plain_attention}


def test_both_parts_are_shown() -> None:
    given = drawn()
    _, found = gated_positional_attention(**given)
    content, spatial = found.native()
    torch.testing.assert_close(spatial.raw.dense(), places(given["place"]).expand(2, -1, -1, -1))
    torch.testing.assert_close(content.raw.row_sums(), torch.ones(2, 4, 12, dtype=torch.float64))
    torch.testing.assert_close(content.gate + spatial.gate, torch.ones(2, 4, 12, dtype=torch.float64))
    torch.testing.assert_close(found.blocks(5), AttentionMap.from_dense(found.dense()).blocks(5))


def test_a_large_grid_in_float32_keeps_its_places() -> None:
    """The product form of the positional scores against the literal one, at the size of an image of 24 x 24 patches."""
    n = 576
    given = example_tensors(1, torch.float32, q=(1, 4, n, 4), k=(1, 4, n, 4), v=(1, 4, n, 3))
    place = local_places((4, 3))
    out, found = gated_positional_attention(**given, place=place, gating=torch.full((4,), 9.0), grid=(24, 24))
    torch.testing.assert_close(found.matvec(given["v"]), out, atol=2e-4, rtol=2e-4)


def test_heads_start_on_the_cells_of_a_kernel() -> None:
    """Four heads look one half step away from the cell, nine at the 3 x 3 neighbours."""
    n = 25
    given = example_tensors(1, torch.float64, q=(1, 9, n, 4), k=(1, 9, n, 4), v=(1, 9, n, 3))
    gating = torch.full((9,), 800.0, dtype=torch.float64)
    place = local_places((9, 3), 50.0).double()
    _, found = gated_positional_attention(**given, place=place, gating=gating, grid=(5, 5))
    looked = found.topk(1).indices[0, :, 12, 0].tolist()
    assert sorted(looked) == [6, 7, 8, 11, 12, 13, 16, 17, 18]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"grid": (3, 5)}, r"grid is \(rows, columns\)"),
        ({"place": torch.zeros(4, 2)}, "place is floating point"),
        ({"gating": torch.zeros(2)}, "gating is floating point"),
    ],
)
def test_wrong_arguments_are_named(changed: dict[str, Any], told: str) -> None:
    with pytest.raises(WorkbenchError, match=told):
        gated_positional_attention(**{**drawn(), **changed})
