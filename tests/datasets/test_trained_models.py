"""The trained models as committed: what they solve, what they show, and that their recipe can run."""

import json
import random
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import workbench as wb
from workbench.datasets import words as words_module
from workbench.datasets.models.evaluate import TASKS, first_token_share
from workbench.datasets.models.mixture import KINDS, batches, document
from workbench.datasets.models.train import MODELS, STAGES, Stage, arguments, learning_rate, stage, train, written
from workbench.datasets.pairs import in_split
from workbench.datasets.tokenizer import base_vocabulary, build, word_tokenizer
from workbench.errors import UnknownName
from workbench.models.native import NativeModel
from workbench.models.native_net import NativeConfig, NativeNet
from workbench.pairs import accuracy

FOLDER = Path(words_module.__file__).parent / "models"
NAMES = sorted(MODELS)


@pytest.fixture(scope="module", params=NAMES)
def model(request):
    return wb.load(request.param)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ioi", {}),
        ("induction", {}),
        ("needle", {"length": 64}),
        ("needle", {"length": 192}),
        ("needle", {"length": 128}),
    ],
)
def test_solves_its_tasks_on_held_out_examples(model, name, options):
    pairs = wb.task(name, split="test", **options).build(7, model.tokenizer, 120)
    with torch.no_grad():
        run = model.run(pairs.clean)
    assert accuracy(run.logits, pairs).mean() >= 0.95
    assert wb.task(name).metric(run.logits, pairs).mean() > 1


def test_card_says_what_is_measured(model):
    card = (FOLDER / model.name / "card.md").read_text()
    said = {name.strip(): float(share) / 100 for name, share in re.findall(r"^\| ([^|]+) \| ([\d.]+)% \|$", card, re.M)}
    assert set(TASKS) <= set(said)
    solved = [name for name in TASKS if said[name] >= 0.95]
    assert f"solves the tasks {', '.join(solved[:-1])} and {solved[-1]} of this workbench" in card
    for name in ("greater-than", "docstring", "colored-objects"):
        pairs = wb.task(name, split="test").build(0, model.tokenizer, 60)
        with torch.no_grad():
            reached = accuracy(model.run(pairs.clean).logits, pairs).mean().item()
        assert reached == pytest.approx(said[name], abs=0.1)
    sink, heads = re.search(r"would give 0.04\): (0\.\d+); .*: (\d+) of 32", card).groups()
    share = first_token_share(model.net, model.tokenizer)
    assert share.mean().item() == pytest.approx(float(sink), abs=2e-3)
    assert int((share >= 0.3).sum()) == int(heads)


def test_softmax_model_has_first_token_sinks_and_its_twin_does_not():
    soft, gated = (first_token_share(wb.load(name).net, word_tokenizer()) for name in ("tiny-softmax", "tiny-gated"))
    assert (soft >= 0.3).sum() >= 8
    assert soft.max() > 0.6
    assert soft.mean() > 0.2
    assert (gated < 0.3).all()
    assert soft.mean() > 8 * gated.mean()


def test_twins_differ_in_the_mixer_alone():
    configs = [json.loads((FOLDER / name / "config.json").read_text()) for name in NAMES]
    assert {key for key in configs[0] if configs[0][key] != configs[1][key]} == {"mixer"}
    assert configs[0]["trained"] == STAGES[-1].longest == wb.load("tiny-softmax").shape.trained
    recipes = [
        re.findall(
            r"^\| (trained on|recipe|start|price of writing) \| (.*) \|$", (FOLDER / name / "card.md").read_text(), re.M
        )
        for name in NAMES
    ]
    assert len(recipes[0]) == 4
    assert recipes[0] == recipes[1]


def test_weights_are_small():
    assert sum((FOLDER / name / "model.safetensors").stat().st_size for name in NAMES) < 6e6


def test_recipe_runs_and_resumes_to_the_same_weights(tmp_path):
    def trained(work, steps, *more):
        return train(
            arguments(["--model", "tiny-gated", "--steps", str(steps), "--work", str(work), "--every", "1", *more])
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("workbench.datasets.models.train.evaluate", lambda *a, **k: {})
        patch.setattr("workbench.datasets.models.train.batches", lambda rng, tok, n: batches(rng, tok, 60)[:1])
        whole = trained(tmp_path / "whole", 3)
        patch.setattr(
            "workbench.datasets.models.train.learning_rate", lambda step, steps, peak: learning_rate(step, 3, peak)
        )
        trained(tmp_path / "parts", 2)
        again = trained(tmp_path / "parts", 3)
    for name, weight in whole.named_parameters():
        assert torch.equal(weight, dict(again.named_parameters())[name]), name


def test_price_is_what_heads_write_relative_to_the_stream():
    config = NativeConfig(
        layers=2, heads=3, width=12, head_width=4, vocab=20, mlp_width=8, mixer="gated-softmax", bias=True
    )
    model = NativeModel(NativeNet(config).double().eval(), None, name="net")
    ids = torch.randint(0, 20, (3, 7), generator=torch.Generator().manual_seed(0))
    real = torch.ones(3, 7, dtype=torch.bool)
    real[1, 4:] = False
    found: list[torch.Tensor] = []
    with written(model.net, real, found):
        model.net(ids)
    sites = [wb.Site(kind, layer) for layer in range(2) for kind in ("result", "resid_pre")]
    acts = model.run(ids, read=sites).acts
    for layer, value in enumerate(found):
        share = acts[wb.Site("result", layer)].norm(dim=-1) / acts[wb.Site("resid_pre", layer)].norm(dim=-1)[..., None]
        queries = [share[b, t] for b in range(3) for t in range(1, 7) if real[b, t]]
        assert value.item() == pytest.approx(torch.stack(queries).mean().item(), rel=1e-4)
    assert len(found) == 2
    model.net(ids)
    assert len(found) == 2


def test_gates_stay_open_until_writing_has_a_price(monkeypatch, tmp_path):
    monkeypatch.setattr("workbench.datasets.models.train.evaluate", lambda *a, **k: {})
    monkeypatch.setattr("workbench.datasets.models.train.batches", lambda rng, tok, n: batches(rng, tok, 60)[:1])
    monkeypatch.setattr("workbench.datasets.models.train.STAGES", (Stage(0, 60, 0.3, 0.0), Stage(2, 60, 0.3, 1.0)))

    def gates(steps):
        net = train(arguments(["--model", "tiny-gated", "--steps", str(steps), "--work", str(tmp_path / str(steps))]))
        return [p.detach() for name, p in net.named_parameters() if name.endswith("gate")]

    assert {float(value) for p in gates(2) for value in p.flatten()} == {0.0, 2.0}
    assert all((p != 0.0).all() and (p != 2.0).all() for p in gates(3))


def test_unknown_models_are_named():
    with pytest.raises(UnknownName, match="tiny-softmax"):
        train(arguments(["--model", "tiny"]))


def test_learning_rate_and_lengths():
    rates = [learning_rate(step, 1000, 1.0) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[100:750] == [1.0] * 650
    assert rates[-1] == pytest.approx(0.02)
    assert all(a >= b for a, b in pairwise(rates[750:]))
    assert [stage(each.start) for each in STAGES] == list(STAGES)
    assert [stage(each.start - 1) for each in STAGES[1:]] == list(STAGES[:-1])
    assert stage(10**6) == STAGES[-1]


@pytest.mark.parametrize("kind", [*KINDS, "colored-objects+"])
def test_training_documents(kind):
    tokenizer = word_tokenizer()
    rng = random.Random(0)
    for _ in range(20):
        doc = document(kind, rng, 96)
        ids = tokenizer(doc.text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert len(ids) <= (120 if kind == "colored-objects+" else 96)  # batches cut what is too long
        assert all(doc.text[a:b].isalnum() for a, b in doc.answers)
        assert bool(doc.answers) == (kind != "filler") or kind == "packed"


def test_training_never_sees_a_held_out_fact():
    rng = random.Random(1)
    for _ in range(100):
        row = document("induction", rng, 72).text.split()
        again = next(i for i in range(1, len(row)) if row[i] in row[:i])
        pairs = pairwise(row[: again + 1])
        assert all(in_split(f"{a} {b}", "train") for a, b in pairs if (a, b) != (row[again - 1], row[again]))
        asked = document("colored-objects", rng, 72)
        scene, _, questions = asked.text.removeprefix("Q: ").partition(" What")
        things = re.findall(r"color is the (\w+)\?", questions)
        assert len(set(things)) == len(things) == len(asked.answers) > 0
        assert all(in_split(f"{scene} {thing}", "train") for thing in things)
        right = {thing: color for color, thing in re.findall(r"an? (\w+) (\w+)[,.]", scene)}
        assert [right[thing] for thing in things] == [asked.text[a:b] for a, b in asked.answers]
        held = re.findall(r"The (\w+) box holds (\w+)\.", document("needle", rng, 96).text)
        assert held
        assert all(in_split(f"{key} {value}", "train") for key, value in held)


def test_batches_mark_answers():
    tokenizer = build(base_vocabulary())
    short, middle, long = batches(random.Random(0), tokenizer, 72)
    for batch in (short, middle, long):
        assert batch.ids.shape == batch.kind.shape
        padding = batch.ids[:, 1:] == tokenizer.token_to_id("<pad>")
        assert (batch.kind[:, :-1][padding] == -1).all()
    names = {tokenizer.token_to_id(word) for word in words_module.words("names")}
    rows, at = (short.kind == KINDS.index("ioi")).nonzero(as_tuple=True)
    assert len(rows) == 8
    assert {int(i) for i in short.ids[rows, at + 1]} <= names
