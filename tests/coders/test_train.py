"""Training on models: SAEs, transcoders, crosscoders; what they learn, what is recorded, what is refused."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch

import workbench as wb
from workbench.coders.start import active_subspace
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.native_net import NativeNet

Z, POST, PRE = "blocks.1.attn.hook_z", "blocks.1.hook_resid_post", "blocks.1.hook_resid_pre"
NORM, MLP = "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"
SHORT = {"features": 48, "k": 4, "steps": 60, "batch": 64, "context": 24, "block": 1000}


def rows(model, sites, texts, **options):
    found = list(wb.site_rows(model, sites, texts, context=24, **options))
    return {site: torch.cat([part[site] for part in found]) for site in found[0]}


def fvu(coder, x, y):
    return float((coder(x) - y).pow(2).sum() / (y - y.mean(0)).pow(2).sum())


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_coder_learns_and_takes_activations_as_they_are(tmp_path, small_model, small_texts):
    """Its error on raw activations is that of the last training steps, which saw them scaled."""
    coder = wb.train_sae(small_model, Z, small_texts, **SHORT, out=tmp_path / "out")
    assert not coder.training
    assert not coder.W_enc.requires_grad
    x = rows(small_model, Z, small_texts)[Z]
    last = [line["fvu"] for line in metrics(tmp_path / "out")[-10:]]
    assert fvu(coder, x, x) == pytest.approx(sum(last) / 10, rel=0.15)
    assert last[-1] < 0.5 * metrics(tmp_path / "out")[0]["fvu"]
    again = wb.load_coder(tmp_path / "out" / "coder")
    torch.testing.assert_close(again(x), coder(x))
    assert again.about == coder.about


def test_what_the_coder_was_trained_on_is_told(tmp_path, small_model, small_texts):
    coder = wb.train_sae(small_model, Z, small_texts, **SHORT, out=tmp_path / "out", data="filler", seed=3)
    about = coder.about
    want = {
        "model": "random", "revision": "", "reads": [Z], "writes": [Z], "context": 24, "prepend_bos": True, "tokens": 60 * 64,
        "steps": 60, "batch": 64, "kind": "topk", "seed": 3, "texts": "filler", "normalise": "expected",
        "start": "active-subspace", "skip_first": False, "dtype": "float32",
    }  # fmt: skip
    assert {name: about[name] for name in want} == want
    assert about["options"]["k"] == 4
    assert about["data"]["documents"] == 24
    assert about["versions"]["torch"] == torch.__version__
    assert about["run_as"][0]["dtype"] == "float32"
    json.dumps(about, allow_nan=False)


def test_metrics_of_every_step(tmp_path, small_model, small_texts):
    ticks = []
    wb.train_sae(
        small_model, Z, small_texts, **SHORT, out=tmp_path / "out", tick=lambda done, total: ticks.append((done, total))
    )
    assert ticks == [(i, 60) for i in range(61)]
    found = metrics(tmp_path / "out")
    assert [line["step"] for line in found] == list(range(1, 61))
    assert [line["tokens"] for line in found] == [64 * i for i in range(1, 61)]
    for line in found:
        assert line["coder"] == Z
        assert line["l0"] == 4
        assert {"loss", "error", "fvu", "dead", "rate", "tokens_per_s", "epoch"} <= line.keys()
    assert found[-1]["epoch"] > found[0]["epoch"] > 0  # a short list is read several times, and says so


def test_several_coders_see_the_same_rows_as_each_alone(tmp_path, small_model, small_texts):
    """One forward pass for all of them changes no bit of any."""
    both = wb.train_sae(small_model, [Z, POST], small_texts, **SHORT, out=tmp_path / "out")
    assert len(both) == 2
    for site, coder in zip((Z, POST), both, strict=True):
        alone = wb.train_sae(small_model, site, small_texts, **SHORT)
        assert coder.about["reads"] == [site]
        assert torch.equal(coder.W_enc, alone.W_enc)
        assert torch.equal(coder.b_dec, alone.b_dec)
    assert {line["coder"] for line in metrics(tmp_path / "out")} == {f"0-{Z}", f"1-{POST}"}
    assert sorted(p.name for p in (tmp_path / "out" / "coders").iterdir()) == [f"0-{Z}", f"1-{POST}"]


def test_a_transcoder_reads_one_site_and_predicts_another(small_model, small_texts):
    options = {**SHORT, "steps": 150}
    found = rows(small_model, [NORM, MLP], small_texts)
    plain = wb.train_transcoder(small_model, NORM, MLP, small_texts, **options)
    skipping = wb.train_transcoder(small_model, NORM, MLP, small_texts, skip=True, **options)
    assert plain.about["reads"] == [NORM]
    assert plain.about["writes"] == [MLP]
    assert plain.W_skip is None
    assert skipping.W_skip is not None
    assert fvu(plain, found[NORM], found[MLP]) < 0.7
    assert fvu(skipping, found[NORM], found[MLP]) < fvu(plain, found[NORM], found[MLP])


def test_a_crosscoder_joins_sites_and_models(build_small, small_model, small_texts):
    one = wb.train_crosscoder(small_model, [PRE, POST], small_texts, **SHORT)
    assert one.reads == one.writes == (16, 16)
    found = rows(small_model, [PRE, POST], small_texts)
    x = torch.cat([found[PRE], found[POST]], 1)
    assert fvu(one, x, x) < 0.6
    two = wb.train_crosscoder([small_model, build_small("other", 1)], POST, small_texts, **SHORT)
    assert two.about["model"] == ["random", "other"]
    assert two.about["reads"] == [f"0:{POST}", f"1:{POST}"]
    assert two.reads == (16, 16)


@pytest.mark.parametrize("kind", ["relu", "p-anneal", "gated", "batchtopk", "jumprelu", "matryoshka"])
def test_every_kind_is_trained_from_the_same_rows(small_model, small_texts, kind):
    options = {name: value for name, value in SHORT.items() if name != "k"}
    coder = wb.train_sae(small_model, POST, small_texts, kind=kind, **options)
    x = rows(small_model, POST, small_texts)[POST]
    assert bool(torch.isfinite(coder(x)).all())
    assert coder.kind == kind


def test_from_a_store_as_from_the_model(tmp_path, small_model, small_texts):
    store = wb.store_activations(small_model, [Z, POST], small_texts, tmp_path / "s", context=24, shard_rows=300)
    coder = wb.train_sae(None, POST, store=store, **{k: v for k, v in SHORT.items() if k not in ("context", "block")})
    x = rows(small_model, POST, small_texts)[POST]
    assert fvu(coder, x, x) < 0.6
    assert coder.about["model"] == "random"
    assert coder.about["data"]["store"] == "s"


def test_directions_start_where_attention_outputs_are(small_model, small_texts):
    """hook_z of a model whose second head is 0 fills half of the space; a random start reads the rest as well."""
    with torch.no_grad():
        small_model.weight("W_V", 1)[1] = 0
    z = rows(small_model, Z, small_texts)[Z]
    assert len(active_subspace(z)) <= 8
    options = {**SHORT, "steps": 1, "rate": 1e-9}
    chosen, random = (wb.train_sae(small_model, Z, small_texts, **options, start=start) for start in (None, "random"))
    assert chosen.about["start"] == "active-subspace"
    assert float(chosen.W_dec[:, 8:].norm()) < 1e-4
    assert float(random.W_dec[:, 8:].norm()) > 1
    assert wb.CoderSpec(POST, POST).begins == "random"
    assert wb.CoderSpec(f"1:{Z}", f"1:{Z}").begins == "active-subspace"


def test_double_precision_and_tokens(small_model):
    tokens = torch.randint(0, 500, (40, 24))
    coder = wb.train_sae(small_model, POST, tokens, features=32, k=4, tokens=1000, batch=64, dtype="float64")
    assert coder.W_enc.dtype == torch.float64
    assert coder.about["steps"] == 16
    assert coder.about["prepend_bos"] is None


# ---------------------------------------------------------------------- refusals


class Poisoned:
    """A model whose site becomes NaN in its n-th pass."""

    def __init__(self, model, site, at):
        self._model, self._site, self._left = model, site, at

    def __getattr__(self, name):
        return getattr(self._model, name)

    def run(self, *args, **options):
        self._left -= 1
        edit = {self._site: lambda x: x * (float("nan") if self._left < 0 else 1.0)}
        return self._model.run(*args, **{**options, "edit": edit})


def test_activations_that_are_not_finite_are_refused_with_site_and_step(tmp_path, small_model, small_texts):
    model = Poisoned(small_model, POST, 2)
    texts = (text for _ in range(50) for text in small_texts)
    with pytest.raises(Refused, match=rf"step (\d+): the activations of {POST} hold NaN") as told:
        wb.train_sae(model, [PRE, POST], texts, **{**SHORT, "block": 500, "batch": 250}, out=tmp_path / "out", every=1)
    step = int(str(told.value).split()[1].rstrip(":"))
    assert 1 < step < 60
    assert metrics(tmp_path / "out")[-1]["step"] == step - 1


def test_data_that_run_out_are_refused(tmp_path, small_model, small_texts):
    with pytest.raises(Refused, match=r"ended after (\d+) of 60 steps"):
        wb.train_sae(small_model, Z, iter(small_texts), **SHORT, out=tmp_path / "out")
    done = metrics(tmp_path / "out")[-1]["step"]
    assert 5 < done < 60
    assert "epoch" not in metrics(tmp_path / "out")[-1]


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"kind": "topkk"}, UnknownName, "nearest: topk"),
        ({"kk": 3}, UnknownName, "option of topk coders or of training 'kk'"),
        ({"kind": "relu", "k": 3}, UnknownName, "option of relu coders"),
        ({"k": 4.5}, WorkbenchError, "option k"),
        ({"k": 50}, WorkbenchError, "k"),
        ({"steps": 3, "tokens": 100}, WorkbenchError, "in steps or in tokens"),
        ({"steps": 0}, WorkbenchError, "steps is a whole number from 1"),
        ({"batch": 2.5}, WorkbenchError, "batch is a whole number"),
        ({"block": 0}, WorkbenchError, "block is a whole number"),
        ({"seed": -1}, WorkbenchError, "seed is a whole number"),
        ({"rate": 0.0}, WorkbenchError, "above 0"),
        ({"normalise": "layer"}, UnknownName, "expected, none"),
        ({"start": "pca"}, UnknownName, "active-subspace, random"),
        ({"dtype": "float16"}, UnknownName, "float32, float64"),
        ({"log": "tensorboard"}, UnknownName, "jsonl, wandb, trackio"),
        ({"log": "jsonl", "out": None}, WorkbenchError, "give out="),
        ({"context": 1000}, WorkbenchError, "at most 256 tokens"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(tmp_path, small_model, small_texts, options, error, said):
    given = {"kind": "topk", "features": 48, "steps": 60, "out": tmp_path / "out", **options}
    if "tokens" in given and "steps" not in options:
        given.pop("steps")
    with pytest.raises(error, match=said):
        wb.train_sae(small_model, Z, small_texts, **given)
    assert not (tmp_path / "out").exists()


def test_further_mistakes(tmp_path, small_model, small_texts):
    with pytest.raises(UnknownName, match=r"no site.*hook_zz"):
        wb.train_sae(small_model, "blocks.1.attn.hook_zz", small_texts, **SHORT, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(Refused, match="empty"):
        wb.train_sae(small_model, Z, iter(()), **SHORT)
    with pytest.raises(Refused, match="no rows to train on"):
        wb.train_sae(small_model, Z, iter(["", ""]), **SHORT)
    with pytest.raises(WorkbenchError, match="give texts"):
        wb.train_sae(small_model, Z, **SHORT)
    with pytest.raises(WorkbenchError, match="reads one site and writes another"):
        wb.train_transcoder(small_model, Z, Z, small_texts, **SHORT)
    with pytest.raises(WorkbenchError, match="at least two sites"):
        wb.train_crosscoder(small_model, Z, small_texts, **SHORT)
    with pytest.raises(WorkbenchError, match="specs is empty"):
        wb.train_coders(small_model, [], small_texts)
    store = wb.store_activations(small_model, Z, small_texts, tmp_path / "s", context=24)
    with pytest.raises(UnknownName, match="hook_resid_post"):
        wb.train_sae(None, POST, store=store, features=48)
    with pytest.raises(WorkbenchError, match="got both"):
        wb.train_sae(small_model, Z, small_texts, store=store, features=48)
    with pytest.raises(Refused, match="filled with context=24; got context=8"):
        wb.train_sae(small_model, Z, store=store, context=8)
    small_model.name = "another"
    with pytest.raises(Refused, match="activations of random; got the model another"):
        wb.train_sae(small_model, Z, store=store)


def test_a_spec_is_json_and_back():
    spec = wb.CoderSpec((NORM,), (MLP,), "matryoshka", 64, True, "random", {"prefixes": (0.5, 1.0), "k": 3})
    assert wb.CoderSpec.of(json.loads(json.dumps(spec.json()))) == spec


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_other_loggers_get_every_step(tmp_path, small_model, small_texts, monkeypatch, name):
    calls = []
    fake = types.ModuleType(name)
    fake.init = lambda **options: calls.append(("init", options))
    fake.log = lambda metrics, step: calls.append((step, metrics))
    fake.finish = lambda: calls.append(("finish", None))
    monkeypatch.setitem(sys.modules, name, fake)
    wb.train_sae(small_model, Z, small_texts, **{**SHORT, "steps": 3}, out=tmp_path / "out", log=("jsonl", name))
    assert [call[0] for call in calls] == ["init", 1, 2, 3, "finish"]
    assert calls[0][1]["config"]["steps"] == 3
    lines = metrics(tmp_path / "out")
    for (_, got), line in zip(calls[1:4], lines, strict=True):
        assert got[f"{Z}/loss"] == line["loss"]
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(Refused, match=f"pip install {name}"):
        wb.train_sae(small_model, Z, small_texts, **SHORT, log=name)


def test_memory_does_not_grow_with_the_data(small_model, small_texts):
    """A stream of texts without end: what is alive stays what a block holds."""
    import gc
    import weakref

    alive, most = weakref.WeakSet(), 0

    def stream():
        nonlocal most
        while True:
            document = torch.randint(0, 500, (24,))
            alive.add(document)
            most = max(most, len(alive))
            yield document

    def tick(done, total):
        if done % 50 == 0:
            gc.collect()

    wb.train_sae(small_model, POST, stream(), features=32, k=4, steps=200, batch=64, block=500, context=24, tick=tick)
    assert most <= 257


def test_a_network_in_training_mode_is_refused(small_model, small_texts):
    assert isinstance(small_model.net, NativeNet)
    small_model.net.train()
    with pytest.raises(WorkbenchError, match="training mode"):
        wb.train_sae(small_model, Z, small_texts, **SHORT)
