"""What stays from step to step, against literal sums; keeping it costs nothing where nothing changed."""

import math

import pytest
import torch

import workbench as wb
from workbench.errors import Refused, WorkbenchError
from workbench.mixers.flash_block import flash_block_attention
from workbench.models.native_config import NativeConfig
from workbench.models.native_net import NativeNet
from workbench.probes.examples import SENTENCE, random_rows
from workbench.probes.similarity.stability import map_stability, row_stability
from workbench.probes.similarity.steps import OTHER, reuse_external, step_stability

READ = [f"blocks.{layer}.attn.hook_v" for layer in range(4)]


def test_maps_are_compared_as_literal_vectors(dense) -> None:
    one, two = random_rows(2, 2, 7), random_rows(2, 2, 7, seed=1)
    found = map_stability(dense(one), dense(two))
    for h in range(2):
        change, cosine, null = [], [], []
        for b in range(2):
            x, y = one[b, h], two[b, h]
            change.append(float((y - x).norm() / x.norm()))
            cosine.append(float((x * y).sum() / x.norm() / y.norm()))
            spread = sum(float(x[i].sum() * y[i].sum()) / (i + 1) for i in range(7))
            null.append(math.sqrt(float(x.norm() ** 2 + y.norm() ** 2) - 2 * spread) / float(x.norm()))
        assert float(found.values["change"][0][h]) == pytest.approx(sum(change) / 2)
        assert float(found.values["cosine"][0][h]) == pytest.approx(sum(cosine) / 2)
        assert float(found.null["change"][0][h]) == pytest.approx(sum(null) / 2)
    same = map_stability(dense(one), dense(one))
    assert same.values["change"][0].tolist() == [0, 0]
    assert same.values["cosine"][0].tolist() == pytest.approx([1, 1])


def test_rows_are_compared_with_their_neighbours(dense) -> None:
    rows = random_rows(1, 2, 7)
    found = row_stability(dense(rows))
    for h in range(2):
        own = rows[0, h]
        each = [float(own[i] @ own[i + 1] / own[i].norm() / own[i + 1].norm()) for i in range(6)]
        assert float(found.values["cosine"][0][h]) == pytest.approx(sum(each) / 6)
    eye = torch.eye(12)[None]
    column = torch.zeros(1, 12, 12)
    column[..., 0] = 1
    moving, still = row_stability(dense(torch.stack([eye[0], column[0]])[None])).values["cosine"][0].tolist()
    assert (moving, still) == (0, 1)
    assert bool(row_stability(dense(random_rows(1, 1, 1, keys=3))).values["cosine"][0].isnan())


def test_parts_of_blocks_are_those_of_literal_sums(dense) -> None:
    size, n = 3, 8
    maps = [random_rows(2, 4, n, seed=seed) for seed in range(2)]
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(2, 2, n, 5, generator=generator, dtype=torch.float64) for _ in range(2)]
    found = step_stability(dense(maps[0]), dense(maps[1]), size, values=({0: values[0]}, {0: values[1]}))

    def part(step: int, b: int, h: int, i: int, outside: bool) -> torch.Tensor:
        total, mass = torch.zeros(5).double(), 0.0
        for j in range(n):
            if (j // size != i // size) == outside:
                total += maps[step][b, h, i, j] * values[step][b, h // 2, j]
                mass += float(maps[step][b, h, i, j])
        return total / mass

    def gap(h: int, block: int, outside: bool, other: tuple[int, int]) -> tuple[float, float]:
        changes, cosines = [], []
        step, shift = other
        for b in range(2):
            rows = [i for i in range(n) if i // size == block and (i + shift) < n]
            x = torch.stack([part(0, b, h, i, outside) for i in rows]).flatten()
            y = torch.stack([part(step, b, h, i + shift, outside) for i in rows]).flatten()
            changes.append(float((y - x).norm() / x.norm()))
            cosines.append(float(x @ y / x.norm() / y.norm()))
        return sum(changes) / 2, sum(cosines) / 2

    for h in range(4):
        for block in range(3):
            inside = gap(h, block, False, (1, 0))
            assert float(found.values["internal"][0][h, block]) == pytest.approx(inside[0])
            assert float(found.values["internal_cosine"][0][h, block]) == pytest.approx(inside[1])
            if block:
                outside = gap(h, block, True, (1, 0))
                assert float(found.values["external"][0][h, block]) == pytest.approx(outside[0])
                assert float(found.values["external_cosine"][0][h, block]) == pytest.approx(outside[1])
        mass = [float(maps[0][b, h, 6:, :6].sum()) / 2 for b in range(2)]
        assert float(found.values["mass"][0][h, 2]) == pytest.approx(sum(mass) / 2)
    assert bool(found.values["external"][0][:, 0].isnan().all())
    assert "0" in found.undefined
    assert bool(found.null["external"][0][:, 1:].isfinite().all())


def test_padding_does_not_move_blocks() -> None:
    model = wb.load("tiny-softmax")
    texts = [SENTENCE, "John gave a book to Mary"]
    others = [OTHER, "John gave a ball to Mary"]
    together = step_stability(*(model.run(x, read=READ, maps=wb.capture()) for x in (texts, others)), size=4)
    alone = [
        step_stability(*(model.run(x, read=READ, maps=wb.capture()) for x in pair), size=4)
        for pair in zip(texts, others, strict=True)
    ]
    for name in ("external", "internal", "mass"):
        for layer, got in together.values[name].items():
            parts = [one.values[name][layer] for one in alone]
            wide = torch.full((2, *got.shape), float("nan"), dtype=got.dtype)
            for row, values in zip(wide, parts, strict=True):
                row[:, : values.shape[1]] = values
            torch.testing.assert_close(got, wide.nanmean(0), atol=2e-4, rtol=2e-3, equal_nan=True)


def test_a_stable_outside_is_told_from_a_changing_inside() -> None:
    """Denoising by hand: only the block's own tokens change; its queries barely do."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (1, 2, 6, 8), "k": (1, 2, 18, 8), "v": (1, 2, 18, 8)}
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes.values())
    later_k, later_v = k.clone(), v.clone()
    later_k[:, :, 12:], later_v[:, :, 12:] = (
        torch.randn(1, 2, 6, 8, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    later_q = q + 0.05 * torch.randn(q.shape, generator=generator, dtype=torch.float64)
    one, two = flash_block_attention(q, q, k, v)[1], flash_block_attention(later_q, later_q, later_k, later_v)[1]
    found = step_stability(one, two, 6, values=({0: v}, {0: later_v})).heads().values
    assert float(found["external"][0].max()) < 0.15 < 0.5 < float(found["internal"][0].min())
    # The published cache: with the old queries outside, the outside does not change at all.
    cached = flash_block_attention(later_q, q, later_k, later_v)[1]
    kept = step_stability(one, cached, 6, values=({0: v}, {0: later_v})).heads().values
    assert kept["external"][0].tolist() == pytest.approx([0, 0], abs=1e-9)


@pytest.mark.parametrize("name", ["tiny-softmax", "tiny-gated"])
def test_keeping_what_did_not_change_costs_nothing(name: str) -> None:
    model = wb.load(name)
    same = reuse_external(model, [SENTENCE], [SENTENCE], 4)
    assert float(same.reused.abs().max()) < 1e-9
    assert float(same.nothing[0].min()) > 0.5
    other = reuse_external(model, SENTENCE, OTHER, 4, layers=[0])
    table = other.frame()
    assert float(table["reused"][0]) < 0.01 < float(table["nothing"][0])
    assert float(table["reused"][0]) < float(table["neighbour"][0])


def test_reuse_leaves_padding_alone() -> None:
    model = wb.load("tiny-softmax")
    texts, others = [SENTENCE, "John gave a book to Mary"], [OTHER, "John gave a ball to Mary"]
    together = reuse_external(model, texts, others, 4, layers=[0])
    alone = [reuse_external(model, *pair, 4, layers=[0]) for pair in zip(texts, others, strict=True)]
    for name in ("reused", "nothing", "neighbour"):
        parts = torch.cat([getattr(one, name) for one in alone], 1)
        torch.testing.assert_close(getattr(together, name), parts, atol=1e-4, rtol=1e-3)


def test_mistakes_are_told(dense) -> None:
    rows = random_rows(1, 2, 6)
    values = {0: torch.zeros(1, 2, 6, 3)}
    with pytest.raises(WorkbenchError, match="same layers"):
        map_stability([dense(rows)], [dense(rows), dense(rows)])
    with pytest.raises(WorkbenchError, match="one shape"):
        map_stability(dense(rows), dense(rows[:, :1]))
    with pytest.raises(WorkbenchError, match="values="):
        step_stability(dense(rows), dense(rows), 2)
    with pytest.raises(WorkbenchError, match="at least one token"):
        step_stability(dense(rows), dense(rows), 0, values=(values, values))
    with pytest.raises(WorkbenchError, match="values are"):
        step_stability(dense(rows), dense(rows), 2, values=({0: torch.zeros(1, 2, 5, 3)}, values))
    signed = dense(rows - 0.1)
    with pytest.raises(Refused, match="map_stability"):
        step_stability(signed, signed, 2, values=(values, values))
    run = wb.load("tiny-softmax").run("a b c", maps=wb.capture())
    with pytest.raises(WorkbenchError, match="hook_v"):
        step_stability(run, run, 2)


def test_a_bidirectional_model_of_grouped_heads() -> None:
    torch.manual_seed(0)
    config = NativeConfig(layers=2, heads=4, kv_heads=2, width=16, head_width=4, vocab=11, causal=False)
    model = wb.NativeModel(NativeNet(config).eval())
    one, two = torch.arange(12)[None] % 11, (torch.arange(12)[None] * 3) % 11
    found = reuse_external(model, one, one, 4)
    assert float(found.reused.abs().max()) < 1e-6
    assert float(found.nothing.min()) > 0
    runs = [model.run(x, read=READ[:2], maps=wb.capture()) for x in (one, two)]
    assert bool(step_stability(*runs, size=4).values["external"][0].isfinite().all())
