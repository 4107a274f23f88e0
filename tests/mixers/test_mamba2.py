"""Mamba-2 and LinGen's scan against the recurrence written out, and against Hugging Face's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.errors import UnknownName, WorkbenchError
from workbench.mixers.mamba2 import VARIANTS

Operator = Callable[..., tuple[Tensor, AttentionMap]]
RECORDS = {record.name: record for record in VARIANTS}


def example(name: str, tokens: int) -> dict[str, Any]:
    return RECORDS[name].example(0, tokens, torch.float64)


def loop(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None) -> Tensor:
    """The recurrence token by token."""
    h = x.shape[1]
    b, c = (part.repeat_interleave(h // part.shape[1], 1) for part in (b, c))
    state = x.new_zeros(*x.shape[:2], b.shape[3], x.shape[3])
    out = []
    for t in range(x.shape[2]):
        decay = (dt[:, :, t] * a).exp()[..., None, None]
        state = decay * state + dt[:, :, t, None, None] * b[:, :, t, :, None] * x[:, :, t, None]
        y = (c[:, :, t, None] @ state)[..., 0, :]
        out.append(y if d is None else y + d[:, None] * x[:, :, t])
    return torch.stack(out, 2)


def dual_form(dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None) -> Tensor:
    """(Gamma * C B^T) diag(dt) + D I."""
    h, n = dt.shape[1:]
    b, c = (part.repeat_interleave(h // part.shape[1], 1) for part in (b, c))
    total = (dt * a[:, None]).cumsum(-1)
    gamma = (total[..., :, None] - total[..., None, :]).exp().tril()
    m = gamma * (c @ b.transpose(-1, -2)) * dt[:, :, None]
    return m if d is None else m + torch.diag_embed(d[:, None].expand(h, n))


def scan_is_the_recurrence_and_the_dual_form(op: Operator) -> None:
    for tokens, skip in ((1, True), (12, False), (70, True)):
        given = example("mamba-2", tokens)
        given["d"] = given["d"] if skip else None
        out, amap = op(**given)
        torch.testing.assert_close(out, loop(**given))
        torch.testing.assert_close(amap.dense(), dual_form(**{k: v for k, v in given.items() if k != "x"}))


ORDER = {
    "spatial-row": lambda t, r, c: (t, r, c),
    "spatial-column": lambda t, r, c: (t, c, r),
    "temporal-row": lambda t, r, c: (r, c, t),
    "temporal-column": lambda t, r, c: (c, r, t),
}


def sorted_cells(grid: tuple[int, int, int], order: str) -> list[tuple[int, int, int]]:
    cells = [(t, r, c) for t in range(grid[0]) for r in range(grid[1]) for c in range(grid[2])]
    return sorted(cells, key=lambda cell: ORDER[order](*cell))


def two_reordered_recurrences_after_box_means(op: Operator) -> None:
    grid, review, order = (2, 3, 3), (1, 2, 2), "temporal-column"
    for order in ORDER:
        given = {**example("lingen-rotary-major-scan", 18), "grid": grid, "order": order, "review": review}
        x, n = given["x"], 18
        boxes = (2, 2, 2)
        number = {cell: i for i, cell in enumerate(sorted_cells(grid, "spatial-row"))}
        box_number = {cell: i for i, cell in enumerate(sorted_cells(boxes, "spatial-row"))}
        means = [
            torch.stack([x[:, :, i] for (t, r, c), i in number.items() if (t, r // 2, c // 2) == box]).mean(0)
            for box in box_number
        ]
        values = torch.cat([torch.stack(means, 2), x], 2)
        path = [box_number[b] for b in sorted_cells(boxes, order)] + [8 + number[c] for c in sorted_cells(grid, order)]
        wanted = torch.zeros_like(x)
        for i, way in enumerate((path, path[::-1])):
            scanned = loop(
                values[:, :, way], given["dt"][:, i][..., way], given["a"][i],
                given["b"][:, i][:, :, way], given["c"][:, i][:, :, way], given["d"][i],
            )  # fmt: skip
            for place, token in enumerate(way):
                if token >= 8:
                    wanted[:, :, token - 8] += scanned[:, :, place]
        out, amap = op(**given)
        torch.testing.assert_close(out, wanted)
        torch.testing.assert_close(amap.dense() @ x, wanted)
        assert amap.shape[2:] == (n, n)


IDENTITIES: dict[str, Callable[[Operator], None]] = {
    "mamba-2": scan_is_the_recurrence_and_the_dual_form,
    "lingen-rotary-major-scan": two_reordered_recurrences_after_box_means,
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_identities(name: str) -> None:
    IDENTITIES[name](RECORDS[name].operator)


def test_hugging_face_computes_the_same() -> None:
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    given = example("mamba-2", 21)
    out, _ = RECORDS["mamba-2"](**given)
    x, dt, b, c = (given[name].transpose(1, 2).float() for name in ("x", "dt", "b", "c"))
    found = mamba2_chunk_scan(x, dt, given["a"].float(), b, c, 8, D=given["d"].float())
    torch.testing.assert_close(found.transpose(1, 2).double(), out, atol=1e-4, rtol=1e-4)


def test_errors_name_the_argument() -> None:
    given = example("mamba-2", 5)
    for name, wrong in (
        ("dt", given["dt"][:, :1]),
        ("a", given["a"][:1]),
        ("c", given["c"][..., :2]),
        ("d", given["d"][:1]),
    ):
        with pytest.raises(WorkbenchError, match=f"^{name} is"):
            RECORDS["mamba-2"](**{**given, name: wrong})
    three = given["b"][:, :1].expand(-1, 3, -1, -1)
    with pytest.raises(WorkbenchError, match="groups that divide"):
        RECORDS["mamba-2"](**{**given, "b": three, "c": three})
    given = example("lingen-rotary-major-scan", 8)
    with pytest.raises(UnknownName, match="scan order"):
        RECORDS["lingen-rotary-major-scan"](**{**given, "order": "row"})
    for name in ("grid", "review"):
        with pytest.raises(WorkbenchError, match=name):
            RECORDS["lingen-rotary-major-scan"](**{**given, name: (3, 0, 3)})
