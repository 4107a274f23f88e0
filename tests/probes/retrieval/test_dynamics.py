"""Which heads are active where, on planted trials."""

import math
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from copier import Copier, prompts

import workbench as wb
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.probes.retrieval.copying import RetrievalResult


def planted(active, length, depth=None, recall=None):
    """A sweep in which head h was active in the trials of ``active`` ``[R, H]``."""
    copied = torch.tensor(active, dtype=torch.float64)[:, None] * 0.5
    trials = len(copied)
    flat = torch.zeros(trials, dtype=torch.float64)
    return RetrievalResult(
        **dict.fromkeys(("null", "looks", "looks_null", "beyond"), torch.zeros_like(copied)),
        copied=copied,
        uniform=flat,
        length=torch.tensor(length),
        depth=flat if depth is None else torch.tensor(depth, dtype=torch.float64),
        recall=flat + 1 if recall is None else torch.tensor(recall, dtype=torch.float64),
        example=torch.arange(trials) % 2,
        layers=(0,),
        form="unique",
        threshold=0.1,
        seed=0,
    )


LENGTHS = [10] * 8 + [20] * 8
# always, in short texts only, every other trial, never
ACTIVE = [[1, int(i < 8), i % 2, 0] for i in range(16)]


def test_a_head_of_one_context_is_told_from_one_that_comes_and_goes():
    found = wb.retrieval_activation(planted(ACTIVE, LENGTHS), by="length")
    assert found.frequency[0].tolist() == [1, 0.5, 0.5, 0]
    assert found.kinds() == ["always", "sometimes", "sometimes", "never"]
    assert found.information[0].tolist() == pytest.approx([0, 1, 0, 0], abs=1e-12)
    assert found.by_context[:, 0].tolist() == [[1, 1, 0.5, 0], [1, 0, 0.5, 0]]
    assert found.p[0, 1] < 0.02
    assert found.p[0, [0, 2, 3]].tolist() == [1, 1, 1]
    assert 0 < found.information_null[0, 1] < 0.2
    assert found.contexts == ("10", "20")
    assert found.p_context < 0.02
    assert found.within > found.between


def test_information_and_similarity_are_their_definitions():
    generator = torch.Generator().manual_seed(0)
    active = (torch.rand(12, 5, generator=generator) < 0.5).int().tolist()
    length = [10] * 3 + [20] * 4 + [30] * 5
    found = wb.retrieval_activation(planted(active, length), by="length")
    for head in range(5):
        joint = {}
        for row, context in zip(active, length, strict=True):
            joint[row[head], context] = joint.get((row[head], context), 0) + 1 / 12
        bits = 0.0
        for (state, context), share in joint.items():
            p_state = sum(p for (s, _), p in joint.items() if s == state)
            p_context = sum(p for (_, c), p in joint.items() if c == context)
            bits += share * math.log2(share / (p_state * p_context))
        assert float(found.information[0, head]) == pytest.approx(bits, abs=1e-12)
    sets = [{h for h, on in enumerate(row) if on} for row in active]
    pairs = {
        (i, j): len(sets[i] & sets[j]) / len(sets[i] | sets[j])
        for i, j in combinations(range(12), 2)
        if sets[i] | sets[j]
    }
    for a, first in enumerate((10, 20, 30)):
        for b, second in enumerate((10, 20, 30)):
            own = [v for (i, j), v in pairs.items() if {length[i], length[j]} == {first, second}]
            if first == second:
                own = [v for (i, j), v in pairs.items() if length[i] == length[j] == first]
            assert float(found.jaccard[a, b]) == pytest.approx(sum(own) / len(own))
    same = [v for (i, j), v in pairs.items() if length[i] == length[j]]
    assert found.within == pytest.approx(sum(same) / len(same))


def test_contexts_are_lengths_depths_needles_or_labels():
    result = planted(ACTIVE, LENGTHS, depth=[0.0, 0.5] * 8)
    names = {by: wb.retrieval_activation(result, by, shuffles=2).contexts for by in ("cell", "depth", "example")}
    assert names["cell"] == ("10 at 0%", "10 at 50%", "20 at 0%", "20 at 50%")
    assert names["depth"] == ("0%", "50%")
    assert names["example"] == ("0", "1")
    labelled = wb.retrieval_activation(result, ["news"] * 4 + ["code"] * 12, shuffles=2)
    assert (labelled.by, labelled.contexts, labelled.trials.tolist()) == ("context", ("news", "code"), [4, 12])
    assert labelled.pairs()["first"].tolist() == ["news", "news", "code"]
    assert labelled.plot().get_xlabel() == "context"


def test_failed_trials_and_empty_sets_do_not_count():
    result = planted(ACTIVE, LENGTHS, recall=[0.0] * 4 + [1.0] * 12)
    found = wb.retrieval_activation(result, "length", shuffles=2)
    assert found.trials.tolist() == [4, 8]
    idle = wb.retrieval_activation(planted([[0, 0]] * 4, [10, 10, 20, 20]), "length", shuffles=2)
    assert idle.jaccard.isnan().all()
    assert math.isnan(idle.p_context)
    assert idle.plot().has_data()


def test_what_cannot_be_followed_is_refused():
    result = planted(ACTIVE, LENGTHS)
    with pytest.raises(UnknownName, match="cell, length, depth, example"):
        wb.retrieval_activation(result, "topic")
    with pytest.raises(WorkbenchError, match="each of the 16 trials; got 2"):
        wb.retrieval_activation(result, ["a", "b"])
    with pytest.raises(WorkbenchError, match="shuffles"):
        wb.retrieval_activation(result, shuffles=0)
    with pytest.raises(Refused, match="never"):
        wb.retrieval_activation(replace(result, reason="never"))


def test_a_sweep_of_several_needles_numbers_them():
    result = wb.retrieval_heads(Copier(), (12, 20), 2, prompts=prompts(n=3))
    assert result.example.tolist() == [0, 1, 2] * 4
    found = wb.retrieval_activation(result, "example", shuffles=5)
    assert found.kinds() == ["never", "never", "always", "never"]
    assert found.jaccard.tolist() == [[1.0] * 3] * 3
