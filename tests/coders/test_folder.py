"""Coders in our own folders: what goes in comes out bit by bit, and what SAELens has no place for is kept beside."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from workbench.coders.catalogue import coder_kinds, make_coder
from workbench.coders.coder import Coder, Progress
from workbench.coders.cross_layer_kinds import make_cross_layer
from workbench.coders.estimators import SAE
from workbench.coders.folder import coder_formats, load_coder, save_coder
from workbench.coders.kinds.matching_pursuit import MatchingPursuit
from workbench.errors import Refused, UnknownName, WorkbenchError

SHAPES = {
    "autoencoder": {},
    "uncentred": {"centred": False},
    "transcoder": {"d_out": 5},
    "skip transcoder": {"d_out": 5, "skip": True},
    "crosscoder": {"reads": (4, 2), "writes": (4, 2)},
}
FAMILIES = {"relu": "standard", "p-anneal": "standard", "discrete": "standard", "gated": "gated", "topk": "topk"}


def randomised(kind: str, dtype: torch.dtype = torch.float32, **shape: object) -> Coder:
    """A coder of width 6 with 8 features and random numbers everywhere."""
    options = {"k": 3} if "k" in coder_kinds()[kind].defaults else {}
    coder = make_coder(kind, 6, 8, **shape, **options).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in coder.parameters():
            value.add_(0.3 * torch.randn(value.shape, generator=generator, dtype=torch.float64).to(dtype))
        for value in coder.buffers():
            value.add_(0.3)
    coder.about = {
        "model": "toy",
        "reads": ["blocks.0.hook_resid_pre"],
        "tokens": 5,
        "recipe": {"rate": 0.5, "steps": [1, 2]},
    }
    return coder


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", coder_kinds())
def test_every_kind_comes_back_bit_by_bit(tmp_path, kind, shape):
    coder = randomised(kind, **SHAPES[shape])
    found = load_coder(coder.save(tmp_path / "c"))
    before, after = coder.state_dict(), found.state_dict()
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (found.kind, found.options, found.about) == (coder.kind, coder.options, coder.about)
    assert (found.reads, found.writes, found.centred) == (coder.reads, coder.writes, coder.centred)
    x = torch.randn(5, 6)
    assert torch.equal(found(x), coder(x))
    assert torch.equal(found.sparse(x).dense(), coder.sparse(x).dense())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_come_back(tmp_path, dtype):
    coder = randomised("batchtopk", dtype)
    found = load_coder(coder.save(tmp_path / "c"))
    assert found.W_enc.dtype == found.threshold.dtype == dtype
    assert torch.equal(found.W_dec, coder.W_dec)
    assert load_coder(tmp_path / "c", dtype=torch.float32).W_dec.dtype == torch.float32


@pytest.mark.parametrize("kind", coder_kinds())
def test_the_architecture_is_the_one_whose_inference_is_ours(tmp_path, kind):
    family = FAMILIES.get(kind, "jumprelu")

    def written(name: str) -> dict[str, object]:
        folder = randomised(kind, **SHAPES[name]).save(tmp_path / name)
        return json.loads((folder / "cfg.json").read_text())

    plain, uncentred = written("autoencoder"), written("uncentred")
    assert (plain["architecture"], plain["apply_b_dec_to_input"]) == (family, True)
    assert (uncentred["architecture"], uncentred["apply_b_dec_to_input"]) == (family, False)
    across = {"standard": "transcoder", "jumprelu": "jumprelu_transcoder"}.get(family, "workbench-transcoder")
    skip = {"standard": "skip_transcoder", "jumprelu": "jumprelu_skip_transcoder"}.get(family, "workbench-transcoder")
    assert written("transcoder")["architecture"] == across
    assert written("skip transcoder")["architecture"] == skip
    assert written("crosscoder")["architecture"] == "workbench-crosscoder"


def test_a_square_transcoder_that_names_its_sites_is_a_transcoder(tmp_path):
    coder = randomised("relu", d_out=6, centred=False)
    coder.about = {"reads": ["blocks.1.ln2.hook_normalized"], "writes": ["blocks.1.hook_mlp_out"]}
    cfg = json.loads((coder.save(tmp_path / "c") / "cfg.json").read_text())
    assert cfg["architecture"] == "transcoder"
    assert cfg["metadata"]["hook_name"] == "blocks.1.ln2.hook_normalized"
    assert cfg["metadata"]["hook_name_out"] == "blocks.1.hook_mlp_out"


def test_heads_are_told_apart_in_the_settings(tmp_path):
    coder = randomised("relu")
    coder.about = {"reads": ["blocks.1.attn.hook_z"]}
    cfg = json.loads((coder.save(tmp_path / "z") / "cfg.json").read_text())
    assert cfg["reshape_activations"] == "hook_z"
    coder.about = {"reads": ["blocks.1.attn.hook_z[3]"]}
    cfg = json.loads((coder.save(tmp_path / "one") / "cfg.json").read_text())
    assert cfg["reshape_activations"] == "none"
    assert cfg["metadata"]["hook_name"] == "blocks.1.attn.hook_z"
    assert cfg["metadata"]["hook_head_index"] == 3


def test_thresholds_that_another_tool_changed_win_over_ours(tmp_path):
    """Without our second file a threshold comes from the weights, exactly, if need be as another kind."""
    folder = randomised("jumprelu").save(tmp_path / "c")
    weights = load_file(folder / "sae_weights.safetensors")
    changed = {**weights, "threshold": weights["threshold"].clone()}
    changed["threshold"][2] = 0.0
    save_file(changed, folder / "sae_weights.safetensors")
    with pytest.warns(UserWarning, match="holds a jumprelu coder"):
        found = load_coder(folder)
    assert found.kind == "threshold"
    assert torch.equal(found.threshold, changed["threshold"])
    save_file(weights, folder / "sae_weights.safetensors")
    (folder / "workbench.safetensors").unlink()
    found = load_coder(folder)
    assert found.kind == "jumprelu"
    assert torch.allclose(found.threshold, weights["threshold"], rtol=1e-6)


def test_a_batchtopk_coder_with_thresholds_by_feature_is_read_as_such(tmp_path):
    coder = randomised("batchtopk")
    coder.save(tmp_path / "c")
    weights = load_file(tmp_path / "c" / "sae_weights.safetensors")
    assert torch.equal(weights["threshold"], torch.full((8,), float(coder.threshold)))
    weights["threshold"][0] *= 2
    save_file(weights, tmp_path / "c" / "sae_weights.safetensors")
    with pytest.warns(UserWarning, match="holds a batchtopk coder"):
        found = load_coder(tmp_path / "c")
    assert found.kind == "threshold"
    assert torch.equal(found.threshold, weights["threshold"])


def test_a_given_threshold_can_be_trained_on(tmp_path):
    coder = randomised("jumprelu")
    coder.save(tmp_path / "c")
    cfg = json.loads((tmp_path / "c" / "cfg.json").read_text())
    del cfg["metadata"]["workbench"]
    (tmp_path / "c" / "cfg.json").write_text(json.dumps(cfg))
    found = load_coder(tmp_path / "c")
    assert found.kind == "threshold"
    x = torch.randn(64, 6)
    found.objective(x, x, Progress(0, 10, torch.zeros(8), 100)).loss.backward()
    assert found.theta.grad is not None
    assert float(found.theta.grad.abs().sum()) > 0


def test_estimators_come_back(tmp_path):
    x = torch.randn(200, 6).numpy()
    sae = SAE(kind="topk", features=8, k=2, steps=5, seed=0).fit(x)
    again = SAE.load(sae.save(tmp_path / "sae"))
    assert (sae.transform(x) == again.transform(x)).all()


def test_replacement_layers_are_read_too(tmp_path):
    clt = make_cross_layer("topk", 2, 6, 8, k=2)
    save_coder(clt, tmp_path / "clt")
    found = load_coder(tmp_path / "clt")
    assert torch.equal(found.W_enc, clt.W_enc)


def test_what_cannot_be_saved_is_refused_and_leaves_nothing(tmp_path):
    coder = randomised("relu")
    coder.about = {"model": object()}
    with pytest.raises(WorkbenchError, match="no JSON"):
        save_coder(coder, tmp_path / "c")
    coder.about = {"rate": math.nan}
    with pytest.raises(WorkbenchError, match="no JSON"):
        save_coder(coder, tmp_path / "c")
    coder = randomised("relu")
    with torch.no_grad():
        coder.W_dec[0, 0] = math.nan
    with pytest.raises(WorkbenchError, match="W_dec holds NaN"):
        save_coder(coder, tmp_path / "c")
    assert not list(tmp_path.iterdir())
    (tmp_path / "c").mkdir()
    with pytest.raises(WorkbenchError, match="exists already"):
        save_coder(randomised("relu"), tmp_path / "c")
    with pytest.raises(WorkbenchError, match="save_coder writes coders"):
        save_coder(object(), tmp_path / "d")


def test_what_is_not_known_is_told(tmp_path):
    with pytest.raises(WorkbenchError, match="there is no"):
        load_coder(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(WorkbenchError, match="saelens: cfg.json and sae_weights.safetensors; sparsify"):
        load_coder(tmp_path)
    with pytest.raises(UnknownName, match="saelens, sparsify"):
        load_coder(tmp_path, format="onnx")
    with pytest.raises(WorkbenchError, match="cfg.json is missing"):
        load_coder(tmp_path, format="saelens")
    with pytest.raises(WorkbenchError, match="input_scale belongs to SAELens"):
        load_coder(tmp_path, format="sparsify", input_scale=2.0)
    assert "dictionary_learning" in coder_formats()


def test_damaged_own_folders_give_one_error(tmp_path):
    folder = randomised("topk", d_out=5, skip=True).save(tmp_path / "c")
    cfg = json.loads((folder / "cfg.json").read_text())
    weights = load_file(folder / "sae_weights.safetensors")

    def with_cfg(**changed: object) -> None:
        (folder / "cfg.json").write_text(json.dumps({**cfg, **changed}))

    with_cfg(metadata={})
    with pytest.raises(WorkbenchError, match="cfg.json is damaged: KeyError"):
        load_coder(folder)
    with_cfg(metadata={"workbench": {**cfg["metadata"]["workbench"], "kind": "quantum"}})
    with pytest.raises(UnknownName, match="quantum"):
        load_coder(folder)
    with_cfg(d_sae=9)
    with pytest.raises(WorkbenchError, match="does not fit cfg.json"):
        load_coder(folder)
    with_cfg()
    save_file({**weights, "b_enc": torch.zeros(9)}, folder / "sae_weights.safetensors")
    with pytest.raises(WorkbenchError, match="b_enc of a topk coder is \\[8\\] here"):
        load_coder(folder)
    save_file({**weights, "b_enc": torch.full((8,), math.inf)}, folder / "sae_weights.safetensors")
    with pytest.raises(WorkbenchError, match="b_enc holds NaN or infinity"):
        load_coder(folder)
    save_file({name: value for name, value in weights.items() if name != "b_dec"}, folder / "sae_weights.safetensors")
    with pytest.raises(WorkbenchError, match="lacks b_dec"):
        load_coder(folder)
    save_file({**weights, "code": torch.zeros(1)}, folder / "sae_weights.safetensors")
    with pytest.raises(WorkbenchError, match="has no code"):
        load_coder(folder)


def test_tied_coders_that_came_apart_are_refused(tmp_path):
    coder = MatchingPursuit(6, 8)
    with torch.no_grad():
        coder.W_enc.mul_(2)
    with pytest.raises(Refused, match="no longer W_dec transposed"):
        save_coder(coder, tmp_path / "c")
