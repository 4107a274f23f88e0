"""Several needles in one context, each asked for in turn."""

import pytest
import torch
from copier import Copier
from copier import prompts as one_needle

import workbench as wb
from workbench.errors import Refused, WorkbenchError
from workbench.maps import AttentionMap
from workbench.models.protocol import Manifest, Shape, Tokens
from workbench.pairs import Pairs
from workbench.probes.retrieval.choosing import _table, _Turn, in_turn
from workbench.run import EMPTY, Maps, Provenance, Run

NEEDLES, VOCAB = 3, 40
KEYS, VALUES = (10, 11, 12), (20, 21, 22)


class Chooser:
    """Reads ``.. key value .. key value .. key`` and writes the value of the last key.

    Head 0.0 looks at that value, 0.1 always at the first one, 0.2 at each in turn by chance of the length, 0.3 at the last token.
    """

    name = "chooser"
    tokenizer = None

    def __init__(self, confuses=False):
        self.shape, self.confuses = Shape(1, 4, 4, 4, 1, VOCAB, None), confuses

    def tokens(self, texts):
        raise NotImplementedError

    def manifest(self):
        return Manifest(self.name, ())

    def run(self, tokens, read=(), edit=EMPTY, maps=None, *, logits="all", cache=None):
        ids = torch.cat([cache, tokens], 1) if torch.is_tensor(cache) else tokens
        line, last = ids[0].tolist(), ids.shape[1] - 1
        rows = torch.zeros(1, 4, tokens.shape[1], ids.shape[1])
        places = [line.index(value) for value in VALUES if value in line]
        scores = torch.zeros(1, 1, VOCAB)
        if line[-1] in KEYS:
            wanted = line.index(VALUES[KEYS.index(line[-1])])
            first = places[0]
            rows[0, 0, -1, wanted] = rows[0, 1, -1, first] = rows[0, 3, -1, last] = 1
            rows[0, 2, -1, places[:2][line.count(5) % 2]] = 1
            scores[0, 0, line[first if self.confuses else wanted]] = 9
        found = {0: AttentionMap.from_dense(rows, offset=ids.shape[1] - tokens.shape[1])} if maps else {}
        return Run(
            Tokens.of(tokens), scores if logits else None, maps=Maps(found), provenance=Provenance(self.name), cache=ids
        )


def contexts(length, depth, seed):
    """Two contexts of three facts; each is asked for in turn."""
    clean, spans = [], []
    for context in range(2):
        hay = torch.full((length,), 4)
        hay[: 1 + context] = 5
        at = [3, 7, 11]
        for place, key, value in zip(at, KEYS, VALUES, strict=True):
            hay[place], hay[place + 1] = key, value
        for asked in range(NEEDLES):
            row = hay.clone()
            row[-1] = KEYS[asked]
            clean.append(row)
            order = [asked, *(i for i in range(NEEDLES) if i != asked)]
            spans.append([(at[i] + 1, at[i] + 2) for i in order])
    ids, found = torch.stack(clean), torch.tensor(spans)
    names = {"VALUE": found[:, 0], "OTHER.0": found[:, 1], "OTHER.1": found[:, 2]}
    answer = ids.gather(1, found[:, 0, :1])
    return Pairs(ids, ids, answer, torch.full((len(ids), 1), -1), torch.full((len(ids),), length - 1), names)


def test_a_head_that_ignores_the_question_is_right_by_chance():
    found = wb.needle_choice(Chooser(), 16, (0.0, 1.0), prompts=contexts)
    assert isinstance(found.needles, int)
    table = found.frame()
    assert table["right"][0] == 1
    assert table["right"][1] == pytest.approx(1 / 3)
    assert table["right"][2] == pytest.approx(1 / 3)
    assert table["right_null"].tolist() == pytest.approx([1 / 3] * 4)
    assert (table["right_low"][1], table["right_high"][1]) == pytest.approx((1 / 3, 1 / 3))
    assert table["asked"].tolist() == pytest.approx([1, 1 / 3, 1 / 3, 0])
    assert table["others"].tolist() == pytest.approx([0, 2 / 3, 2 / 3, 0])
    assert found.values["right"][0][3].isnan()
    assert found.undefined == {"0.3": "never looks at a needle"}
    assert (found.needles, found.recall, found.confused) == (3, 1, 0)


def test_turns_that_fail_are_left_out_and_counted():
    found = wb.needle_choice(Chooser(confuses=True), 16, (0.0,), prompts=contexts)
    assert found.recall == pytest.approx(1 / 3)
    assert found.confused == pytest.approx(2 / 3)
    assert found.frame()["right"].tolist()[:2] == [1, 1]  # where the first needle was asked for, all that is left

    silent = Chooser()
    silent.run = lambda *args, **options: _without_answer(Chooser.run(silent, *args, **options))
    nothing = wb.needle_choice(silent, 16, (0.0,), prompts=contexts)
    assert nothing.values["right"][0].isnan().all()
    assert nothing.undefined == {"right": "the model wrote none of the 6 needles it was asked for"}


def _without_answer(run):
    logits = None if run.logits is None else torch.zeros_like(run.logits)
    return Run(run.tokens, logits, maps=run.maps, provenance=run.provenance, cache=run.cache)


def test_the_compiled_head_goes_where_it_is_asked_to():
    found = wb.needle_choice(wb.load("compiled-needle"), (64, 96), (0.2, 0.9), distractors=3, trials=1)
    table = found.frame().set_index(["layer", "head"])
    assert table.loc[(1, 1), "right"] == 1
    assert table.loc[(1, 1), "right_null"] == 0.25
    assert table.drop((1, 1))["right"].isna().all()
    assert found.recall == 1


def test_the_task_is_asked_for_each_of_its_facts():
    model = wb.load("compiled-needle")
    pairs = wb.task("needle", length=64, distractors=2, split="test").build(0, model.tokenizer, 2)
    turned = in_turn(pairs, 2)
    assert len(turned) == 6
    words = model.tokenizer.convert_ids_to_tokens
    for i, row in enumerate(turned.clean):
        lo, hi = pairs.spans["QUERY"][i // 3].tolist()
        value = int(turned.spans["VALUE"][i, 0])
        assert words(row[lo:hi].tolist()) == words(row[value - 3 : value - 2].tolist())  # The <key> box holds <value>
        assert turned.answer[i, 0] == row[value]
        changed = (row != pairs.clean[i // 3]).nonzero()[:, 0].tolist()
        assert changed == ([] if i % 3 == 0 else list(range(lo, hi)))
    with torch.no_grad():
        best = model.run(turned.clean).logits[:, -1].argmax(-1)
    assert best.tolist() == turned.answer[:, 0].tolist()
    with pytest.raises(Refused, match="3 facts of the form of the needle were found, not 5"):
        in_turn(pairs, 4)


def test_needles_of_your_own_stand_together():
    model = wb.load("compiled-needle")
    needles = [
        (f"The {key} box holds {value}.", f"what did they find in the {key} box?", value)
        for key, value in (("royal", "honey"), ("inner", "rice"), ("frozen", "tea"))
    ]
    hay = "The painter slept alone near the village. The singer sang again near the lake."
    build = wb.haystack_prompts(model, needles, hay, "Question: {question} Answer:", together=True)
    found = wb.needle_choice(model, 96, (0.1, 0.6), prompts=build)
    assert found.recall == 1
    assert found.frame().set_index(["layer", "head"]).loc[(1, 1), "right"] == 1


def test_what_is_no_choice_is_refused():
    with pytest.raises(WorkbenchError, match="OTHER.0"):
        wb.needle_choice(Copier(), 12, prompts=one_needle())
    with pytest.raises(WorkbenchError, match="come together"):
        wb.needle_choice(Copier(), 12, texts="hay")
    with pytest.raises(WorkbenchError, match="two or more"):
        wb.needle_choice(Copier(), 12, needles=[("a", "b")], texts="hay")
    with pytest.raises(WorkbenchError, match="at least 1"):
        wb.needle_choice(Copier(), 12, distractors=0)

    def odd(length, depth, seed):
        return contexts(length, depth, seed)[0:4]

    with pytest.raises(WorkbenchError, match="no turns of contexts with 3 needles"):
        wb.needle_choice(Chooser(), 16, prompts=odd)


def test_looks_are_pooled_over_the_turns_of_a_context():
    """A turn in which a head looks less at needles weighs less; contexts weigh alike."""

    def turn(context, asked, others):
        return _Turn(context, [1.0, 0.0], *(torch.tensor([[share]], dtype=torch.float64) for share in (asked, others)))

    found = _table([turn(0, 1.0, 0.0), turn(0, 0.0, 0.5), turn(1, 0.0, 1.0)], 2, (0,), Provenance("planted"))
    assert float(found.values["right"][0]) == pytest.approx((2 / 3 + 0) / 2)
    assert float(found.values["asked"][0]) == pytest.approx((0.5 + 0) / 2)
