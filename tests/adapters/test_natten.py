"""NATTEN through its FlexAttention back end: its output, our map of it, and its own definition of the mask."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from workbench.adapters.natten import from_natten
from workbench.errors import Refused, WorkbenchError
from workbench.mixers.neighborhood import neighborhood_indices

pytestmark = pytest.mark.filterwarnings("ignore")
CASES: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((37,), {"kernel_size": 7, "dilation": 2}),
    ((20,), {"kernel_size": 6, "stride": 3, "is_causal": True}),
    ((12,), {"kernel_size": 12}),
    ((9, 11), {"kernel_size": (3, 5), "stride": (2, 1), "is_causal": (True, False), "scale": 0.3}),
    ((8, 10), {"kernel_size": 3, "dilation": (2, 3)}),
    ((4, 5, 6), {"kernel_size": (2, 3, 3), "stride": (1, 2, 3)}),
]


def drawn(grid: tuple[int, ...], heads: tuple[int, int, int] = (2, 2, 2)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, *grid, h, 16, generator=generator) for h in heads]


@pytest.mark.parametrize(("grid", "options"), CASES)
def test_output_and_map(natten: ModuleType, grid: tuple[int, ...], options: dict[str, Any]) -> None:
    q, k, v = drawn(grid)
    out, amap = from_natten(q, k, v, **options)
    own = getattr(natten, f"na{len(grid)}d")(q, k, v, **options)
    assert torch.equal(out, own)
    values = v.flatten(1, len(grid)).transpose(1, 2)
    torch.testing.assert_close(amap.matvec(values), own.flatten(1, len(grid)).transpose(1, 2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("grid", "options"), CASES)
def test_neighbours_are_those_of_nattens_mask(
    natten: ModuleType, grid: tuple[int, ...], options: dict[str, Any]
) -> None:
    from natten.backends.flex import get_na_flex_mask

    axes = len(grid)
    each = {
        name: options.get(name, plain)
        for name, plain in (("kernel_size", 0), ("stride", 1), ("dilation", 1), ("is_causal", False))
    }
    sizes = {name: value if isinstance(value, tuple) else (value,) * axes for name, value in each.items()}
    theirs = get_na_flex_mask("cpu", axes, grid, **sizes).mask_mod
    n = torch.Size(grid).numel()
    at = torch.arange(n)
    shown = theirs(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64), at[:, None], at[None])
    ours = torch.zeros(n, n + 1, dtype=torch.bool)
    found = neighborhood_indices(
        grid, sizes["kernel_size"], stride=sizes["stride"], dilation=sizes["dilation"], causal=sizes["is_causal"]
    )
    ours.scatter_(1, found.masked_fill(found < 0, n), True)
    assert torch.equal(ours[:, :n], shown)


def test_fewer_key_heads(natten: ModuleType) -> None:
    q, k, v = drawn((10,), (4, 2, 2))
    out, amap = from_natten(q, k, v, 3)
    assert amap.shape == (2, 4, 10, 10)
    torch.testing.assert_close(amap.matvec(v.transpose(1, 2)), out.transpose(1, 2), atol=1e-5, rtol=1e-5)


def test_refusals(natten: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = drawn((10,))
    with pytest.raises(WorkbenchError, match="one to three axes"):
        from_natten(q[0], k[0], v[0], 3)
    with pytest.raises(Refused, match="additional_keys"):
        from_natten(q, k, v, 3, additional_keys=k, additional_values=v)
    monkeypatch.setattr(natten, "na1d", lambda q, k, v, *_, **__: v)
    with pytest.raises(Refused, match="away from neighborhood attention"):
        from_natten(q, k, v, 3)


def test_a_missing_library_says_where_to_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "natten", None)
    with pytest.raises(WorkbenchError, match=r"docs/install\.md"):
        from_natten(*drawn((10,)), 3)
