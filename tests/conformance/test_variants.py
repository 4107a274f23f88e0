"""The conformance suite of the catalogue: every record, its operator, its map, and its own identity.

A new variant needs no line here: its record is in ``VARIANTS`` of its module, its identity in ``IDENTITIES`` of
``tests/mixers/test_<module>.py``.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench import attention_map
from workbench.attention_map import AttentionMap
from workbench.captures import capture
from workbench.catalogue import FAMILIES, MODULES, Variant, variants
from workbench.errors import Refused, UnknownName, WorkbenchError

Operator = Callable[..., tuple[Tensor, AttentionMap]]
RECORDS = list(variants())
TOLERANCE = 1e-10


@pytest.fixture(params=RECORDS, ids=[record.name for record in RECORDS])
def variant(request: pytest.FixtureRequest) -> Variant:
    return request.param


def example(variant: Variant, tokens: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Any]:
    return variant.example(seed, tokens, dtype)


def close(got: Tensor, wanted: Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(got.double(), wanted.double(), rtol=tolerance, atol=tolerance)


@cache
def identities() -> dict[str, Callable[[Operator], None]]:
    """The identities of all modules, by the name of the variant."""
    found: dict[str, Callable[[Operator], None]] = {}
    for path in sorted((Path(__file__).parents[1] / "mixers").glob("test_*.py")):
        spec = importlib.util.spec_from_file_location(f"identities_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for name, check in getattr(module, "IDENTITIES", {}).items():
            assert name not in found, f"two identities for {name}"
            found[name] = check
    return found


def broken(operator: Operator) -> Operator:
    """The operator with wrong numbers in the output and in the map."""

    def wrong(**arguments: Any) -> tuple[Tensor, AttentionMap]:
        out, amap = operator(**arguments)
        amap = copy.copy(amap)
        amap._memo = {}
        kind = type(amap)
        changed = {
            "rows": lambda self, lo, hi: kind.rows(self, lo, hi) * 1.1 + 0.01,
            "_tile": lambda self, a, b, c, d: kind._tile(self, a, b, c, d) * 1.1 + 0.01,
            "received": lambda self: kind.received(self) * 1.1 + 0.01,
            "row_sums": lambda self: kind.row_sums(self) * 1.1 + 0.01,
            "matvec": lambda self, v: kind.matvec(self, v) * 1.1 + 0.01,
            "native": lambda self: _wrong(kind.native(self)),
        }
        amap.__class__ = type(f"Broken{kind.__name__}", (kind,), changed)
        return out * 1.1 + 0.01, amap

    return wrong


def _wrong(native: Any) -> Any:
    return native * 1.1 + 0.01 if isinstance(native, Tensor) and native.is_floating_point() else native


# ------------------------------------------------------------------- the records


def test_the_catalogue_finds_by_name_and_says_what_exists() -> None:
    found = variants()
    assert found["grouped-query-attention"] is found[found.names.index("grouped-query-attention")]
    with pytest.raises(
        UnknownName, match="no attention variant 'grouped-query-atention'.*nearest: grouped-query-attention"
    ):
        found["grouped-query-atention"]
    table = found.frame()
    assert len(table) == len(found)
    assert set(table["family"]) <= set(FAMILIES)


def test_every_module_of_mixers_with_records_is_listed() -> None:
    folder = Path(inspect.getfile(attention_map)).parent / "mixers"
    holding = {p.stem for p in folder.glob("*.py") if re.search(r"^VARIANTS\b", p.read_text(), re.MULTILINE)}
    assert holding == set(MODULES)


def test_the_record_is_complete(variant: Variant) -> None:
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", variant.name)
    assert re.fullmatch(r"(#\d+ )?\S.+ \((19|20)\d\d\)", variant.paper), variant.paper
    assert variant.operator.__doc__
    assert len(variant.operator.__doc__) > 40
    assert variant.operator.__module__.startswith("workbench.mixers."), "operators are public functions of their module"
    assert not variant.operator.__name__.startswith("_")
    inspect.signature(variant.operator).bind(**example(variant, 5))
    if variant.value_input is not None:
        assert isinstance(example(variant, 5)[variant.value_input], Tensor)


def test_no_two_variants_are_the_same(variant: Variant) -> None:
    """Another record may share the operator, not what it computes."""
    out, _ = variant(**example(variant, 13))
    for other in RECORDS:
        if other is not variant and other.operator is variant.operator:
            mine, theirs = example(variant, 13), example(other, 13)
            fits = {k: theirs[k] if not isinstance(v, Tensor) and k in theirs else v for k, v in mine.items()}
            fits |= {k: v for k, v in theirs.items() if k not in mine}
            try:
                same = variant.operator(**fits)[0]
            except (WorkbenchError, TypeError, RuntimeError):
                continue  # the other record's arguments belong to another case of the operator
            assert same.shape != out.shape or not torch.allclose(same, out), (
                f"{variant.name} computes what {other.name} does"
            )


def test_examples_depend_on_the_seed_alone(variant: Variant) -> None:
    one, two, other = example(variant, 7), example(variant, 7), example(variant, 7, seed=1)
    tensors = [name for name, value in one.items() if isinstance(value, Tensor) and value.is_floating_point()]
    assert tensors
    assert all(torch.equal(one[name], two[name]) for name in tensors)
    assert any(not torch.equal(one[name], other[name]) for name in tensors)


# ------------------------------------------------------------------ the operators


@pytest.mark.parametrize("tokens", [1, 2, 7, 13])
def test_the_map_times_the_values_is_the_output(variant: Variant, tokens: int) -> None:
    arguments = example(variant, tokens)
    out, amap = variant(**arguments)
    assert torch.isfinite(out).all()
    assert not amap.dense().requires_grad
    if variant.value_input is None:
        assert amap.exactness != "exact"
        return
    close(amap.matvec(arguments[variant.value_input]), out)


def test_the_map_is_the_derivative_of_the_output(variant: Variant) -> None:
    """Every entry of the Jacobian by one backward pass per output number, batch entries added up."""
    if variant.value_input is None:
        return
    arguments = example(variant, 5)
    v = arguments[variant.value_input].clone().requires_grad_()
    out, amap = variant(**{**arguments, variant.value_input: v})
    dense = amap.dense()
    b, h, q, _ = dense.shape
    assert out.shape[:3] == (b, h, q)
    group, width = h // v.shape[1], out.shape[3]
    assert v.shape == (b, amap.kv_heads, dense.shape[3], width)
    outputs = out.sum(0)
    for head in range(h):
        for row in range(q):
            rows = []
            for channel in range(width):
                grad = torch.autograd.grad(outputs[head, row, channel], v, retain_graph=True)[0]
                rows.append(grad[:, head // group, :, channel].clone())
                grad[:, head // group, :, channel] = 0
                assert grad.abs().max() <= TOLERANCE, f"heads or channels mix in {variant.name}"
            found = torch.stack(rows, -1)
            if amap.channelwise:
                close(dense[:, head, row], found.mean(-1))
            else:
                close(dense[:, head, row][..., None].expand_as(found), found)


def test_grouped_heads_share_their_keys_and_values(variant: Variant) -> None:
    """Fewer key heads than query heads are the same as keys, values and what belongs to them repeated."""
    arguments = example(variant, 7)
    q, k = arguments.get("q"), arguments.get("k")
    if variant.name == "multi-query-attention" or not all(isinstance(x, Tensor) and x.ndim == 4 for x in (q, k)):
        return
    heads, groups = q.shape[1], k.shape[1]
    if heads == groups:
        return
    out, amap = variant(**arguments)

    def repeated(value: Any, axes: tuple[int, ...]) -> Any:
        if not isinstance(value, Tensor):
            return value
        axis = next((axis for axis in axes if value.ndim > axis + 1 and value.shape[axis] == groups), None)
        return value if axis is None else value.repeat_interleave(heads // groups, axis)

    sets = [
        ({"k", variant.value_input} - {None}, (1,)),
        (set(arguments) - {"q"}, (1,)),
        (set(arguments) - {"q"}, (1, 0)),
    ]
    for names, axes in sets:  # keys and values alone, then also other tensors, then also parameters of heads
        try:
            same, wide = variant(**{**arguments, **{name: repeated(arguments[name], axes) for name in names}})
        except WorkbenchError:
            continue
        break
    else:
        raise AssertionError("no way of repeating the key heads was accepted")
    close(same, out)
    close(wide.dense(), amap.dense())


def test_gradients_flow_through_the_operator(variant: Variant) -> None:
    arguments = example(variant, 7)
    leaves = {
        name: value.clone().requires_grad_()
        for name, value in arguments.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    out, _ = variant(**{**arguments, **leaves})
    grads = dict(
        zip(leaves, torch.autograd.grad(out.square().sum(), [*leaves.values()], allow_unused=True), strict=True)
    )
    assert all(torch.isfinite(grad).all() for grad in grads.values() if grad is not None)
    reached = [name for name, grad in grads.items() if grad is not None and bool((grad != 0).any())]
    assert reached
    if variant.value_input is not None:
        assert variant.value_input in reached


def test_float32_agrees_with_float64(variant: Variant) -> None:
    exact, _ = variant(**example(variant, 7))
    out, amap = variant(**example(variant, 7, torch.float32))
    assert out.dtype == torch.float32
    scale = float(exact.abs().max()) or 1.0
    assert float((out.double() - exact).abs().max()) <= 2e-4 * scale
    assert amap.dense().dtype == torch.float32


# ----------------------------------------------------------------------- the maps


@pytest.mark.parametrize("tokens", [1, 13])
def test_the_map_agrees_with_itself(variant: Variant, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, tiles, blocks, columns, masses and the adjoint against the dense map, in chunks of a few rows."""
    monkeypatch.setattr(attention_map, "CHUNK", 500)
    _, amap = variant(**example(variant, tokens))
    dense = amap.dense()
    b, h, q, k = dense.shape
    assert tuple(amap.shape) == (b, h, q, k)
    assert torch.isfinite(dense).all()
    close(amap.rows(q // 2, q), dense[:, :, q // 2 :])
    close(amap.tile(slice(q // 3, q), slice(0, k // 2 + 1)), dense[:, :, q // 3 :, : k // 2 + 1])
    close(amap.received(), dense.sum(2))
    close(amap.row_sums(), dense.sum(-1))
    for size in (1, 4, 64):
        nq, nk = -(-q // size), -(-k // size)
        for name, pool in (
            ("sum", lambda c: c.sum((-2, -1))), ("mean", lambda c: c.mean((-2, -1))),
            ("max", lambda c: c.amax((-2, -1))), ("abs", lambda c: c.abs().sum((-2, -1))),
        ):  # fmt: skip
            blocks = amap.blocks(size, name)
            assert blocks.shape == (b, h, nq, nk)
            for i in range(0, nq, max(1, nq - 1)):
                for j in range(0, nk, max(1, nk - 1)):
                    close(blocks[:, :, i, j], pool(dense[:, :, i * size : (i + 1) * size, j * size : (j + 1) * size]))
    gap = (torch.arange(q)[:, None] + amap.offset - torch.arange(k)).abs()
    close(amap.distance(), (dense * gap).sum(-1), 1e-8)
    weights = torch.randn(k, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    close(amap.mass(weights), dense @ weights)
    close(amap.mass(lambda b, h, q, k: k >= 1), dense[..., 1:].sum(-1))
    close(amap.topk(1).values, dense.topk(1, -1).values)
    whole = (
        amap.sign == "nonnegative" and amap.row_sum in ("1", "<=1", "gate") and float(dense.sum(-1).max()) <= 1 + 1e-8
    )
    if whole and not amap.channelwise:
        close(amap.entropy(), torch.special.entr(dense.clamp(min=0)).sum(-1))
    elif not whole:
        with pytest.raises(Refused):
            amap.entropy()
    chosen = amap.heads([h - 1])
    close(chosen.dense(), dense[:, h - 1 :])


@pytest.mark.parametrize("tokens", [1, 7])
def test_rmatvec_is_the_adjoint(variant: Variant, tokens: int) -> None:
    arguments = example(variant, tokens)
    out, amap = variant(**arguments)
    generator = torch.Generator().manual_seed(2)
    y = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    if variant.value_input is None:
        v = torch.randn(
            out.shape[0], amap.kv_heads, amap.shape[3], out.shape[3], generator=generator, dtype=torch.float64
        )
    else:
        v = torch.randn(arguments[variant.value_input].shape, generator=generator, dtype=torch.float64)
    back = amap.rmatvec(y)
    assert back.shape == v.shape
    close((amap.matvec(v) * y).sum(), (v * back).sum(), 1e-9)


def test_metadata_tells_the_truth(variant: Variant) -> None:
    _, amap = variant(**example(variant, 13))
    for name, known in attention_map.METADATA.items():
        assert known is None or getattr(amap, name) in known
    dense = amap.dense()
    sums = dense.sum(-1)
    if amap.sign == "nonnegative":
        assert float(dense.min()) >= -1e-12
    else:
        assert float(dense.min()) < 0, f"{variant.name} says signed and has no negative weight"
    if amap.row_sum == "1":
        close(sums, torch.ones_like(sums))
    if amap.row_sum == "<=1":
        assert float(sums.max()) <= 1 + 1e-10
    if amap.row_sum == "free" and amap.sign == "nonnegative":
        assert float((sums - 1).abs().max()) > 1e-8, f"{variant.name} says free and its rows sum to 1"
    if variant.causal:
        ahead = torch.arange(dense.shape[3]) > torch.arange(dense.shape[2])[:, None] + amap.offset
        assert not (dense * ahead).any(), f"{variant.name} says causal and looks ahead"
    assert amap.native() is not None
    assert type(amap).__name__ in repr(amap)


def test_a_summary_keeps_what_was_asked(variant: Variant) -> None:
    _, amap = variant(**example(variant, 13))
    received, blocks = amap.received(), amap.blocks(4)
    small = amap.precompute(capture(blocks=4, stats=("received", "distance"), keep=False))
    close(small.received(), received)
    close(small.blocks(4), blocks)
    with pytest.raises(Refused):
        small.dense()


# ------------------------------------------------------------------ the identities


def test_every_variant_has_an_identity_and_none_is_left_over() -> None:
    assert set(identities()) == {record.name for record in RECORDS}


def test_the_identity_holds(variant: Variant) -> None:
    identities()[variant.name](variant.operator)


def test_the_identity_notices_a_broken_operator(variant: Variant) -> None:
    with pytest.raises(AssertionError):
        identities()[variant.name](broken(variant.operator))


def test_no_rows_are_an_empty_tensor(variant: Variant) -> None:
    amap = variant(**example(variant, 9))[1]
    b, h, _, k = amap.shape
    assert amap.rows(0, 0).shape == (b, h, 0, k)
