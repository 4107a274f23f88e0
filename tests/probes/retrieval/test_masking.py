from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from copier import STOP, VOCAB, Copier, prompts

import workbench as wb
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.protocol import Tokens
from workbench.probes.retrieval.copying import retrieval_heads
from workbench.probes.retrieval.masking import masking, masking_curve
from workbench.run import EMPTY, Run
from workbench.sites import Site


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


def test_the_curve_falls_with_the_ranking_and_not_with_random_heads():
    model = wb.load("compiled-needle")
    result = retrieval_heads(model, (48, 64), 2, trials=2)
    seen = []
    curve = masking_curve(model, result, progress=lambda done, total: seen.append((done, total)))
    assert curve.counts == (1, 2)  # of 1, 2, 5 ...: as many others must be left outside the top
    assert curve.base.tolist() == [1.0] * 16
    assert (curve.ranked == 0).all()
    assert (curve.random == 1).all()
    assert curve.metric == "needle recall (random: outside the top 1)"
    assert seen == [(i + 1, 11) for i in range(11)]
    table = curve.frame()
    assert table["ranked_high"].tolist() == [0, 0]
    assert table["random_low"].tolist() == [1, 1]


@pytest.mark.parametrize("whole", [False, True])
def test_measures_of_the_first_token_agree_with_masking(whole):
    model = wb.load("compiled-needle")
    result = retrieval_heads(model, 48, 2, trials=2)
    single = masking(model, result, top=1, random=1).frame().set_index("condition")
    for metric in ("accuracy", "probability"):
        curve = masking_curve(model, result, ks=(1,), random=1, metric=metric, whole=whole)
        got = [float(part.mean()) for part in (curve.base, curve.ranked, curve.random)]
        assert got == pytest.approx([single.loc[name, metric] for name in ("none", "top", "random")], abs=1e-3)


def test_a_needle_of_several_tokens_is_written_out():
    """With the copying head off the answer is empty; the curve counts the tokens that come."""
    model = Copier()
    curve = masking_curve(model, [(1, 0), (0, 0)], ks=(1,), random=2, lengths=(12, 20), prompts=prompts())
    assert curve.base.tolist() == [1.0] * 12
    assert (curve.ranked == 0).all()
    assert (curve.random == 1).all()
    half = Copier(says=lambda needle: [*needle[:2], STOP])
    part = masking_curve(half, [(1, 0)], ks=(1,), random=1, lengths=(12,), depths=(0.5,), prompts=prompts())
    assert part.base.tolist() == pytest.approx([2 / 3] * 2)


def test_random_heads_stand_outside_the_top():
    """The heads drawn at random are told apart by what their absence does."""

    class Watched(Copier):
        off: ClassVar[set] = set()

        def run(self, tokens, read=(), edit=EMPTY, maps=None, **options):
            self.off |= {(Site.parse(s).layer, Site.parse(s).head) for s in edit}
            kept = {s: e for s, e in edit.items() if Site.parse(s).layer == 1 and Site.parse(s).head < 2}
            return super().run(tokens, read, kept, maps, **options)

    model = Watched()
    model.shape = replace(model.shape, layers=4, heads=30)
    ranking = [(layer, head) for layer in range(4) for head in range(30)]
    curve = masking_curve(
        model, ranking, ks=(1, 5, 20, 30), outside=100, random=20, lengths=(12,), depths=(0.5,), prompts=prompts()
    )
    assert curve.counts == (1, 5, 20)
    assert model.off == {(0, h) for h in range(20)} | {(3, h) for h in range(10, 30)}
    usual = masking_curve(model, ranking, ks=(1,), random=1, lengths=(12,), depths=(0.5,), prompts=prompts())
    assert usual.metric.endswith("outside the top 12)")


def test_a_score_file_is_a_ranking(tmp_path):
    model = wb.load("compiled-needle")
    path = retrieval_heads(model, 48, 1, trials=2).to_json(tmp_path / "scores.json")
    curve = masking_curve(model, wb.load_scores(path), ks=(1,), lengths=(48,), depths=(0.5,), random=1)
    assert curve.order[0] == "blocks.1.attn.hook_z[1]"
    assert (float(curve.ranked.mean()), float(curve.random.mean())) == (0, 1)


def test_what_cannot_be_masked_is_refused():
    model, ranking = Copier(), [(1, 0), (1, 1), (0, 0)]
    options = {"lengths": (12,), "prompts": prompts()}
    with pytest.raises(UnknownName, match="recall, accuracy, probability"):
        masking_curve(model, ranking, metric="rouge", **options)
    with pytest.raises(WorkbenchError, match="count from 1"):
        masking_curve(model, ranking, ks=(0,), **options)
    with pytest.raises(Refused, match="has 4 heads, 1 of them outside the top 3: too few to remove 2"):
        masking_curve(model, ranking, ks=(2,), outside=3, **options)
    with pytest.raises(WorkbenchError, match="outside counts heads, 1 to the 4"):
        masking_curve(model, ranking, outside=5, **options)
    with pytest.raises(WorkbenchError, match="names a head twice"):
        masking_curve(model, [(1, 0), (1, 0)], **options)
    with pytest.raises(WorkbenchError, match="names no heads"):
        masking_curve(model, [], **options)
    with pytest.raises(WorkbenchError, match="give lengths"):
        masking_curve(model, ranking, prompts=prompts())
    with pytest.raises(Refused, match="several stacks"):
        masking_curve(model, [("encoder.0", 1)], **options)
