"""The native model: its files, weights and provenance."""

import json

import pytest
import torch
from natives import DATA, VARIANTS, make, words
from safetensors.torch import save_file

import workbench as wb
from workbench.errors import UnknownName, WorkbenchError
from workbench.models.native import NativeModel


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saved_and_loaded_again_is_the_same_model(name: str, dtype: torch.dtype, tmp_path) -> None:
    model = make(VARIANTS[name], dtype, words())
    state = torch.get_rng_state()
    again = NativeModel.load(model.save(tmp_path / "saved", dtype))
    assert torch.equal(torch.get_rng_state(), state)
    assert again.name == "saved"
    assert len(again.revision) == 12
    assert again.shape == model.shape
    assert not again.net.training
    assert torch.equal(again.run("a b c").logits, model.run("a b c").logits)
    assert again.tokens("a b").labels == (("a", "b"),)
    half = NativeModel.load(model.save(tmp_path / "half", torch.float16))
    assert half.net.W_E.dtype == torch.float32
    torch.testing.assert_close(half.run(DATA).logits, model.run(DATA).logits.float(), rtol=0, atol=0.05)


def test_weights_have_names() -> None:
    model = make(VARIANTS["gated"])
    assert model.weight("W_O", 1).shape == (4, 6, 16)
    assert model.weight("W_K", 0).shape == (2, 16, 6)
    assert model.weight("W_U").shape == (16, 23)
    assert model.weight("W_gate", 1).shape == (16, 4)
    assert torch.equal(make(VARIANTS["learned"]).weight("W_U"), make(VARIANTS["learned"]).weight("W_E").T)
    with pytest.raises(UnknownName, match="W_O"):
        model.weight("W_OO", 0)


def test_folders_that_are_no_model(tmp_path) -> None:
    model = make(tokenizer=words())
    with pytest.raises(WorkbenchError, match=r"no config.json"):
        NativeModel.load(tmp_path)

    def broken(name: str) -> WorkbenchError:
        with pytest.raises(WorkbenchError) as caught:
            NativeModel.load(tmp_path / name)
        assert len(str(caught.value).splitlines()) == 1
        return caught.value

    for i, (change, message) in enumerate(
        (
            ({"heads": 0}, "heads is a whole number"),
            ({"layers": "2"}, "layers is a whole number"),
            ({"kv_heads": 3}, "multiple of kv_heads"),
            ({"head_width": 5}, "even head width"),
            ({"mixer": "mamda"}, "known: softmax"),
            ({"colour": 1}, "colour"),
            ({"width": 32}, "size mismatch"),
        )
    ):
        folder = model.save(tmp_path / f"config{i}")
        written = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**written, **change}))
        assert message in str(broken(f"config{i}")), change
    for i, text in enumerate(("{", "[1, 2]", '{"layers": 2}', "")):
        folder = model.save(tmp_path / f"json{i}")
        (folder / "config.json").write_text(text)
        assert "config.json does not describe a native model" in str(broken(f"json{i}"))
    folder = model.save(tmp_path / "cut")
    weights = (folder / "model.safetensors").read_bytes()
    for name, content in (("cut", weights[:-100]), ("junk", b"not a tensor file"), ("empty", b"")):
        other = model.save(tmp_path / name)
        (other / "model.safetensors").write_bytes(content)
        assert "cannot read" in str(broken(name))
    other = model.save(tmp_path / "missing")
    save_file({"W_E": torch.zeros(23, 16)}, other / "model.safetensors")
    assert "blocks.0" in str(broken("missing"))
    (model.save(tmp_path / "tokens") / "tokenizer.json").write_text("{}")
    assert "tokenizer.json" in str(broken("tokens"))
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkbenchError, match="cannot write"):
        model.save(tmp_path / "file")


def test_provenance_and_manifest() -> None:
    model = make(VARIANTS["gated"])
    run = model.run(DATA, maps=wb.capture(layers=1))
    assert list(run.maps) == [1]
    assert run.provenance.attention == "native gated-softmax"
    assert run.provenance.model == "tiny"
    frame = model.manifest().frame()
    assert frame.mixer.tolist() == ["gated-softmax"] * 2
    assert set(frame.exactness) == {"exact"}
    assert "blocks.1.attn.hook_gate" in model.manifest().sites
