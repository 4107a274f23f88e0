"""Folders that SAELens wrote (``tests/golden/sae``): its numbers, its facts back bit by bit, and what is refused."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from workbench.coders.folder import load_coder, save_coder
from workbench.errors import Refused, UnknownName, WorkbenchError

GOLDEN = Path(__file__).parents[1] / "golden" / "sae" / "saelens"
EXPECTED = load_file(GOLDEN / "expected.safetensors")
CASES = sorted({name.rsplit(".", 1)[0] for name in EXPECTED})
KINDS = {
    "standard": "relu", "gated": "gated", "topk": "topk", "topk-rescaled": "topk", "abstopk": "abstopk", "jumprelu": "threshold",
    "batchtopk-checkpoint": "batchtopk", "matryoshka_batchtopk-checkpoint": "matryoshka", "batchtopk-inference": "threshold",
    "matching_pursuit": "matching-pursuit", "temporal": "temporal", "transcoder": "relu", "skip_transcoder": "relu",
    "jumprelu_transcoder": "threshold", "jumprelu_skip_transcoder": "threshold", "standard-layer-norm": "normalised",
}  # fmt: skip


def expected(case: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, f and y, with heads concatenated."""
    x, f, y = (EXPECTED[f"{case}.{name}"] for name in "xfy")
    return (x.flatten(-2), f, y.flatten(-2)) if "hook-z" in case else (x, f, y)


def cfg_of(folder: Path) -> dict:
    cfg = json.loads((folder / "cfg.json").read_text())
    cfg["metadata"].pop("workbench", None)
    return cfg


def copied(tmp_path: Path, case: str, **changed: object) -> Path:
    """The folder of a case with other settings; None takes one out."""
    folder = tmp_path / case
    shutil.copytree(GOLDEN / case, folder)
    cfg = {**cfg_of(folder), **changed}
    (folder / "cfg.json").write_text(json.dumps({name: value for name, value in cfg.items() if value is not None}))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_numbers_are_those_of_saelens(case):
    coder = load_coder(GOLDEN / case)
    assert coder.kind == KINDS.get(case, coder.kind)
    x, f, y = expected(case)
    with torch.no_grad():
        assert torch.allclose(coder.encode(x.to(coder.W_dec.dtype)), f, atol=1e-5)
        assert torch.allclose(coder(x.to(coder.W_dec.dtype)), y, atol=1e-5)
        assert torch.equal((coder.encode(x.to(coder.W_dec.dtype)) != 0), f != 0)
        assert torch.allclose(coder.sparse(x.to(coder.W_dec.dtype)).dense(), f.flatten(0, -2), atol=1e-5)


@pytest.mark.parametrize("case", [case for case in CASES if case != "standard-scaled"])
def test_facts_and_weights_go_back_unchanged(tmp_path, case):
    folder = save_coder(load_coder(GOLDEN / case), tmp_path / "c")
    assert cfg_of(folder) == cfg_of(GOLDEN / case)
    given, written = (load_file(place / "sae_weights.safetensors") for place in (GOLDEN / case, folder))
    assert set(given) == set(written)
    for name, value in given.items():
        assert value.dtype == written[name].dtype
        assert torch.equal(value, written[name]), name
    again = load_coder(folder)
    assert again.about == load_coder(GOLDEN / case).about
    assert cfg_of(save_coder(again, tmp_path / "d")) == cfg_of(folder)
    if (GOLDEN / case / "sparsity.safetensors").is_file():
        assert torch.equal(
            *(load_file(place / "sparsity.safetensors")["sparsity"] for place in (GOLDEN / case, folder))
        )


@pytest.mark.parametrize("case", ["topk-rescaled", "batchtopk-checkpoint", "standard", "jumprelu"])
def test_weights_that_were_changed_are_written_as_they_are(tmp_path, case):
    """The file's own weights are written only as long as the coder still is what was read."""
    coder = load_coder(GOLDEN / case)
    with torch.no_grad():
        coder.b_enc.add_(0.25)
    found = load_coder(save_coder(coder, tmp_path / "c"))
    assert torch.equal(found.b_enc, coder.b_enc)
    x = expected(case)[0]
    assert torch.allclose(found(x), coder(x), atol=1e-6)
    assert not torch.allclose(found(x), expected(case)[2], atol=1e-3)
    assert found.about["saelens"]["metadata"]["dataset_path"] == "tiny/text"


def test_where_it_belongs_is_read():
    about = load_coder(GOLDEN / "jumprelu_transcoder").about
    assert about["reads"] == ["blocks.1.ln2.hook_normalized"]
    assert about["writes"] == ["blocks.1.hook_mlp_out"]
    assert (about["model"], about["context"], about["prepend_bos"]) == ("gpt2", 64, True)
    assert about["format"] == "saelens 6.54.12"


def test_a_site_that_is_moved_is_written(tmp_path):
    coder = load_coder(GOLDEN / "standard")
    coder.about["reads"] = coder.about["writes"] = ["blocks.1.attn.hook_z[2]"]
    metadata = cfg_of(save_coder(coder, tmp_path / "c"))["metadata"]
    assert (metadata["hook_name"], metadata["hook_head_index"]) == ("blocks.1.attn.hook_z", 2)
    assert metadata["dataset_path"] == "tiny/text"


def test_a_scale_that_was_not_folded_is_folded_or_asked_for(tmp_path):
    """``activation_scaler.json`` names it (the golden numbers are with it); without one the caller must."""
    folder = copied(tmp_path, "standard-scaled")
    (folder / "activation_scaler.json").unlink()
    with pytest.raises(Refused, match="input_scale=sqrt"):
        load_coder(folder)
    x, f, y = expected("standard-scaled")
    with torch.no_grad():
        found = load_coder(folder, input_scale=0.25)
        assert torch.allclose(found.encode(x), f, atol=1e-6)
        assert torch.allclose(found(x), y, atol=1e-5)
        as_it_is = load_coder(folder, input_scale=1.0)
        assert torch.allclose(as_it_is.encode(x * 0.25), f, atol=1e-6)
    assert cfg_of(save_coder(as_it_is, tmp_path / "c")) == cfg_of(folder)
    assert cfg_of(save_coder(found, tmp_path / "d"))["normalize_activations"] == "none"


def test_rows_that_are_normalised_have_no_output_of_a_code_alone():
    coder = load_coder(GOLDEN / "standard-layer-norm")
    x = expected("standard-layer-norm")[0]
    with pytest.raises(Refused, match="depends on x"):
        coder.decode(coder.encode(x))
    assert coder.inner.decode(coder.encode(x)).shape == x.shape


def test_temporal_coders_want_sequences():
    coder = load_coder(GOLDEN / "temporal")
    with pytest.raises(Refused, match="whole sequences"):
        coder.encode(torch.randn(8, 6))


OLD = {
    "d_in": 6, "d_sae": 8, "activation_fn_str": "relu", "hook_point": "blocks.2.hook_resid_pre", "hook_point_layer": 2,
    "model_name": "gpt2-small", "context_size": 128, "prepend_bos": False, "lr": 0.0004, "dtype": "torch.float32",
    "normalize_activations": "none", "finetuning_scaling_factor": False, "sae_lens_version": "3.11.0",
}  # fmt: skip


def old(tmp_path: Path, case: str = "standard", weights: dict | None = None, **changed: object) -> Path:
    folder = tmp_path / "old"
    shutil.copytree(GOLDEN / case, folder, dirs_exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps({**OLD, **changed}))
    if weights:
        save_file({**load_file(folder / "sae_weights.safetensors"), **weights}, folder / "sae_weights.safetensors")
    return folder


def test_settings_of_older_versions(tmp_path):
    coder = load_coder(old(tmp_path))
    x, f, _ = expected("standard")
    assert torch.allclose(coder.encode(x), f, atol=1e-6)
    assert coder.about["reads"] == ["blocks.2.hook_resid_pre"]
    assert (coder.about["context"], coder.about["prepend_bos"]) == (128, False)
    cfg = cfg_of(save_coder(coder, tmp_path / "c"))
    assert cfg["architecture"] == "standard"
    assert cfg["metadata"]["hook_name"] == "blocks.2.hook_resid_pre"
    assert cfg["metadata"]["lr"] == 0.0004
    assert cfg["metadata"]["sae_lens_version"] == "6.0.0"
    assert load_coder(tmp_path / "c").about == coder.about


def test_topk_of_older_versions(tmp_path):
    coder = load_coder(old(tmp_path, "topk", activation_fn_str="topk", activation_fn_kwargs={"k": 3}))
    x, f, _ = expected("topk")
    assert (coder.kind, coder.options["k"]) == ("topk", 3)
    assert torch.allclose(coder.encode(x), f, atol=1e-6)
    coder = load_coder(
        old(tmp_path, "abstopk", activation_fn_str="topk", activation_fn_kwargs={"k": 3, "signed": True})
    )
    assert coder.kind == "abstopk"


def test_gains_of_older_versions_go_into_the_decoder(tmp_path):
    gains = torch.linspace(0.5, 2, 8)
    coder = load_coder(old(tmp_path, weights={"scaling_factor": gains}, finetuning_scaling_factor=True))
    plain = load_coder(GOLDEN / "standard")
    x = expected("standard")[0]
    assert torch.allclose(coder(x), plain.decode(plain.encode(x) * gains), atol=1e-6)
    coder = load_coder(old(tmp_path, weights={"scaling_factor": torch.ones(8)}))
    assert torch.equal(coder.W_dec, plain.W_dec)


def test_log_thresholds_of_older_checkpoints(tmp_path):
    folder = old(tmp_path, "jumprelu", architecture="jumprelu")
    weights = load_file(folder / "sae_weights.safetensors")
    logs = weights.pop("threshold").log()
    save_file({**weights, "log_threshold": logs}, folder / "sae_weights.safetensors")
    assert torch.equal(load_coder(folder).threshold, logs.exp())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"activation_fn_str": "tanh-relu"}, "activation function 'tanh-relu'"),
        ({"activation_fn_kwargs": {"slope": 2}}, "'slope' = 2, which is not modelled"),
        ({"normalize_activations": True}, "expected_average_only_in"),
        ({"normalize_activations": "batch_norm"}, "'batch_norm', which is not modelled"),
    ],
)
def test_what_would_change_numbers_is_refused(tmp_path, changed, message):
    with pytest.raises(Refused, match=message):
        load_coder(old(tmp_path, **changed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"architecture": "resnet"}, "no architecture of .*'resnet'"),
        ({"d_in": None}, "d_in = None"),
        ({"d_sae": "8"}, "d_sae = '8'"),
        ({"d_sae": 9}, r"W_enc has shape \[6, 8\] where \[D=6, F=9\] is due"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"architecture": "topk"}, "k = None"),
        ({"architecture": "gated"}, "has no b_gate, b_mag, r_mag"),
        ({"architecture": "matching_pursuit"}, "has W_enc, b_enc too"),
    ],
)
def test_settings_that_do_not_fit_give_one_error(tmp_path, changed, message):
    with pytest.raises((WorkbenchError, UnknownName), match=message):
        load_coder(copied(tmp_path, "standard", **changed))


def test_damaged_files_give_one_error(tmp_path):
    folder = copied(tmp_path, "standard")
    weights = folder / "sae_weights.safetensors"
    whole = weights.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:4], b"", b"\x80\x04K\x01."):
        weights.write_bytes(content)
        with pytest.raises(WorkbenchError, match="sae_weights.safetensors is damaged"):
            load_coder(folder)
    weights.write_bytes(whole)
    tensors = load_file(weights)
    save_file({**tensors, "b_dec": torch.full((6,), math.nan)}, weights)
    with pytest.raises(WorkbenchError, match="b_dec holds NaN"):
        load_coder(folder)
    save_file({**tensors, "b_enc": torch.zeros(8, dtype=torch.int64)}, weights)
    with pytest.raises(WorkbenchError, match="b_enc is torch.int64"):
        load_coder(folder)
    weights.write_bytes(whole)
    for text in ("{", "[1]", '{"d_in": 6, '):
        (folder / "cfg.json").write_text(text)
        with pytest.raises(WorkbenchError, match="cfg.json"):
            load_coder(folder)
