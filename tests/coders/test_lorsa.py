"""Lorsa: literal attention, exact layers of models, gradients, source attributions, a short training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import workbench as wb
from workbench.coders.coder import Progress
from workbench.coders.cross_layer import CrossLayer
from workbench.coders.lorsa import Lorsa
from workbench.coders.lorsa_train import spread, train_lorsa
from workbench.coders.query_key import QueryKeyWeights
from workbench.datasets.corpus import filler_text
from workbench.errors import Refused, UnknownName, WorkbenchError

H, D, E, F, OUT, K, T = 2, 5, 6, 8, 4, 3, 7


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights(**options: Any) -> QueryKeyWeights:
    parts = {"b_q": normal(H, E, seed=3), "b_k": normal(H, E, seed=4)}
    return QueryKeyWeights(normal(H, D, E, seed=1), normal(H, D, E, seed=2), **{**parts, **options})


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"b_q": None, "b_k": None},
    "rotary halves": {"rates": torch.tensor([1.0, 0.3, 0.02])},
    "rotary neighbours, part of the head": {"rates": torch.tensor([1.0, 0.1]), "adjacent": True, "rotary_scale": 1.2},
    "norms on queries and keys": {"q_norm": normal(E, seed=5), "k_norm": normal(E, seed=6), "eps": 1e-3},
    "window, softcap and sink": {"window": 3, "softcap": 2.0, "sink": normal(H, seed=7), "scale": 0.7},
    "both directions": {"causal": False},
}


def lorsa_of(setting: str = "rotary halves", k: int = K) -> Lorsa:
    lorsa = Lorsa(weights(**SETTINGS[setting]), F, k, width_out=OUT).double()
    with torch.no_grad():
        for i, part in enumerate((lorsa.W_V, lorsa.b_V, lorsa.W_O, lorsa.b_O)):
            part.copy_(normal(*part.shape, seed=20 + i))
    return lorsa


def literal_patterns(setting: str, x: Tensor, padding: Tensor) -> Tensor:
    """``[B, H, T, T]``, one pair of positions after the other."""
    w = weights(**SETTINGS[setting])
    out = torch.zeros(len(x), H, T, T, dtype=torch.float64)

    def vector(weight: Tensor, bias: Tensor | None, norm: Tensor | None, row: Tensor, position: int) -> Tensor:
        v = row @ weight + (0 if bias is None else bias)
        v = v if norm is None else v / (v.square().mean() + w.eps).sqrt() * norm
        v = v.clone()
        for m, rate in enumerate([] if w.rates is None else w.rates.double()):
            i, j = (2 * m, 2 * m + 1) if w.adjacent else (m, m + len(w.rates if w.rates is not None else ()))
            c, s = torch.cos(position * rate) * w.rotary_scale, torch.sin(position * rate) * w.rotary_scale
            v[i], v[j] = v[i] * c - v[j] * s, v[j] * c + v[i] * s
        return v

    for b in range(len(x)):
        for h in range(H):
            for t in range(T):
                if not padding[b, t]:
                    continue
                q = vector(w.q[h], None if w.b_q is None else w.b_q[h], w.q_norm, x[b, t], t)
                mass = {}
                for s in range(T):
                    if not padding[b, s] or (w.causal and s > t) or (w.window is not None and t - s >= w.window):
                        continue
                    k = vector(w.k[h], None if w.b_k is None else w.b_k[h], w.k_norm, x[b, s], s)
                    score = q @ k * (E**-0.5 if w.scale is None else w.scale)
                    mass[s] = (w.softcap * torch.tanh(score / w.softcap) if w.softcap else score).exp()
                total = sum(mass.values()) + (w.sink[h].exp() if w.sink is not None else 0)
                for s, value in mass.items():
                    out[b, h, t, s] = value / total
    return out


@pytest.mark.parametrize("setting", SETTINGS)
def test_codes_and_maps_are_those_of_literal_attention(setting: str) -> None:
    lorsa, x = lorsa_of(setting), normal(2, T, D, seed=9)
    padding = torch.ones(2, T, dtype=torch.bool)
    padding[1, :2] = False
    patterns = literal_patterns(setting, x, padding)
    assert torch.allclose(lorsa.attention(x, padding).rows(0, T), patterns, atol=1e-12)
    values = x @ lorsa.W_V + lorsa.b_V
    pre = torch.stack([torch.einsum("bts,bs->bt", patterns[:, i // (F // H)], values[..., i]) for i in range(F)], -1)
    assert torch.allclose(lorsa.pre(x, padding), pre, atol=1e-12)
    z = torch.zeros_like(pre)
    for b in range(2):
        for t in range(T):
            for i in pre[b, t].topk(K).indices:
                z[b, t, i] = max(pre[b, t, i], torch.zeros((), dtype=torch.float64))
    assert torch.allclose(lorsa.encode(x, padding), z, atol=1e-12)
    assert torch.allclose(lorsa(x, padding), z @ lorsa.W_O + lorsa.b_O, atol=1e-12)
    for i in (0, 3, F - 1):
        one = lorsa.feature_attention(x, i, padding)
        assert torch.allclose(one.rows(0, T)[:, 0], patterns[:, i // (F // H)], atol=1e-12)
        for t in (0, T - 1):
            source = lorsa.feature_source(x, i, t, padding)
            assert torch.allclose(source, patterns[:, i // (F // H), t] * values[..., i], atol=1e-12)
            assert torch.allclose(source.sum(1), pre[:, t, i], atol=1e-12)


@pytest.mark.parametrize("setting", ["rotary halves", "norms on queries and keys", "window, softcap and sink"])
def test_gradients_are_finite_differences(setting: str) -> None:
    lorsa = lorsa_of(setting)
    x, y = normal(2, T, D, seed=9), normal(2, T, OUT, seed=10)
    padding = torch.ones(2, T, dtype=torch.bool)
    padding[1, 5:] = False
    silent = torch.zeros(F)
    silent[:2] = 100
    now = Progress(3, 10, silent, 100)
    lorsa.objective(x, y, now, padding).loss.backward()
    with torch.no_grad():
        kept_output = lorsa(x, padding)  # the auxiliary loss takes what is left as given
    for name, parameter in lorsa.named_parameters():
        assert parameter.grad is not None, name
        for at in range(0, parameter.numel(), max(1, parameter.numel() // 5)):
            flat, size, losses = parameter.data.view(-1), 1e-6, []
            kept = float(flat[at])
            for sign in (1, -1):
                with torch.no_grad():
                    flat[at] = kept + sign * size
                    terms = lorsa.objective(x, y, now, padding)
                    losses.append(float(terms.parts["error"]) + _auxiliary(lorsa, x, y - kept_output, padding) / 32)
                    flat[at] = kept
            slope = (losses[0] - losses[1]) / (2 * size)
            assert float(parameter.grad.view(-1)[at]) == pytest.approx(slope, rel=1e-5, abs=1e-6), name


def _auxiliary(lorsa: Lorsa, x: Tensor, left: Tensor, padding: Tensor) -> float:
    """Features 0 and 1 are dead, and two are as many as half the width."""
    made = lorsa.pre(x, padding)[..., :2].relu() @ lorsa.W_O[:2]
    return float((made - left).square().sum(-1)[padding].mean())


@pytest.mark.parametrize(
    ("name", "layers"), [("compiled-induction", (0, 1)), ("compiled-ioi", (1,)), ("tiny-softmax", (1, 3))]
)
def test_layers_of_bundled_models_are_reproduced(name: str, layers: tuple[int, ...]) -> None:
    model = wb.load(name)
    ids = torch.randint(model.shape.vocab, (2, 40), generator=torch.Generator().manual_seed(5))
    for layer in layers:
        lorsa = Lorsa.exact(model, layer)
        (read,), (write,) = lorsa.about["reads"], lorsa.about["writes"]
        with torch.no_grad():
            run = model.run(ids, read=[read, write], maps=wb.capture(layers=[layer]))
            x = run.acts[read]
            lorsa.requires_grad_(False)
            made = lorsa(x)
        assert float((made - run.acts[write]).norm()) < 1e-5 * float(run.acts[write].norm()) + 1e-6
        assert torch.allclose(lorsa.attention(x).rows(0, 40), run.maps[layer].rows(0, 40), atol=1e-5)
        feature = int(lorsa.pre(x)[0, 30].argmax())
        source = lorsa.feature_source(x, feature, 30)
        assert float((source.sum(1) - lorsa.pre(x)[:, 30, feature]).abs().max()) < 1e-6
        assert not source[:, 31:].any()


def test_an_induction_layer_reads_what_followed_the_token_before() -> None:
    """The code of a repeated token comes from the token behind its first copy, where the compiled head looks."""
    model = wb.load("compiled-induction")
    lorsa = Lorsa.exact(model, 1)
    pairs = wb.task("induction").build(seed=0, tokenizer=model.tokenizer, n=4)
    with torch.no_grad():
        x = model.run(pairs.clean, read=lorsa.about["reads"]).acts[lorsa.about["reads"][0]]
    last = pairs.clean.shape[1] - 1
    strongest = lorsa.encode(x)[:, last].masked_fill(lorsa.groups != 2, -1).argmax(-1)  # head 1.2 is the mechanism
    for b, feature in enumerate(strongest.tolist()):
        source = lorsa.feature_source(x[b : b + 1], feature, last)[0]
        earlier = (pairs.clean[b, :last] == pairs.clean[b, last]).nonzero()[-1]
        assert int(source.abs().argmax()) == int(earlier) + 1


def _hugging_face(name: str) -> Any:
    import transformers as t

    sizes: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50,
        "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    net: Any
    if name == "gpt2":
        net = t.GPT2LMHeadModel(
            t.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, bos_token_id=1, eos_token_id=2)
        )
    elif name == "neox":
        net = t.GPTNeoXForCausalLM(t.GPTNeoXConfig(rotary_pct=0.5, **sizes))
    elif name == "qwen3":
        net = t.Qwen3ForCausalLM(t.Qwen3Config(head_dim=16, num_key_value_heads=2, **sizes))
    elif name == "mistral":
        net = t.MistralForCausalLM(t.MistralConfig(sliding_window=8, num_key_value_heads=2, **sizes))
    elif name == "qwen2":
        net = t.Qwen2ForCausalLM(t.Qwen2Config(num_key_value_heads=2, **sizes))
    elif name == "gpt-oss":
        experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
        net = t.GptOssForCausalLM(
            t.GptOssConfig(head_dim=8, sliding_window=8, num_key_value_heads=2, **experts, **sizes)
        )
    elif name == "llama3":
        scaled = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        scaling = {**scaled, "original_max_position_embeddings": 64}
        net = t.LlamaForCausalLM(t.LlamaConfig(num_key_value_heads=2, rope_scaling=scaling, **sizes))
    elif name == "gemma2":
        net = t.Gemma2ForCausalLM(t.Gemma2Config(head_dim=16, sliding_window=8, num_key_value_heads=2, **sizes))
    else:
        yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
        net = t.LlamaForCausalLM(t.LlamaConfig(attention_bias=True, num_key_value_heads=2, rope_scaling=yarn, **sizes))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return wb.load(net.eval())


@pytest.mark.parametrize("name", ["llama", "llama3", "gpt2", "neox", "qwen2", "qwen3", "mistral", "gpt-oss"])
def test_layers_of_hugging_face_models_are_reproduced(name: str) -> None:
    """Grouped heads, biases, rotary angles of several kinds, norms on queries and keys, windows."""
    model = _hugging_face(name)
    lorsa = Lorsa.exact(model, 1)
    (read,), (write,) = lorsa.about["reads"], lorsa.about["writes"]
    ids = torch.randint(50, (2, 60), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        run = model.run(ids, read=[read, write], logits=None)
        made = lorsa(run.acts[read])
    assert float((made - run.acts[write]).norm() / run.acts[write].norm()) < 1e-5


def test_layers_that_rank_one_heads_cannot_be_are_refused() -> None:
    with pytest.raises(Refused, match="output gate"):
        Lorsa.exact(wb.load("tiny-gated"), 1)
    gemma = _hugging_face("gemma2")
    with pytest.raises(Refused, match="such as a norm"):
        Lorsa.exact(gemma, 1)
    assert Lorsa.from_model(gemma, 1, features=16, k=4).qk.settings["softcap"] == 50.0
    with pytest.raises(UnknownName, match="0, 1, 2, 3"):
        Lorsa.exact(wb.load("tiny-softmax"), 4)
    with pytest.raises(WorkbenchError, match="multiple of the 8"):
        Lorsa.from_model(wb.load("tiny-softmax"), 0, features=12, k=4)
    with pytest.raises(WorkbenchError, match="1 to 8"):
        Lorsa(weights(), F, F + 1)
    lorsa = lorsa_of()
    with pytest.raises(WorkbenchError, match=r"\[B, T, D = 5\]"):
        lorsa(normal(T, D))
    with pytest.raises(WorkbenchError, match="padding is bool"):
        lorsa(normal(1, T, D), torch.ones(1, T))
    with pytest.raises(WorkbenchError, match="count from 0 to 7"):
        lorsa.feature_source(normal(1, T, D), F, 0)
    with pytest.raises(WorkbenchError, match="position 7"):
        lorsa.feature_source(normal(1, T, D), 0, T)


def test_padding_on_the_left_changes_nothing() -> None:
    lorsa, x = lorsa_of(), normal(1, T, D, seed=9)
    padded = torch.cat([normal(1, 3, D, seed=8) * 10, x], 1)
    mask = torch.arange(T + 3)[None] >= 3
    assert torch.allclose(lorsa(padded, mask)[:, 3:], lorsa(x), atol=1e-12)
    assert not lorsa.encode(padded, mask)[:, :3].any()


def test_normalising_changes_no_output() -> None:
    lorsa, x = lorsa_of(k=F), normal(2, T, D, seed=9)
    before = lorsa(x)
    lorsa.normalise()
    assert torch.allclose(lorsa.decoder_norms(), torch.ones(F, dtype=torch.float64))
    assert torch.allclose(lorsa(x), before, atol=1e-12)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_saved_lorsa_comes_back(setting: str, tmp_path: Path) -> None:
    lorsa, x = lorsa_of(setting), normal(2, T, D)
    lorsa.about = {"model": "m", "reads": ["blocks.0.ln1.hook_normalized"]}
    back = Lorsa.load(lorsa.save(tmp_path / "l"))
    assert torch.equal(back(x), lorsa(x))
    assert back.about == lorsa.about
    assert back.k == K
    with pytest.raises(WorkbenchError, match="workbench-lorsa"):
        CrossLayer.load(tmp_path / "l")


def test_angles_stay_exact_in_narrow_types() -> None:
    lorsa = lorsa_of().to(torch.bfloat16)
    assert lorsa.W_V.dtype == torch.bfloat16
    assert lorsa.qk.rates is not None
    assert lorsa.qk.rates.dtype == torch.float64
    assert torch.equal(lorsa.qk.rates, torch.tensor([1.0, 0.3, 0.02]).double())


def test_training_explains_most_of_a_layer() -> None:
    model = wb.load("tiny-softmax")
    texts = [filler_text(i, 60) for i in range(60)]
    lorsa = train_lorsa(model, 1, texts, features=128, k=16, steps=40, tokens=512, context=64)
    tokens = model.tokens([filler_text(i, 60) for i in range(1000, 1004)])
    (read,), (write,) = lorsa.about["reads"], lorsa.about["writes"]
    with torch.no_grad():
        run = model.run(tokens, read=[read, write], logits=None)
        left = (lorsa(run.acts[read], tokens.mask) - run.acts[write])[tokens.mask]
    fvu = float(left.square().sum(-1).mean() / spread(run.acts[write], tokens.mask))
    assert fvu < 0.3  # the mean of the outputs leaves 1
    assert lorsa.about["recipe"]["fvu"] == pytest.approx(fvu, abs=0.15)
    assert int((lorsa.encode(run.acts[read]) > 0).sum(-1).max()) <= 16
    assert not any(parameter.requires_grad for parameter in lorsa.parameters())
    again = train_lorsa(model, 1, texts, features=128, k=16, steps=2, tokens=512, context=64)
    once_more = train_lorsa(model, 1, texts, features=128, k=16, steps=2, tokens=512, context=64)
    assert torch.equal(again.W_V, once_more.W_V)


def test_a_training_that_runs_out_of_texts_says_so() -> None:
    model = wb.load("tiny-softmax")
    with pytest.raises(Refused, match="ended after 1 of 3 steps"):
        train_lorsa(model, 1, iter([filler_text(0, 30)]), features=16, k=4, steps=3, tokens=512)


def test_planted_heads_are_found() -> None:
    """Sequences of sparse features that a Lorsa moves: another one, of the same queries and keys, learns its directions."""
    generator = torch.Generator().manual_seed(0)
    width, count = 16, 12
    query_key = QueryKeyWeights(torch.zeros(2, width, 4), torch.zeros(2, width, 4), torch.randn(2, 4, generator=generator) * 2,
                                torch.randn(2, 4, generator=generator) * 2, rates=torch.tensor([1.0, 0.2]))  # fmt: skip
    teacher = Lorsa(query_key, count, count, seed=1)
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    with torch.no_grad():
        teacher.W_V.copy_(basis[:, :count])
    student = Lorsa(query_key, 2 * count, 4, seed=2)
    optimiser = torch.optim.Adam([student.W_V, student.b_V, student.W_O, student.b_O], lr=2e-2)
    silent = torch.zeros(2 * count)
    for step in range(250):
        codes = (torch.rand(8, 24, width, generator=generator) < 0.05) * (
            torch.rand(8, 24, width, generator=generator) + 0.5
        )
        x = codes @ basis.T
        terms = student.objective(x, teacher(x).detach() * 4, Progress(step, 250, silent, 2000))
        optimiser.zero_grad()
        terms.loss.backward()
        optimiser.step()
        silent = torch.where(terms.active > 0, 0.0, silent + 8 * 24)
    rows = student.W_O / student.decoder_norms()[:, None]
    cosines = teacher.W_O @ rows.T
    same = teacher.groups[:, None] == student.groups
    assert float(cosines.detach().masked_fill(~same, -1).amax(1).mean()) > 0.9
