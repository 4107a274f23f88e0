import pytest
import torch
from builders import native

import workbench as wb
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap, GatedMap
from workbench.patterns.softmax import SoftmaxMap
from workbench.probes.examples import random_maps, random_rows
from workbench.probes.retrieval.razor import razor_heads, razor_policy, razor_recall, razor_scores
from workbench.probes.retrieval.streaming import Streaming


@torch.no_grad()
def test_scores_are_what_loops_over_the_map_give():
    model = native().model
    found = razor_scores(model, 5, 3, sequences=2, seed=3)
    seen = {}

    def spy(text, maps=None, **options):
        seen.setdefault("texts", []).append(text)
        return type(model).run(model, text, maps=maps, **options)

    model.run = spy
    again = razor_scores(model, 5, 3, sequences=2, seed=3)
    del model.run
    assert again.frame().equals(found.frame())
    repeated, control = seen["texts"]
    assert repeated.shape == control.shape == (2, 15)  # no tokenizer, no first token
    assert (repeated[:, 5:10] == repeated[:, :5]).all()
    assert all(len(row.unique()) == 5 for row in repeated)
    for text, part in ((repeated, found.values), (control, found.null)):
        run = model.run(text, maps=wb.capture())
        for layer in range(2):
            dense = run.maps[layer].dense()
            for h in range(4):
                echo = [float(dense[b, h, i, i - 5]) for b in range(2) for i in range(5, 15)]
                ahead = [float(dense[b, h, i, i - 4]) for b in range(2) for i in range(5, 15)]
                assert part["echo"][layer][h] == pytest.approx(sum(echo) / 20)
                assert part["induction"][layer][h] == pytest.approx(sum(ahead) / 20)


def test_the_compiled_induction_head_comes_first():
    from workbench.datasets.words import words

    model = wb.load("compiled-induction")
    found = razor_scores(model, 16, 4, words=words("symbols"))
    best, second = found.top("induction", 2)
    assert best[:2] == (1, 2)
    # later copies look at all earlier ones alike: 1, 1/2 and 1/3 of it one period back
    assert best.value == pytest.approx((1 + 1 / 2 + 1 / 3) / 3, abs=0.02)
    assert best.null < 0.05
    assert second.value < 0.01
    assert best.value > 10 * found.top("echo", 1)[0].value


def scores(*rows):
    """A model's scores as planted: echo and induction per layer."""
    from workbench.probes.retrieval import razor

    values = {
        "echo": {i: torch.tensor(row[0]) for i, row in enumerate(rows)},
        "induction": {i: torch.tensor(row[1]) for i, row in enumerate(rows)},
    }
    return lambda groups, echo, induction: razor._kept(values, dict.fromkeys(range(len(rows)), groups), echo, induction)


def test_a_group_has_its_best_head_and_the_first_ones_are_kept():
    made = scores(([0.1, 0.9, 0.2, 0.2], [0.0, 0.0, 0.1, 0.3]), ([0.0, 0.0, 0.0, 0.0], [0.2, 0.2, 0.0, 0.4]))
    kept = made(2, 0.01, 0.25)  # echo: one at least, 0.0; induction: one of four, 1.1
    assert kept[0].tolist() == [1, 1, 0, 0]
    assert kept[1].tolist() == [0, 0, 1, 1]
    kept = made(2, 0.0, 0.5)
    assert kept[0].tolist() == [0, 0, 1, 1]
    assert kept[1].tolist() == [0, 0, 1, 1]
    assert made(4, 0.0, 0.125)[1].tolist() == [0, 0, 0, 1]
    with pytest.raises(WorkbenchError, match="0 to 1"):
        made(2, 1.5, 0.1)


def test_published_parts_of_a_thousand_heads():
    made = scores(*[(torch.rand(32).tolist(), torch.rand(32).tolist()) for _ in range(32)])
    kept = torch.cat(list(made(32, 0.01, 0.14).values()))
    assert 143 <= kept.sum() <= 153  # 10 of 1,024 by echo, 143 by induction, some by both


def test_heads_are_split_by_key_value_head():
    model = native().model
    table = razor_scores(model, 5, 2, induction=0.25, echo=0.0)
    kept, others = razor_heads(table, 2)
    assert len(kept) == 1
    assert sorted(kept + others) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    with pytest.raises(WorkbenchError, match="no multiple of 3"):
        razor_heads(table, 3)
    with pytest.raises(UnknownName, match="kept"):
        razor_heads(razor_recall(random_maps()), 2)


def test_recall_is_the_mass_on_first_and_last_tokens():
    rows = random_rows(2, 3, 14)
    found = razor_recall(AttentionMap.from_dense(rows), [(0, 2)], Streaming(2, 3))
    for h in range(3):
        mass, even = [], []
        for b in range(2):
            for i in range(14):
                held = [j for j in range(i + 1) if j < 2 or i - j < 3]
                mass.append(float(rows[b, h, i, held].sum()))
                even.append(len(held) / (i + 1))
        assert found.values["recall"][0][h] == pytest.approx(sum(mass) / len(mass))
        assert found.null["recall"][0][h] == pytest.approx(sum(even) / len(even))
    assert found.values["policy"][0].tolist() == [*found.values["recall"][0][:2].tolist(), 1.0]


def test_the_published_policy():
    assert razor_policy(1000) == Streaming(4, 4000, True)
    assert razor_policy(50_000) == Streaming(4, 10_000, True)
    found = razor_recall(random_maps())
    assert all((row - 1).abs().max() < 1e-12 for row in found.values["recall"].values())


def test_padding_does_not_count_and_gates_are_looked_inside():
    model = wb.load("tiny-gated")
    texts = ["Mary and John went to the store . John gave a book to Mary", "The happy student moved to the lake"]
    with torch.no_grad():
        both = model.run(texts, maps=wb.capture())
        alone = [model.run(text, maps=wb.capture()) for text in texts]
    policy = Streaming(1, 3)
    together = razor_recall(both, policy=policy).values["recall"]
    each = [razor_recall(run, policy=policy).values["recall"] for run in alone]
    for layer in together:
        torch.testing.assert_close(together[layer], (each[0][layer] + each[1][layer]) / 2, atol=1e-6, rtol=1e-5)
    plain = random_maps(1, 2)[0]
    gated = GatedMap(plain, torch.rand(plain.shape[:3], dtype=torch.float64))
    one, two = (razor_recall(m, policy=policy).values["recall"][0] for m in (plain, gated))
    torch.testing.assert_close(one, two)


def test_first_tokens_are_the_first_real_ones():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 9, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    padded = [
        torch.cat([torch.randn(1, 2, 3, 4, dtype=torch.float64, generator=generator), part], 2) for part in (q, k)
    ]
    real = (torch.arange(12) >= 3)[None]
    plain = SoftmaxMap(q, k, mask=Mask(causal=True))
    left = SoftmaxMap(*padded, mask=Mask(causal=True, keys=real, queries=real))
    one, two = (razor_recall(m, policy=Streaming(2, 3)) for m in (plain, left))
    torch.testing.assert_close(two.values["recall"][0], one.values["recall"][0])
    torch.testing.assert_close(two.null["recall"][0], one.null["recall"][0])


def test_induction_heads_of_the_trained_model_retrieve():
    """The heads that RazorAttention keeps carry the needle; with all others cut short the answer stays."""
    from workbench.probes.examples import needles
    from workbench.probes.heads.repeats import task_words
    from workbench.probes.retrieval.streaming import streaming_effect

    model = wb.load("tiny-softmax")
    table = razor_scores(model, words=task_words(model))
    assert {head.layer for head in table.top("induction", 4)} == {1}
    kept, others = razor_heads(table, 8)
    assert len(kept) in (4, 5)
    effect = streaming_effect(
        model, needles(model, 96, 8), {"others": others}, Streaming(4, 16, True), random=6, metrics=("probability",)
    )
    rows = effect.frame().set_index("random")["probability"]
    assert rows[False].iloc[-1] > 0.6
    assert float(rows[True]) < 0.4


def test_what_cannot_be_scored_is_refused():
    model = native().model
    with pytest.raises(WorkbenchError, match="repeats is at least 2"):
        razor_scores(model, 5, 1)
    with pytest.raises(WorkbenchError, match="two tokens or more"):
        razor_scores(model, 1)
    with pytest.raises(Refused, match="signed token map"):
        razor_recall(AttentionMap.from_dense(-random_rows()))
