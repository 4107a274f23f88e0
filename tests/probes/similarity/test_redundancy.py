"""Heads that repeat others are found, beside shuffled keys, and removing them is measured."""

import pytest
import torch

import workbench as wb
from workbench.errors import UnknownName, WorkbenchError
from workbench.models.protocol import Tokens
from workbench.probes.ablation import AblationCurve
from workbench.probes.examples import SENTENCE, random_rows
from workbench.probes.similarity.head_sharing import head_sharing
from workbench.probes.similarity.redundancy import head_redundancy, output_redundancy, redundancy_curve
from workbench.run import Activations, Run


def test_cosines_are_those_of_literal_loops(dense) -> None:
    rows = random_rows(2, 4, 9)
    found = head_redundancy(dense(rows))
    for h in range(4):
        each, chance = [], []
        for b in range(2):
            for g in range(4):
                if g == h:
                    continue
                x, y = rows[b, h].flatten(), rows[b, g].flatten()
                each.append(float(x @ y / (x.norm() * y.norm())))
                spread = sum(float(rows[b, h, i].sum() * rows[b, g, i].sum()) / (i + 1) for i in range(9))
                chance.append(spread / float(x.norm() * y.norm()))
        assert float(found.values["cosine"][0][h]) == pytest.approx(sum(each) / 6)
        assert float(found.null["cosine"][0][h]) == pytest.approx(sum(chance) / 6)


def test_equal_heads_are_each_others_nearest(dense) -> None:
    rows = random_rows(1, 4, 16)
    rows[:, 2] = rows[:, 0]
    found = head_redundancy(dense(rows))
    assert found.values["nearest"][0][[0, 2]].tolist() == pytest.approx([1, 1])
    assert found.values["partner"][0][[0, 2]].tolist() == [2, 0]
    assert {head.head for head in found.top("nearest", 2)} == {0, 2}
    assert float(found.null["nearest"][0][0]) < 0.9
    eye = torch.eye(16).double()
    apart = head_redundancy(dense(torch.stack([eye, eye.roll(1, 1)])[None]))
    assert apart.values["cosine"][0].tolist() == [0, 0]
    assert apart.null["cosine"][0].tolist() == pytest.approx([1 / 16, 1 / 16])  # one key of 16 hit by chance


def test_heads_of_the_layer_before(dense) -> None:
    one, two = random_rows(2, 3, 10), random_rows(2, 3, 10, seed=1)
    mixed = two.clone()
    mixed[:, 0] = one[:, 2]
    mixed[:, 1] = one[:, 1]
    found = head_sharing([dense(one), dense(mixed)])
    assert found.layers == (1,)
    assert float(found.values["same"][1][1]) == pytest.approx(1)
    assert float(found.values["same"][1][0]) < 0.99
    assert found.values["nearest"][1][:2].tolist() == pytest.approx([1, 1])
    assert found.values["partner"][1][:2].tolist() == [2, 1]
    fewer = head_sharing([dense(one[:, :2]), dense(mixed)])
    assert bool(fewer.values["same"][1][2].isnan())
    assert "2 heads" in fewer.undefined["1, same"]
    with pytest.raises(WorkbenchError, match="captured 1"):
        head_sharing(dense(one))


def test_undefined_is_nan_with_a_reason(dense) -> None:
    single = head_redundancy(dense(random_rows(1, 1, 5)))
    assert bool(single.values["cosine"][0].isnan().all())
    assert "only head" in single.undefined["0"]
    dead = random_rows(1, 3, 5)
    dead[:, 1] = 0
    found = head_redundancy(dense(dead))
    assert found.values["cosine"][0].isnan().tolist() == [False, True, False]
    assert bool(found.values["partner"][0][1].isnan())
    assert "0" in found.undefined


def outputs(z: torch.Tensor, site: str = "result", mask: torch.Tensor | None = None) -> Run:
    real = torch.ones(z.shape[:2], dtype=torch.bool) if mask is None else mask
    acts = {f"blocks.0.attn.hook_{site}": z}
    return Run(Tokens(torch.zeros(z.shape[:2], dtype=torch.int64), real), acts=Activations(acts))


def test_outputs_are_compared_by_cosine_and_cka() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 12, 3, 4, generator=generator, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64)).Q
    z[:, :, 1] = z[:, :, 0] @ turn + 5.0  # same geometry in another basis, moved
    found = output_redundancy(outputs(z))

    def cka(x: torch.Tensor, y: torch.Tensor) -> float:
        x, y = x - x.mean(0), y - y.mean(0)
        return float((x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))

    each = [[cka(z[b, :, h], z[b, :, g]) for b in range(2) for g in range(3) if g != h] for h in range(3)]
    assert found.values["cka"][0].tolist() == pytest.approx([sum(row) / 4 for row in each])
    assert each[0][0] == pytest.approx(1)
    x, y = z[0, :, 0].flatten(), z[0, :, 2].flatten()
    cosine = float(x @ y / x.norm() / y.norm())
    alone = output_redundancy(outputs(z[:1, :, [0, 2]]))
    assert alone.values["cosine"][0].tolist() == pytest.approx([cosine, cosine])
    wide = output_redundancy(outputs(torch.cat([z, torch.zeros(2, 12, 3, 20)], -1)))  # more channels than tokens
    torch.testing.assert_close(wide.values["cka"][0], found.values["cka"][0])


def test_nulls_are_means_over_shuffled_tokens() -> None:
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(1, 9, 2, 3, generator=generator, dtype=torch.float64) + 0.5
    found = output_redundancy(outputs(z))
    mixed = z.expand(4000, -1, -1, -1).clone()  # a sequence per shuffle: the table holds their mean
    order = torch.rand(4000, 9, generator=generator).argsort(1)
    mixed[:, :, 1] = z[0, :, 1][order]
    mean = output_redundancy(outputs(mixed)).values
    for name in ("cosine", "cka"):
        # Cosines and CKA of shuffles have a spread of .2 at most: .004 is more than one standard error, .012 three.
        assert float(found.null[name][0][0]) == pytest.approx(float(mean[name][0][0]), abs=0.012)


def test_padding_is_no_output() -> None:
    z = torch.randn(1, 9, 2, 3, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[False] * 3 + [True] * 9])
    padded = torch.cat([torch.full((1, 3, 2, 3), 7.0), z], 1)
    one, two = (output_redundancy(run) for run in (outputs(z), outputs(padded, mask=mask)))
    for name in ("cosine", "cka"):
        torch.testing.assert_close(one.values[name][0], two.values[name][0])
        torch.testing.assert_close(one.null[name][0], two.null[name][0])


def test_sites_are_named() -> None:
    z = torch.randn(1, 9, 2, 3)
    assert list(output_redundancy(outputs(z, "z"), site="z").values) == ["cka"]
    with pytest.raises(WorkbenchError, match="hook_result"):
        output_redundancy(outputs(z, "z"))
    with pytest.raises(UnknownName):
        output_redundancy(outputs(z), site="q")
    assert bool(output_redundancy(outputs(z[:, :2])).values["cka"][0].isnan().all())


def test_removing_redundant_heads_is_measured_beside_random_ones() -> None:
    model = wb.load("tiny-softmax")
    run = model.run(SENTENCE, maps=wb.capture())
    curve = redundancy_curve(model, [SENTENCE, SENTENCE], head_redundancy(run), counts=[1, 8], random=2)
    assert isinstance(curve, AblationCurve)
    assert (
        curve.order[0]
        == f"blocks.{head_redundancy(run).top()[0].layer}.attn.hook_z[{head_redundancy(run).top()[0].head}]"
    )
    table = curve.frame()
    assert bool((table["ranked"] > float(curve.base.mean()) - 0.5).all())
