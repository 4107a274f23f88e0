import pytest
import torch

from workbench.errors import UnknownName, WorkbenchError
from workbench.graph import edge_parts
from workbench.pairs import Pairs
from workbench.probes.circuits.find import find_circuit
from workbench.probes.circuits.judgement.stability import stability
from workbench.results import load_result


def test_pairs_are_taken_by_number(make_pairs):
    plain = make_pairs(n=4)
    pairs = Pairs(
        plain.clean,
        plain.corrupt,
        plain.answer,
        plain.wrong,
        plain.position,
        {"S": torch.arange(8).view(4, 2)},
        {"kind": tuple("abcd")},
        ("w", "x", "y", "z"),
        dropped=3,
    )
    taken = pairs.take([2, 0, 2])
    for name in ("clean", "corrupt", "answer", "wrong", "position"):
        assert torch.equal(getattr(taken, name), getattr(pairs, name)[[2, 0, 2]])
    assert taken.spans["S"].tolist() == [[4, 5], [0, 1], [4, 5]]
    assert taken.labels["kind"] == ("c", "a", "c")
    assert taken.texts == ("y", "w", "y")
    assert taken.dropped == 3
    assert len(pairs.take([])) == 0
    assert torch.equal(pairs.take(torch.tensor([1, 3])).clean, pairs[1::2].clean)
    for wrong in ([4], [-1]):
        with pytest.raises(WorkbenchError, match="4 pairs, numbered from 0"):
            pairs.take(wrong)


def test_each_resample_is_a_circuit_of_its_own(make, make_pairs):
    model, pairs = make(), make_pairs(n=5)
    result = stability(model, pairs, "eap", top=10, resamples=4, seed=2)
    generator = torch.Generator().manual_seed(2)
    whole = set(find_circuit(model, pairs, "eap").top(10).edges)
    found = []
    for _ in range(4):
        picks = torch.randint(5, (5,), generator=generator).tolist()
        rows = torch.cat([find_circuit(model, pairs[i : i + 1], "eap").scores[None] for i in picks])
        found.append(set(find_circuit(model, pairs, "eap").rescored(rows.mean(0)).top(10).edges))
    for i in range(4):
        assert float(result.to_all[i]) == pytest.approx(len(found[i] & whole) / len(found[i] | whole))
        for j in range(4):
            assert float(result.jaccard[i, j]) == pytest.approx(len(found[i] & found[j]) / len(found[i] | found[j]))
    assert result.pairs.shape == (6,)
    assert result.mean == pytest.approx(float(result.pairs.mean()))
    assert result.spread[0] <= result.mean <= result.spread[1]
    names = find_circuit(model, pairs, "eap")
    for name, frequency in zip(names.names, result.frequency.tolist(), strict=True):
        assert frequency == sum(edge_parts(name) in circuit for circuit in found) / 4, name
    assert (result.low <= result.high).all()


def test_chance_is_what_random_rankings_give(make, make_pairs):
    result = stability(make(layers=1, heads=2, kv_heads=1), make_pairs(), "eap", "edge", top=6, resamples=2)
    n = len(result.names)
    generator = torch.Generator().manual_seed(0)
    drawn = [[set(torch.randperm(n, generator=generator)[:6].tolist()) for _ in range(2)] for _ in range(4000)]
    mean = sum(len(a & b) / len(a | b) for a, b in drawn) / len(drawn)
    assert result.chance == pytest.approx(mean, abs=0.01)


def test_a_known_circuit_is_found_on_every_resample(soft, induction, tmp_path):
    result = stability(soft, induction, "eap-ig", top=4, resamples=5, steps=3)
    assert result.mean == 1
    assert result.spread == (1, 1)
    assert result.frame().head(4).frequency.tolist() == [1.0] * 4
    assert set(result.frame().head(4).part) == {
        name for name, kept in zip(soft.ground_truth.names, soft.ground_truth.kept.tolist(), strict=True) if kept
    }
    assert result.chance < 0.05
    assert result.provenance["options"]["steps"] == 3
    assert load_result(result.save(tmp_path / "s")).frame().equals(result.frame())
    assert "Jaccard 1.00" in result.plot().get_title()
    again = stability(soft, induction, "eap-ig", top=4, resamples=5, steps=3)
    assert torch.equal(result.low, again.low)


def test_impossible_requests(soft, induction):
    with pytest.raises(WorkbenchError, match="at least 2"):
        stability(soft, induction, top=4, resamples=1)
    with pytest.raises(WorkbenchError, match="one example"):
        stability(soft, induction[:1], top=4)
    with pytest.raises(WorkbenchError, match="0 <= n <= 81"):
        stability(soft, induction, top=100)
    with pytest.raises(UnknownName, match="option of 'eap'"):
        stability(soft, induction, "eap", top=4, steps=3)
