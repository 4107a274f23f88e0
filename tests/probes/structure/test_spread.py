"""Distance spectra, receptive fields, pointers and oracle recall against loops and closed forms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench as wb
from workbench.errors import Refused, WorkbenchError
from workbench.maps import AttentionMap, GatedMap
from workbench.models.protocol import Tokens
from workbench.probes.examples import SENTENCE, random_maps, random_rows
from workbench.probes.structure.oracle import oracle_recall, sparsified
from workbench.probes.structure.pointers import pointer_fidelity
from workbench.probes.structure.spectra import distance_spectra, octaves, receptive_fields
from workbench.run import Maps, Run


def uniform(length):
    rows = torch.ones(length, length, dtype=torch.float64).tril()
    return AttentionMap.from_dense((rows / rows.sum(-1, keepdim=True))[None, None])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 14), st.booleans(), st.integers(0, 99))
def test_spectra_are_what_a_loop_says(length, causal, seed):
    rows = random_rows(2, 2, length, seed=seed, causal=causal)
    found = distance_spectra(AttentionMap.from_dense(rows)).weight[0]
    for b in range(2):
        for h in range(2):
            for d in range(length):
                want = (
                    sum(float(rows[b, h, q, k]) for q in range(length) for k in range(length) if abs(q - k) == d)
                    / length
                )
                assert float(found[b, h, d]) == pytest.approx(want, abs=1e-12)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 2, dtype=torch.float64))


def test_spectra_of_planted_heads():
    n = 16
    rows = torch.zeros(1, 2, n, n, dtype=torch.float64)
    rows[0, 0] = torch.eye(n)
    rows[0, 1, torch.arange(n), (torch.arange(n) - 5).clamp(min=0)] = 1
    found = distance_spectra(AttentionMap.from_dense(rows))
    assert float(found.weight[0][0, 0, 0]) == 1.0
    assert float(found.weight[0][0, 1, 5]) == (n - 5) / n
    table = found.frame()
    assert table[(table["head"] == 1) & (table["near"] == 4)]["weight"].tolist() == pytest.approx(
        [12 / n]
    )  # 4 and 5 tokens back
    fields = receptive_fields(AttentionMap.from_dense(rows), parts=(0.5, 1.0)).frame()
    assert fields["within_50"].tolist() == [0, 5]
    assert fields["within_100"].tolist() == [0, 5]


def test_uniform_attention_is_its_own_null():
    found = distance_spectra(uniform(12)).frame()
    assert found["weight"].tolist() == pytest.approx(found["even"].tolist())
    fields = receptive_fields(uniform(12)).frame()
    assert fields["within_90"].tolist() == fields["within_90_null"].tolist()


def test_octaves_cover_all_distances_once():
    for length in range(1, 70):
        covered = [d for near, far in octaves(length) for d in range(near, far + 1)]
        assert covered == list(range(length))


def padded_run():
    rows = random_rows(2, 2, 10, seed=4)
    rows[1, :, :, 7:] = 0
    rows[1, :, 7:] = 0
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[1, 7:] = False
    run = Run(
        Tokens(torch.zeros(2, 10, dtype=torch.long), mask), maps=Maps({0: AttentionMap.from_dense(rows, row_sum="<=1")})
    )
    return run, AttentionMap.from_dense(rows[:1]), AttentionMap.from_dense(rows[1:, :, :7, :7])


def test_a_batch_with_padding_is_its_texts():
    run, *alone = padded_run()
    both = distance_spectra(run).weight[0]
    for b, amap in enumerate(alone):
        one = distance_spectra(amap).weight[0][0]
        torch.testing.assert_close(both[b, :, : one.shape[1]], one)
        assert float(both[b, :, one.shape[1] :].sum()) == 0
    for call in (
        lambda s: oracle_recall(s, keys=(1, 3)),
        lambda s: pointer_fidelity(s, lambda b, h, q, k: k == q - 1),
        lambda s: receptive_fields(s),
    ):
        together, parts = call(run), [call(amap) for amap in alone]
        for name, values in together.values.items():
            torch.testing.assert_close(values[0], (parts[0].values[name][0] + parts[1].values[name][0]) / 2)
            torch.testing.assert_close(
                together.null[name][0].double(), (parts[0].null[name][0] + parts[1].null[name][0]).double() / 2
            )


def test_entropy_of_uniform_rows_and_fidelity_of_pointers():
    n = 16
    full = AttentionMap.from_dense(torch.full((1, 1, n, n), 1 / n, dtype=torch.float64))
    found = pointer_fidelity(full, torch.zeros(n, dtype=torch.long)).frame()
    assert found["entropy"].tolist() == pytest.approx([math.log2(n)])
    assert found["entropy_null"].tolist() == pytest.approx([math.log2(n)])
    assert found["fidelity"].tolist() == pytest.approx([1 / n])
    rows = random_rows(1, 1, 8)
    rows[0, 0, 3:] *= 0.2
    rows[0, 0, 3:, 2] += 0.8
    targets = torch.tensor([-1, -1, -1, 2, 2, 2, 2, 2])
    one = pointer_fidelity(AttentionMap.from_dense(rows), targets).frame()
    assert one["fidelity"].tolist() == pytest.approx([float(rows[0, 0, 3:, 2].mean())])
    assert one["fidelity_null"].tolist() == pytest.approx([sum(1 / (q + 1) for q in range(3, 8)) / 5])


def test_a_rule_without_targets_is_undefined():
    found = pointer_fidelity(random_maps(1), torch.full((12,), -1))
    assert found.frame()["fidelity"].isna().all()
    assert found.undefined["0 fidelity"] == "no query has a target that it may see"
    free = AttentionMap.from_dense(torch.rand(1, 1, 5, 5).tril() * 3, row_sum="free")
    assert pointer_fidelity(free, torch.zeros(5, dtype=torch.long)).frame()["entropy"].isna().all()


def test_oracle_recall_is_what_a_loop_says():
    rows = random_rows(1, 2, 9, seed=6)
    found = oracle_recall(AttentionMap.from_dense(rows), keys=(1, 4, 20)).frame()
    for h in range(2):
        for k in (1, 4):
            want = sum(float(row.sort(descending=True).values[:k].sum()) for row in rows[0, h]) / 9
            assert found[f"top_{k}"][h] == pytest.approx(want)
    assert found["top_20"].tolist() == pytest.approx([1, 1])
    assert found["top_4_null"][0] == pytest.approx(sum(min(1, 4 / (q + 1)) for q in range(9)) / 9)


def test_oracle_lies_above_chance_and_identity_needs_one_key():
    found = oracle_recall(random_maps(1, tokens=20)).frame()
    for k in (1, 2, 4, 8):
        assert (found[f"top_{k}"] >= found[f"top_{k}_null"]).all()
    eye = AttentionMap.from_dense(torch.eye(6, dtype=torch.float64)[None, None])
    assert oracle_recall(eye, keys=(1,)).frame()["top_1"].tolist() == [1]


def test_gates_change_no_recall():
    rows = AttentionMap.from_dense(random_rows(1, 2, 10))
    gated = GatedMap(rows, torch.rand(1, 2, 10, dtype=torch.float64) + 0.1)
    plain, acting, inside = (
        oracle_recall(m, raw=raw).frame() for m, raw in ((rows, False), (gated, False), (gated, True))
    )
    assert acting["top_2"].tolist() == pytest.approx(plain["top_2"].tolist())
    assert inside["top_2"].tolist() == pytest.approx(plain["top_2"].tolist())


def test_the_largest_keys_carry_more_than_random_ones():
    found = sparsified(wb.load("tiny-softmax"), SENTENCE, keys=(2, 4, 64), random=3).frame()
    assert (found["largest"][:2] < found["random"][:2]).all()
    assert found["largest"].is_monotonic_decreasing
    assert found["largest"][2] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: oracle_recall(m, keys=()), "numbers of keys per query"),
        (lambda m: receptive_fields(m, parts=(0,)), r"lie in \(0, 1\]"),
        (lambda m: pointer_fidelity(m, torch.zeros(3, dtype=torch.long)), "targets are keys"),
        (lambda m: pointer_fidelity(m, torch.full((12,), 12)), "keys below 12"),
        (lambda m: sparsified(wb.load("tiny-softmax"), SENTENCE, keys=(0,)), "at least 1"),
    ],
)
def test_wrong_arguments_are_named(call, said):
    with pytest.raises(WorkbenchError, match=said):
        call(random_maps(1))


def test_signed_maps_are_refused():
    signed = AttentionMap.from_dense(torch.randn(1, 1, 6, 6).tril(), sign="signed")
    for call in (
        distance_spectra,
        receptive_fields,
        oracle_recall,
        lambda m: pointer_fidelity(m, torch.zeros(6, dtype=torch.long)),
    ):
        with pytest.raises(Refused, match="signed"):
            call(signed)
