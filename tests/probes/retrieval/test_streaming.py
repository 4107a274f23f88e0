import math

import pytest
import torch
from builders import hugging_face, native
from hypothesis import given, settings
from hypothesis import strategies as st
from random_nets import ids

import workbench as wb
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.native import NativeModel
from workbench.pairs import Pairs
from workbench.probes.examples import needles
from workbench.probes.retrieval import streaming
from workbench.probes.retrieval.streaming import (
    Streaming,
    layer_scores,
    streaming_edits,
    streaming_effect,
    streaming_output,
)
from workbench.results import load_result
from workbench.sites import Site


def qkv(length=13, heads=4, groups=2, width=3, batch=2):
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(batch, n, length, width, dtype=torch.float64, generator=generator) for n in (heads, groups, groups)
    )


def by_hand(q, k, v, policy, scale, softcap=None, extra=None):
    """Streaming attention, one query and one key at a time."""
    out = torch.zeros_like(q)
    cap = (lambda s: s) if softcap is None else (lambda s: softcap * math.tanh(s / softcap))
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            g = h // (q.shape[1] // k.shape[1])
            for i in range(q.shape[2]):
                held = [j for j in range(i + 1) if j < policy.sink or i - j < policy.recent]
                gone = [j for j in range(i + 1) if j not in held]
                terms = [(math.exp(cap(scale * float(q[b, h, i] @ k[b, g, j]))), v[b, g, j]) for j in held]
                if policy.compensate and gone:
                    mean_k, mean_v = k[b, g, gone].mean(0), v[b, g, gone].mean(0)
                    terms.append((len(gone) * math.exp(cap(scale * float(q[b, h, i] @ mean_k))), mean_v))
                total = sum(w for w, _ in terms) + (0 if extra is None else math.exp(float(extra[h])))
                out[b, h, i] = sum(w / total * value for w, value in terms)
    return out


@pytest.mark.parametrize("compensate", [False, True])
@pytest.mark.parametrize(("sink", "recent"), [(0, 1), (2, 3), (4, 1), (3, 20), (20, 2), (0, 5)])
@pytest.mark.parametrize("rows", [1, 4, 256])
def test_outputs_are_what_loops_give(monkeypatch, rows, sink, recent, compensate):
    monkeypatch.setattr(streaming, "_ROWS", rows)
    q, k, v = qkv()
    policy = Streaming(sink, recent, compensate)
    torch.testing.assert_close(streaming_output(q, k, v, policy, 0.7), by_hand(q, k, v, policy, 0.7))


def test_caps_and_learned_sinks_act_as_in_the_layer():
    q, k, v = qkv()
    extra = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64)
    policy = Streaming(1, 3, True)
    found = streaming_output(q, k, v, policy, 1.5, softcap=2.0, sink=extra)
    torch.testing.assert_close(found, by_hand(q, k, v, policy, 1.5, 2.0, extra))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(0, 14), st.integers(1, 14))
def test_a_cache_that_holds_all_is_full_attention(length, sink, recent):
    q, k, v = qkv(length)
    full = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    near = streaming_output(q, k, v, Streaming(sink, recent, True), 3**-0.5)
    reach = max(recent, sink + recent)
    torch.testing.assert_close(near[:, :, :reach], full[:, :, :reach])


def test_equal_dropped_keys_are_exactly_compensated():
    """n copies of one key are that key counted n times."""
    q, k, v = qkv(10, 2, 1)
    k[:, :, 2:7], v[:, :, 2:7] = k[:, :, 2:3], v[:, :, 2:3]
    full = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    policy = Streaming(2, 3, True)
    torch.testing.assert_close(streaming_output(q, k, v, policy, 3**-0.5), full)
    assert not streaming_output(q, k, v, Streaming(2, 3), 3**-0.5).allclose(full)


MODELS = {
    "grouped": lambda: native().model,
    "gated": lambda: native(mixer="gated-softmax").model,
    "plain": lambda: native(positions="learned", norm="none", kv_heads=None, tied=True).model,
    "llama": lambda: hugging_face("llama").model,
    "gpt2": lambda: hugging_face("gpt2").model,
    "opt": lambda: hugging_face("opt").model,
    "falcon": lambda: hugging_face("falcon").model,
    "deepseek_v3": lambda: hugging_face("deepseek_v3").model,
}


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_models_are_as_they_were_when_the_cache_holds_all(name):
    model = MODELS[name]()
    text = ids(2, 11)
    layers, refused = layer_scores(model, text)
    assert not refused
    plain = model.run(text, read=[Site("z", 1)])
    whole = streaming_edits(layers, Streaming(0, 11), dict.fromkeys(layers, lambda full, near: near))
    torch.testing.assert_close(model.run(text, edit=whole).logits, plain.logits)
    short = streaming_edits(layers, Streaming(1, 2), dict.fromkeys(layers, lambda full, near: near))
    assert not model.run(text, edit=short).logits.allclose(plain.logits)
    kept = streaming_edits(layers, Streaming(1, 2), dict.fromkeys(layers, lambda full, near: full))
    torch.testing.assert_close(model.run(text, edit=kept).logits, plain.logits)


@pytest.mark.parametrize("name", ["mistral", "gemma2", "bloom", "bert", "falcon-alibi"])
def test_layers_that_cannot_stream_say_why(name):
    model = hugging_face(name, dtype=torch.float32 if name in ("gemma2", "bloom") else torch.float64).model
    layers, refused = layer_scores(model, ids(1, 11))
    assert refused
    assert set(layers) | set(refused) == {0, 1}
    assert ("bias" if name == "bloom" else "not plainly causal") in refused[0]
    assert list(layers) == ([1] if name == "gemma2" else [])


def test_a_window_that_no_prompt_leaves_is_none():
    model = hugging_face("mistral").model  # four tokens
    assert len(layer_scores(model, ids(1, 4))[0]) == 2
    assert not layer_scores(model, ids(1, 5))[0]


def test_outputs_that_are_not_attention_of_what_is_served_are_noticed():
    model = native().model

    class Louder(NativeModel):
        def run(self, tokens, read=(), edit=None, *args, **options):
            return super().run(tokens, read, {Site("z", 1): lambda z: 2 * z}, *args, **options)

    layers, refused = layer_scores(Louder(model.net), ids(1, 9))
    assert list(layers) == [0]
    assert "not softmax attention of the q, k and v" in refused[1]


def test_the_answer_needs_the_copying_head_and_no_other():
    model = wb.load("compiled-needle")
    pairs = needles(model, 96, 6)
    others = [(la, h) for la in range(2) for h in range(4) if (la, h) != (1, 1)]
    effect = streaming_effect(model, pairs, {"copying": [(1, 1)], "others": others}, Streaming(2, 8), random=3)
    table = effect.frame().set_index(["condition", "random"])
    assert table.loc[("none", False), "accuracy"] == 1
    assert table.loc[("copying", False), "accuracy"] < 0.7
    assert table.loc[("copying", False), "probability"] < 0.02
    assert table.loc[("copying", True), "accuracy"] == 1
    assert table.loc[("others", False), "accuracy"] == 1
    assert table.loc[("others", False), "kl"] < 1e-3
    assert table.loc[("others", True), "probability"] < 0.02  # seven of eight heads cannot leave it out
    assert table["heads"].tolist() == [0, 1, 1, 7, 7]


def test_effects_are_drawn_and_saved(tmp_path):
    model = wb.load("compiled-needle")
    effect = streaming_effect(model, needles(model, 48, 2), {"a": [(1, 1)], "nobody": []}, Streaming(2, 8), random=2)
    assert effect.conditions == ("none", "a", "a", "a", "nobody")
    assert [t.get_text() for t in effect.plot().get_yticklabels()] == ["none", "a", "random, as many as a", "nobody"]
    saved = load_result(effect.save(tmp_path / "effect"))
    assert saved.tensors["metrics.accuracy"].shape == (5, 2)
    assert effect.metrics["kl"][4].abs().max() < 1e-9


def test_what_cannot_be_asked_is_refused():
    model = wb.load("compiled-needle")
    pairs = needles(model, 48, 2)
    with pytest.raises(UnknownName, match="key-value head of 'x'"):
        streaming_effect(model, pairs, {"x": [(0, 4)]})
    with pytest.raises(WorkbenchError, match="recent >= 1"):
        Streaming(0, 0)
    with pytest.raises(WorkbenchError, match="random counts"):
        streaming_effect(model, pairs, {}, random=-1)
    local = hugging_face("mistral").model
    text = ids(2, 11)
    made = Pairs(text, text, text[:, :1], text[:, :1], torch.tensor([10, 10]))
    with pytest.raises(Refused, match="cannot be streaming: its mask"):
        streaming_effect(local, made, {"x": [(0, 0)]})
