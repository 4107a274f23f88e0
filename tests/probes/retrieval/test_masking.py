from dataclasses import replace

import pytest
import torch
from copier import VOCAB, Copier, prompts

from workbench.errors import Refused, WorkbenchError
from workbench.models.protocol import Tokens
from workbench.probes.retrieval.copying import retrieval_heads
from workbench.probes.retrieval.masking import masking
from workbench.run import Run


def test_removing_the_copying_head_removes_the_answer():
    result = retrieval_heads(Copier(), (12, 20), 2, prompts=prompts(needle=(9,)))
    effect = masking(Copier(), result, top=1, random=3, prompts=prompts(needle=(9,)))
    table = effect.frame()
    assert table["condition"].tolist() == ["none", "top", "random", "random", "random"]
    assert table["heads"].tolist() == ["", "1.0", "1.1", "1.1", "1.1"]
    assert table["examples"].tolist() == [8] * 5
    assert table["probability"][0] > 0.99
    assert table["probability"][1] == pytest.approx(1 / VOCAB)
    assert table["accuracy"].tolist() == [1, 0, 1, 1, 1]
    assert effect.drop() == pytest.approx(table["probability"][0] - 1 / VOCAB)
    assert effect.drop("random") == pytest.approx(0)
    assert effect.plot().get_ylabel() == "probability of the answer"
    with pytest.raises(WorkbenchError, match="no condition 'best'"):
        effect.drop("best")


def test_token_0_is_an_answer_like_any_other_next_to_padding():
    class Constant(Copier):
        def run(self, tokens, *args, **options):
            return Run(Tokens.of(tokens), torch.zeros(len(tokens), 1, VOCAB).index_fill_(2, torch.tensor([0]), 9.0))

    result = retrieval_heads(Copier(), 12, 1, prompts=prompts(needle=(9,)))

    def build(length, depth, seed):
        found = prompts(needle=(9,))(length, depth, seed)
        return replace(found, answer=torch.tensor([[0, -1], [7, -1]]))

    effect = masking(Constant(), result, top=1, random=1, prompts=build)
    assert effect.accuracy[0].tolist() == [1, 0]
    assert effect.probability[0].tolist() == pytest.approx([0.994, 0.0001], abs=1e-3)


def test_masking_takes_other_layers_only_when_it_must():
    result = retrieval_heads(Copier(), 12, 1, prompts=prompts(needle=(9,)))
    effect = masking(Copier(), result, top=2, random=4, prompts=prompts(needle=(9,)))
    chosen = set(effect.heads[1])
    assert (1, 0) in chosen
    for heads in effect.heads[2:]:
        assert len(set(heads)) == 2
        assert not set(heads) & chosen
    with pytest.raises(Refused, match="smaller top"):
        masking(Copier(), result, top=3, prompts=prompts(needle=(9,)))
    with pytest.raises(WorkbenchError, match=r"retrieved at lengths \[12\]"):
        masking(Copier(), result, prompts=prompts(needle=(9,)), lengths=(99,))


def test_masking_by_default_removes_all_retrieval_heads_where_they_worked():
    limited = Copier(fails=lambda line: len(line) >= 20)
    result = retrieval_heads(limited, (12, 20), 2, prompts=prompts(needle=(9,)))
    effect = masking(limited, result, random=1, prompts=prompts(needle=(9,)))
    assert effect.heads[1] == ((1, 0),)
    assert effect.frame()["examples"].tolist() == [4] * 3
    assert effect.frame()["accuracy"].tolist() == [1, 0, 1]
    nothing = retrieval_heads(limited, 12, 1, prompts=prompts(needle=(9,)), threshold=1.5)
    with pytest.raises(Refused, match=r"no head reaches the threshold of 1\.5"):
        masking(limited, nothing, prompts=prompts(needle=(9,)))
