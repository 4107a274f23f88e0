"""Files of dictionary_learning, sparsify, circuit-tracer and Gemma Scope (``tests/golden/sae``): numbers, and what is refused."""

import json
import math
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from workbench.coders.folder import load_coder, load_transcoders, save_coder
from workbench.errors import Refused, UnknownName, WorkbenchError

GOLDEN = Path(__file__).parents[1] / "golden" / "sae"
NUMBERS = {
    tool: load_file(GOLDEN / tool / "expected.safetensors")
    for tool in ("dictionary_learning", "sparsify", "circuit_tracer")
}
DICTIONARIES = {
    "AutoEncoder": "relu", "AutoEncoderNew": "relu", "GatedAutoEncoder": "gated", "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batchtopk", "MatryoshkaBatchTopKSAE": "matryoshka", "JumpReluAutoEncoder": "threshold",
}  # fmt: skip
HOOKPOINTS = {"layers.1": "topk", "layers.2": "groupmax", "layers.1.mlp": "topk"}


def agrees(coder, tool: str, case: str) -> None:
    x, f, y = (NUMBERS[tool][f"{case}.{name}"] for name in "xfy")
    with torch.no_grad():
        assert torch.allclose(coder.encode(x), f, atol=1e-5)
        assert torch.allclose(coder(x), y, atol=1e-5)
        assert torch.equal(coder.encode(x) != 0, f != 0)


def copied(tmp_path: Path, tool: str, case: str) -> Path:
    shutil.copytree(GOLDEN / tool / case, tmp_path / case)
    return tmp_path / case


@pytest.mark.parametrize("name", DICTIONARIES)
def test_dictionary_learning(tmp_path, name):
    coder = load_coder(GOLDEN / "dictionary_learning" / name)
    assert coder.kind == DICTIONARIES[name]
    agrees(coder, "dictionary_learning", name)
    assert coder.about["reads"] == coder.about["writes"] == ["blocks.1.hook_resid_post"]
    assert (coder.about["model"], coder.about["context"]) == ("EleutherAI/pythia-70m", 64)
    assert coder.about["format"] == "dictionary_learning"
    agrees(load_coder(save_coder(coder, tmp_path / "c")), "dictionary_learning", name)


def test_matryoshka_groups_are_read():
    coder = load_coder(GOLDEN / "dictionary_learning" / "MatryoshkaBatchTopKSAE")
    assert coder.sizes == [2, 8]
    assert coder.options["k"] == 3


class Shell:
    """What a pickle can do: call anything."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_pickles_run_no_code(tmp_path, how):
    folder = copied(tmp_path, "dictionary_learning", "AutoEncoder")
    trap = tmp_path / "ran"
    if how == "torch":
        torch.save({"encoder.weight": torch.zeros(2, 2), "more": Shell(trap)}, folder / "ae.pt")
    else:
        (folder / "ae.pt").write_bytes(pickle.dumps(Shell(trap)))
    with pytest.raises(Refused, match="damaged or holds more than tensors"):
        load_coder(folder)
    assert not trap.exists()


def test_refusals_of_dictionary_learning(tmp_path):
    folder = copied(tmp_path, "dictionary_learning", "BatchTopKSAE")
    config = json.loads((folder / "config.json").read_text())
    weights = torch.load(folder / "ae.pt", weights_only=True)

    def changed(tensors: dict, **trainer: object) -> Path:
        torch.save({**weights, **tensors}, folder / "ae.pt")
        (folder / "config.json").write_text(json.dumps({**config, "trainer": {**config["trainer"], **trainer}}))
        return folder

    with pytest.raises(Refused, match="before its threshold was measured"):
        load_coder(changed({"threshold": torch.tensor(-1.0)}))
    with pytest.raises(WorkbenchError, match="k = 3 and its config.json 4"):
        load_coder(changed({}, k=4))
    with pytest.raises(UnknownName, match="CrossCoder"):
        load_coder(changed({}, dict_class="CrossCoder"))
    with pytest.raises(WorkbenchError, match=r"decoder.weight has shape \[6, 9\]"):
        load_coder(changed({"decoder.weight": torch.zeros(6, 9)}))
    with pytest.raises(WorkbenchError, match="b_dec holds NaN"):
        load_coder(changed({"b_dec": torch.full((6,), math.nan)}))
    (folder / "ae.pt").write_bytes((folder / "ae.pt").read_bytes()[:500])
    with pytest.raises(Refused, match="damaged"):
        load_coder(folder)
    torch.save([torch.zeros(2)], folder / "ae.pt")
    with pytest.raises(Refused, match="something else than named tensors"):
        load_coder(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(WorkbenchError, match="dict_class"):
        load_coder(folder)


@pytest.mark.parametrize("name", HOOKPOINTS)
def test_sparsify(tmp_path, name):
    coder = load_coder(GOLDEN / "sparsify" / name)
    assert coder.kind == HOOKPOINTS[name]
    agrees(coder, "sparsify", name)
    agrees(load_coder(save_coder(coder, tmp_path / "c")), "sparsify", name)


def test_where_sparsify_coders_belong():
    assert load_coder(GOLDEN / "sparsify" / "layers.2").about["reads"] == ["blocks.2.hook_resid_post"]
    across = load_coder(GOLDEN / "sparsify" / "layers.1.mlp")
    assert across.about["reads"] == ["blocks.1.ln2.hook_normalized"]
    assert across.about["writes"] == ["blocks.1.hook_mlp_out"]
    assert not across.centred
    assert across.W_skip is not None


def test_refusals_of_sparsify(tmp_path):
    folder = copied(tmp_path, "sparsify", "layers.1")
    cfg = json.loads((folder / "cfg.json").read_text())

    def changed(**settings: object) -> Path:
        (folder / "cfg.json").write_text(json.dumps({**cfg, **settings}))
        return folder

    with pytest.raises(Refused, match="'softmax'"):
        load_coder(changed(activation="softmax"))
    with pytest.raises(WorkbenchError, match="k = 0"):
        load_coder(changed(k=0))
    with pytest.raises(WorkbenchError, match="F=16"):
        load_coder(changed(num_latents=16))
    with pytest.raises(WorkbenchError, match="has no W_skip"):
        load_coder(changed(skip_connection=True))
    assert load_coder(changed(signed=True)).kind == "abstopk"


@pytest.mark.parametrize(("name", "kind"), [("plt-relu", "relu"), ("plt-jumprelu", "threshold")])
def test_transcoders_of_circuit_tracer(name, kind):
    coders = load_transcoders(GOLDEN / "circuit_tracer" / name)
    assert [coder.kind for coder in coders] == [kind, kind]
    for layer, coder in enumerate(coders):
        agrees(coder, "circuit_tracer", f"{name}.{layer}")
        assert coder.about["reads"] == [f"blocks.{layer}.ln2.hook_normalized"]
        assert coder.about["writes"] == [f"blocks.{layer}.hook_mlp_out"]
    one = load_coder(GOLDEN / "circuit_tracer" / name / "layer_1.safetensors")
    assert torch.equal(one.W_dec, coders[1].W_dec)
    with pytest.raises(Refused, match="load_transcoders"):
        load_coder(GOLDEN / "circuit_tracer" / name)


def test_topk_of_circuit_tracer_has_no_relu(tmp_path):
    folder = copied(tmp_path, "circuit_tracer", "plt-relu")
    weights = load_file(folder / "layer_0.safetensors")
    save_file({**weights, "k": torch.tensor(6)}, folder / "layer_0.safetensors")
    coder = load_coder(folder / "layer_0.safetensors")
    x = NUMBERS["circuit_tracer"]["plt-relu.0.x"]
    pre = coder.pre(x)
    f = coder.encode(x)
    assert bool((f < 0).any())
    assert torch.equal(f, pre.where(pre >= pre.topk(6).values[:, -1:], 0.0))
    (folder / "config.yaml").write_text("activation: topk\nk: 2\n")
    save_file(weights, folder / "layer_0.safetensors")
    assert load_coder(folder / "layer_0.safetensors").options == {"k": 2}
    (folder / "config.yaml").write_text("activation: gelu\n")
    with pytest.raises(Refused, match="'gelu'"):
        load_coder(folder / "layer_0.safetensors")


def test_a_gap_in_a_set_is_refused(tmp_path):
    folder = copied(tmp_path, "circuit_tracer", "plt-relu")
    (folder / "layer_0.safetensors").unlink()
    with pytest.raises(WorkbenchError, match="no layer_0"):
        load_transcoders(folder)
    with pytest.raises(WorkbenchError, match="has no layer_0.safetensors, layer_1"):
        load_transcoders(tmp_path)


@pytest.mark.parametrize("name", ["clt-relu", "clt-jumprelu"])
def test_cross_layer_transcoders_of_circuit_tracer(tmp_path, name):
    clt = load_coder(GOLDEN / "circuit_tracer" / name)
    x, f, y = (NUMBERS["circuit_tracer"][f"{name}.{part}"].transpose(0, 1) for part in "xfy")

    def check(found) -> None:
        with torch.no_grad():
            assert torch.allclose(found.encode_all(x), f, atol=1e-5)
            assert torch.allclose(found(x), y, atol=1e-5)

    check(clt)
    check(load_coder(save_coder(clt, tmp_path / "c")))
    assert clt.about["reads"] == ["blocks.0.hook_resid_mid", "blocks.1.hook_resid_mid"]
    folder = copied(tmp_path, "circuit_tracer", name)
    (folder / "W_dec_1.safetensors").write_bytes(b"nothing")
    with pytest.raises(WorkbenchError, match="W_dec_1.safetensors is damaged"):
        load_coder(folder)


def test_gemma_scope(tmp_path):
    for path in (GOLDEN / "circuit_tracer" / "gemma-scope", GOLDEN / "circuit_tracer" / "gemma-scope" / "params.npz"):
        agrees(load_coder(path), "circuit_tracer", "gemma-scope")
    arrays = dict(np.load(GOLDEN / "circuit_tracer" / "gemma-scope" / "params.npz"))
    second = {name.lower(): torch.from_numpy(value) for name, value in arrays.items()}
    skip = torch.randn(6, 6)
    save_file({**second, "affine_skip_connection": skip}, tmp_path / "params.safetensors")
    coder, plain = load_coder(tmp_path), load_coder(GOLDEN / "circuit_tracer" / "gemma-scope")
    x = torch.randn(5, 6)
    assert torch.allclose(coder(x), plain(x) + x @ skip, atol=1e-6)
    assert coder.about["format"] == "gemma_scope_2"
    trap = tmp_path / "ran"
    np.savez(tmp_path / "params.npz", **{**arrays, "W_enc": np.array([Shell(trap)], dtype=object)})
    with pytest.raises(WorkbenchError, match="holds more than numbers"):
        load_coder(tmp_path / "params.npz")
    assert not trap.exists()
