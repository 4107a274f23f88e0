"""A training that is killed, at any moment, and run again takes the same steps to the same weights, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import workbench as wb
from workbench.coders.checkpoints import read_checkpoint, write_checkpoint
from workbench.errors import Refused, WorkbenchError

SITES = ["blocks.1.attn.hook_z", "blocks.0.hook_resid_post"]
NORM, MLP = "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"

SCRIPT = '''
"""Train in children that are killed with SIGKILL, resume, compare with a training that nobody disturbed."""
import json, multiprocessing, os, random, signal, sys, time
from pathlib import Path
import torch
import torch._dynamo  # every optimiser imports it: once here, not once in every child
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
import workbench as wb
from conftest import build
from workbench.coders import checkpoints, training
from workbench.coders.coder import Coder
from workbench.datasets.corpus import filler_text

SITES, NORM, MLP = {sites!r}, {norm!r}, {mlp!r}
TEXTS = [filler_text(i, 5 + i) for i in range(40)]
STEPS = 24
model = build()

def specs(): return [
    wb.CoderSpec(SITES[:1], SITES[:1], "topk", 48, options={{"k": 4}}),
    wb.CoderSpec(SITES[1:], SITES[1:], "batchtopk", 40, options={{"k": 3}}),
    wb.CoderSpec(SITES[:1], SITES[:1], "jumprelu", 40),
    wb.CoderSpec((NORM,), (MLP,), "relu", 40, skip=True),
    wb.CoderSpec(SITES, SITES, "topk", 40, options={{"k": 4}}),
]

def train(out, stream, tick=None):
    texts = iter(TEXTS * 60) if stream else TEXTS
    return wb.train_coders(model, specs(), texts, steps=STEPS, batch=40, context=24, block=300, every=4, dead_after=400,
                           seed=5, out=out, tick=tick)

def die(*_): os.kill(os.getpid(), signal.SIGKILL)

def child(out, stream, how, when):
    if how == "step":
        train(out, stream, lambda done, total: die() if done == when else None)
    calls = 0
    if how in ("half a checkpoint", "before its name", "after its name", "before a coder"):
        real = checkpoints.write_checkpoint
        def counted(path, tensors, labels):
            nonlocal calls
            calls += 1
            if calls == when and how == "half a checkpoint":
                real(path.with_name("whole"), tensors, labels)
                raw = path.with_name("whole").read_bytes()
                path.with_name(path.name + ".part").write_bytes(raw[: len(raw) // 2])
                die()
            if calls == when and how == "before its name":
                checkpoints.os.fsync = die
            real(path, tensors, labels)
            if calls == when and how == "after its name":
                die()
        training.write_checkpoint = counted
        if how == "before a coder":
            save = Coder.save
            def saved(self, folder):
                nonlocal calls
                calls += 1
                die() if calls > 100 + when else save(self, folder)
            def fresh(path, tensors, labels): real(path, tensors, labels)
            training.write_checkpoint, Coder.save, calls = fresh, saved, 100
    train(out, stream)

def run(out, stream, how, when, limit=60.0):
    process = multiprocessing.get_context("fork").Process(target=child, args=(out, stream, how, when))
    process.start()
    process.join(limit)
    process.kill()
    process.join()
    return process.exitcode

out = Path(sys.argv[1])
rng = random.Random(int(sys.argv[3]))
train(out / "first", False)
began = time.monotonic()
assert run(out / "whole", False, "", 0) == 0
whole = time.monotonic() - began
assert run(out / "stream", True, "", 0) == 0
plan = [("step", 0), ("step", 6), ("half a checkpoint", 2), ("before its name", 2), ("after its name", 1), ("step", 19),
        ("before a coder", 2)]
for how, when in plan:
    assert run(out / "killed", False, how, when) == -9, (how, when)
    assert (out / "killed" / "metrics.jsonl").exists()
assert run(out / "killed", False, "", 0) == 0
kills = 0
while True:
    code = run(out / "random", True, "", 0, limit=rng.uniform(0.1, 0.7) * whole)
    kills += code == -9
    if code == 0:
        break
    assert code == -9, code
print(kills)
'''


def lines(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in found]


@pytest.mark.parametrize("seed", [0])
def test_killed_and_run_again_it_is_the_same_training(tmp_path: Path, seed: int) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(sites=SITES, norm=NORM, mlp=MLP))
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, script, tmp_path, here, str(seed)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) >= 1, "no training was killed at random"
    pairs = {"killed": "whole", "random": "stream"}
    for killed, whole in pairs.items():
        want, got = lines(tmp_path / whole), lines(tmp_path / killed)
        assert [(line["step"], line["coder"]) for line in got] == [
            (step, line["coder"]) for step in range(1, 25) for line in want[:5]
        ]
        assert got == want
        for place in sorted((tmp_path / whole / "coders").iterdir()):
            one, two = (
                load_file(at / "sae_weights.safetensors") for at in (place, tmp_path / killed / "coders" / place.name)
            )
            assert one.keys() == two.keys()
            for name in one:
                assert torch.equal(one[name], two[name]), f"{killed}, {place.name}: {name}"
            told = [
                json.loads((at / "cfg.json").read_text()) for at in (place, tmp_path / killed / "coders" / place.name)
            ]
            assert told[0] == told[1]
        assert not (tmp_path / killed / "checkpoint.safetensors").exists()
    assert any(line["fvu"] < 0.9 for line in lines(tmp_path / "whole")), "nothing was learned, so nothing was tested"


def test_a_checkpoint_keeps_strides_types_and_bits(tmp_path):
    tensors = {
        "turned": torch.randn(3, 5).t(), "plain": torch.randn(4), "whole": torch.arange(5), "none": torch.zeros(0, 3),
        "half": torch.randn(2, 2).bfloat16(), "one": torch.tensor(3.0), "flags": torch.tensor([True, False]),
        "state": torch.Generator().manual_seed(3).get_state(),
    }  # fmt: skip
    write_checkpoint(tmp_path / "c.safetensors", tensors, {"step": 3, "more": [1, {"a": None}]})
    got, labels = read_checkpoint(tmp_path / "c.safetensors")
    assert labels == {"step": 3, "more": [1, {"a": None}]}
    for name, value in tensors.items():
        assert got[name].stride() == value.stride()
        assert got[name].dtype == value.dtype
        assert torch.equal(got[name], value)
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]
    assert read_checkpoint(tmp_path / "d.safetensors") is None
    raw = (tmp_path / "c.safetensors").read_bytes()
    (tmp_path / "c.safetensors").write_bytes(raw[:-10])
    with pytest.raises(WorkbenchError, match=r"c.safetensors is damaged"):
        read_checkpoint(tmp_path / "c.safetensors")


class Stop(Exception):
    """Ends a training in the middle."""


def stopped(model, texts, out, at=5, **options):
    """A training that ended at step ``at``, with a checkpoint at every step."""

    def tick(done, total):
        if done == at:
            raise Stop

    with pytest.raises(Stop):
        wb.train_sae(model, SITES[0], texts, **{**OPTIONS, **options}, out=out, tick=tick)


OPTIONS = {"features": 32, "k": 4, "steps": 12, "batch": 32, "context": 24, "block": 200, "every": 1}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"k": 5}, r"coders\[0\].options.k was 4 and is 5"),
        ({"features": 33}, r"coders\[0\].features was 32 and is 33"),
        ({"steps": 13}, "steps was 12 and is 13"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"rate": 0.1}, "rate was None and is 0.1"),
        ({"context": 20}, "context was 24 and is 20"),
    ],
)
def test_another_recipe_is_refused_with_the_difference(tmp_path, small_model, small_texts, changed, said):
    stopped(small_model, small_texts, tmp_path / "out")
    with pytest.raises(Refused, match=said):
        wb.train_sae(small_model, SITES[0], small_texts, **{**OPTIONS, **changed}, out=tmp_path / "out")


def test_other_data_are_refused(tmp_path, build_small, small_model, small_texts):
    stopped(small_model, small_texts, tmp_path / "out")
    with pytest.raises(Refused, match="data.begin was"):
        wb.train_sae(small_model, SITES[0], [*small_texts[::-1]], **OPTIONS, out=tmp_path / "out")
    later = [*small_texts]
    later[17] += " So."  # behind what the recipe looks at, and read already
    with pytest.raises(Refused, match="are not those that come now"):
        wb.train_sae(small_model, SITES[0], later, **OPTIONS, out=tmp_path / "out")
    with pytest.raises(Refused, match="model was 'random' and is 'other'"):
        wb.train_sae(build_small("other"), SITES[0], small_texts, **OPTIONS, out=tmp_path / "out")


def test_a_finished_training_is_loaded_and_another_folder_left_alone(tmp_path, small_model, small_texts):
    first = wb.train_sae(small_model, SITES[0], small_texts, **OPTIONS, out=tmp_path / "out")
    before = (tmp_path / "out" / "metrics.jsonl").read_text()
    again = wb.train_sae(small_model, SITES[0], small_texts, **OPTIONS, out=tmp_path / "out")
    assert torch.equal(first.W_dec, again.W_dec)
    assert again.about == first.about
    assert (tmp_path / "out" / "metrics.jsonl").read_text() == before
    with pytest.raises(WorkbenchError, match="not empty"):
        wb.train_sae(small_model, SITES[0], small_texts, **OPTIONS, out=tmp_path / "out", resume=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(WorkbenchError, match="holds no training"):
        wb.train_sae(small_model, SITES[0], small_texts, **OPTIONS, out=tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]


def test_a_folder_is_trained_in_by_one_process_at_a_time(tmp_path, small_model, small_texts):
    def tick(done, total):
        if done == 2:
            with pytest.raises(Refused, match="another process is training"):
                wb.train_sae(small_model, SITES[0], small_texts, **OPTIONS, out=tmp_path / "out")

    wb.train_sae(small_model, SITES[0], small_texts, **OPTIONS, out=tmp_path / "out", tick=tick)


def test_from_a_store_it_goes_on_as_well(tmp_path, small_model, small_texts):
    store = wb.store_activations(small_model, SITES[0], small_texts, tmp_path / "s", context=24, shard_rows=100)
    options = {k: v for k, v in OPTIONS.items() if k not in ("context", "block")}
    whole = wb.train_sae(None, SITES[0], store=store, **options, out=tmp_path / "whole")

    def tick(done, total):
        if done == 7:
            raise Stop

    with pytest.raises(Stop):
        wb.train_sae(None, SITES[0], store=store, **options, out=tmp_path / "cut", tick=tick)
    again = wb.train_sae(small_model, SITES[0], store=store, **options, out=tmp_path / "cut")
    assert torch.equal(whole.W_enc, again.W_enc)
    assert lines(tmp_path / "whole") == lines(tmp_path / "cut")
    assert again.about["model"] == "random"
    assert again.about["context"] == 24
