"""Relevance against rules propagated by hand, conservation, plain gradients, and interventions."""

import threading

import pytest
import torch
import transformers as hf
from builders import hugging_face

import workbench as wb
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.hf import HFModel
from workbench.models.native import NativeModel
from workbench.models.native_net import NativeConfig, NativeNet
from workbench.probes.examples import needles
from workbench.probes.structure.relevance import deletion_curve, relevance
from workbench.probes.structure.relevance_rules import RULES, propagating


def native(seed=0, **options):
    sizes = {"layers": 2, "heads": 2, "width": 6, "head_width": 4, "vocab": 7, "mlp_width": 5, "context": 32}
    torch.manual_seed(seed)
    net = NativeNet(NativeConfig(**{**sizes, **options})).double().eval()
    with torch.no_grad():
        for name, value in net.named_parameters():
            if name.endswith(".w"):
                value.copy_(torch.rand_like(value) + 0.5)
    return NativeModel(net)


def linear(x, w, r):
    """z rule of x @ w: what each input gave to each output."""
    out = torch.zeros_like(x)
    y = x @ w
    for t in range(len(x)):
        for i in range(w.shape[0]):
            for o in range(w.shape[1]):
                out[t, i] += x[t, i] * w[i, o] / y[t, o] * r[t, o]
    return out


def by_hand(net, ids, position, target, rule):
    """Rules of one layer without biases, forward and back, relevance by relevance."""
    block, p = net.blocks[0], {k: v.detach() for k, v in net.named_parameters()}
    norm = lambda x, w: x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * w  # noqa: E731
    x = p["W_E"][ids]
    n1 = norm(x, p["blocks.0.ln1.w"])
    heads, attended, n = [], 0, len(ids)
    for h in range(2):
        q, k, v = (n1 @ p[f"blocks.0.attn.W_{c}"][h] for c in "QKV")
        s = (q @ k.T) * block.attn.mixer.scale
        a = s.masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf")).softmax(-1)
        heads.append((q, k, v, s, a, a @ v))
        attended = attended + (a @ v) @ p["blocks.0.attn.W_O"][h]
    mid = x + attended
    n2 = norm(mid, p["blocks.0.ln2.w"])
    pre = n2 @ p["blocks.0.mlp.W_in"]
    post = torch.nn.functional.gelu(pre)
    out = post @ p["blocks.0.mlp.W_out"]
    end = norm(mid + out, p["ln_final.w"])
    logits = end @ p["W_U"]
    r = torch.zeros_like(logits)
    r[position, target] = logits[position, target]
    r_end = linear(end, p["W_U"], r)  # norms hand relevance through, entry by entry
    r_out, r_mid = r_end * out / (mid + out), r_end * mid / (mid + out)
    r_mid = r_mid + linear(n2, p["blocks.0.mlp.W_in"], linear(post, p["blocks.0.mlp.W_out"], r_out))
    r_x, r_att = r_mid * x / mid, r_mid * attended / mid
    share, r_heads = (0.5 if rule == "attnlrp" else 1.0), []
    joined = torch.cat([head[5] for head in heads], 1)
    r_z = linear(joined, p["blocks.0.attn.W_O"].flatten(0, 1), r_att).split(4, 1)
    for h, (q, k, v, s, a, z) in enumerate(heads):
        r_q, r_k, r_v, r_a = (torch.zeros_like(like) for like in (q, k, v, a))
        for i in range(n):
            for j in range(i + 1):
                for d in range(4):
                    part = a[i, j] * v[j, d] / z[i, d] * r_z[h][i, d]
                    r_v[j, d] += share * part
                    r_a[i, j] += (1 - share) * part
        for i in range(n):
            for j in range(i + 1):
                r_s = s[i, j] * (r_a[i, j] - a[i, j] * r_a[i].sum())
                for d in range(4):
                    part = q[i, d] * k[j, d] * block.attn.mixer.scale / s[i, j] * r_s / 2
                    r_q[i, d] += part
                    r_k[j, d] += part
        for name, values in (("V", r_v), ("Q", r_q), ("K", r_k)):
            r_x = r_x + linear(n1, p[f"blocks.0.attn.W_{name}"][h], values)
        r_heads.append(float(r_z[h].sum()))
    return r_x.sum(1), r_heads


@pytest.mark.parametrize("rule", ["attnlrp", "relp"])
def test_one_layer_as_propagated_by_hand(rule):
    model = native(layers=1, positions="none")
    ids = torch.tensor([1, 4, 2, 6, 3])
    found = relevance(model, ids, 5, position=3, rule=rule)
    want, heads = by_hand(model.net, ids, 3, 5, rule)
    torch.testing.assert_close(found.values["relevance"][0], want, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(found.heads.values["relevance"][0], torch.tensor(heads, dtype=torch.float64))
    assert float(found.values["relevance"][0, 4]) == 0  # behind the position: nothing leads there


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gpt2", "native", "tiny-gated"])
def test_the_output_keeps_every_bit(name, rule):
    if name in ("native", "tiny-gated"):
        model = native(kv_heads=1) if name == "native" else wb.load(name)
        inputs = torch.arange(6)[None]
    else:
        case = hugging_face(name, dtype=torch.float32)
        model, inputs = case.model, case.inputs
    with torch.no_grad():
        plain = model.run(inputs).logits
    with torch.enable_grad(), propagating(model, rule) as edits:
        changed = model.run(inputs, edit=edits).logits
    assert torch.equal(plain, changed.detach())


def gpt2():
    torch.manual_seed(0)
    net = hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2)
    )
    with torch.no_grad():
        for name, value in net.named_parameters():
            if "ln_" in name and name.endswith("weight"):
                value.copy_(torch.rand_like(value) + 0.5)
    return HFModel(net.double().eval(), name="gpt2")


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gpt2", "rms", "plain", "encoder", "gated"])
def test_relevances_sum_to_the_logit_without_biases(name):
    options = {
        "rms": {},
        "plain": {"positions": "learned", "norm": "none"},
        "encoder": {"causal": False},
        "gated": {"mixer": "gated-softmax"},
    }
    inputs = torch.randint(1, 7, (3, 6), generator=torch.Generator().manual_seed(0))
    model = gpt2() if name == "gpt2" else native(**options[name]) if name in options else hugging_face(name).model
    found = relevance(model, inputs, rule="relp")
    torch.testing.assert_close(found.conserved, torch.ones(3, dtype=torch.float64), atol=1e-6, rtol=0)
    # So do they before every later layer.
    torch.testing.assert_close(found.by_layer.sum(-1)[1], found.logit, atol=1e-6, rtol=1e-6)
    other = relevance(model, inputs, rule="attnlrp")
    assert float((other.conserved - 1).abs().max()) > 1e-3  # softmax keeps its gradient, which conserves nothing


def test_biases_take_their_part():
    model = native()
    with torch.no_grad():
        model.net.blocks[0].mlp.b_out.fill_(1.0)
    found = relevance(model, torch.tensor([[1, 2, 3]]), rule="relp")
    assert float((found.conserved - 1).abs()) > 1e-3


def test_rules_are_plain_gradients_where_everything_is_linear():
    model = native(norm="none", mlp_width=0, positions="learned")
    with torch.no_grad():
        for block in model.net.blocks:  # even attention, whatever the input
            block.attn.W_Q.zero_()
            block.attn.W_K.zero_()
    ids = torch.tensor([[1, 2, 3, 4]])
    found = relevance(model, ids, rule="relp")
    torch.testing.assert_close(found.values["relevance"], found.values["gradient"])
    with torch.no_grad():
        for block in model.net.blocks:
            block.attn.W_O.zero_()
    found = relevance(model, ids, rule="attnlrp")
    torch.testing.assert_close(found.values["relevance"], found.values["gradient"])
    torch.testing.assert_close(found.values["relevance"].sum(1), found.logit)


def test_gradient_times_input_is_what_autograd_says():
    model = native()
    ids = torch.tensor([[1, 2, 3, 4], [4, 4, 1, 0]])
    found = relevance(model, ids, torch.tensor([2, 5]), position=2, rule="gradient")
    x = model.net.W_E.detach()[ids].requires_grad_()
    logits = model.run(ids, edit={"hook_embed": lambda _: x}).logits
    (grad,) = torch.autograd.grad(logits[0, 2, 2] + logits[1, 2, 5], x)
    torch.testing.assert_close(found.values["relevance"], (grad * x.detach()).sum(-1))
    assert set(found.values) == {"relevance"}


def test_hooks_are_gone_afterwards_and_other_threads_never_see_them():
    model = native()
    ids = torch.tensor([[1, 2, 3, 4]])

    def gradient():
        return relevance(model, ids, rule="gradient").values["relevance"]

    plain, seen, changed = gradient(), [], []

    def broken():
        with propagating(model, "relp"):
            thread = threading.Thread(target=lambda: seen.append(gradient()))
            thread.start()
            thread.join()
            changed.append(gradient())
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        broken()
    assert torch.equal(seen[0], plain)
    assert not torch.allclose(changed[0], plain)
    assert torch.equal(gradient(), plain)
    assert not any(module._forward_hooks for module in model.net.modules())


@pytest.mark.parametrize("name", ["native", "llama"])
def test_padding_counts_for_nothing(name):
    model = native() if name == "native" else hugging_face("llama").model
    ids = torch.tensor([[1, 2, 3, 4, 5], [3, 2, 6, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    both = relevance(model, {"input_ids": ids, "attention_mask": mask}, [4, 2])
    assert both.position.tolist() == [4, 2]
    assert both.values["relevance"][1, 3:].isnan().all()
    assert "padding" in both.undefined
    for row, length, target in ((0, 5, 4), (1, 3, 2)):
        alone = relevance(model, ids[row : row + 1, :length], target)
        torch.testing.assert_close(
            both.values["relevance"][row, :length], alone.values["relevance"][0], rtol=1e-6, atol=1e-9
        )
        torch.testing.assert_close(both.by_layer[:, row, :length], alone.by_layer[:, 0], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(both.conserved[row], alone.conserved[0], rtol=1e-6, atol=1e-9)


def test_models_without_gradients_of_weights_serve():
    model = native().net
    wrapped, ids = NativeModel(model), torch.tensor([[1, 2, 3]])
    want = relevance(wrapped, ids).values["relevance"]
    with torch.no_grad():
        assert torch.equal(relevance(NativeModel(model.requires_grad_(False)), ids).values["relevance"], want)


def positive(values):
    part = values.clamp(min=0)
    return part / part.sum(1, keepdim=True)


def test_needles_are_found_on_the_value_which_the_model_needs():
    model = wb.load("tiny-softmax")
    pairs = needles(model, 96, 12)
    rows, value = torch.arange(12), pairs.spans["VALUE"][:, 0]
    for rule in ("attnlrp", "relp"):
        found = relevance(model, pairs, rule=rule)
        shares = positive(found.values["relevance"])[rows, value]
        plain = positive(found.values["gradient"])[rows, value]
        chance = positive(found.null["relevance"])[rows, value]
        assert bool((positive(found.values["relevance"]).argmax(1) == value).all())
        assert float(shares.mean()) > 0.6
        assert float(shares.mean()) > float(plain.mean())
        assert float(shares.mean()) > 2 * float(chance.mean())
        curve = deletion_curve(model, pairs, found.values["relevance"], counts=(1, 4), random=4)
        drop, by_chance = (curve.base - x.mean(tuple(range(x.ndim - 1))) for x in (curve.ranked, curve.random))
        assert bool((drop > by_chance + 5).all())
    by_gradient = deletion_curve(model, pairs, found.values["gradient"], counts=(1, 4), random=1)
    assert bool((curve.ranked.mean(1) < by_gradient.ranked.mean(1)).all())


def test_a_network_of_permuted_weights_finds_nothing():
    model = wb.load("tiny-softmax")
    pairs = needles(model, 96, 12)
    generator = torch.Generator().manual_seed(0)
    net = NativeNet(model.net.config).eval()
    with torch.no_grad():
        for mine, its in zip(net.parameters(), model.net.parameters(), strict=True):
            mine.copy_(its.flatten()[torch.randperm(its.numel(), generator=generator)].view_as(its))
    found = relevance(NativeModel(net), pairs, rule="relp")
    share = positive(found.values["relevance"])[torch.arange(12), pairs.spans["VALUE"][:, 0]]
    assert float(share.mean()) < 0.1


def test_deleting_is_replacing_words_by_the_mean_word():
    model = native()
    ids = torch.tensor([[1, 2, 3, 4]])
    weight = torch.tensor([[0.1, float("nan"), 0.3, 9.0]])
    curve = deletion_curve(model, ids, weight, 5, counts=(1, 2, 3), random=2)
    x = model.net.W_E.detach()[ids].clone()
    for step, token in enumerate((2, 0, 1)):  # largest first, the undefined one last, the asking one never
        x[:, token] = model.net.W_E.detach().mean(0)
        want = model.run(ids, edit={"hook_embed": x}).logits[0, -1, 5]
        torch.testing.assert_close(curve.ranked[step, 0], want.detach())
    torch.testing.assert_close(curve.base[0], model.run(ids).logits[0, -1, 5].detach())


def test_wrong_inputs_are_refused_by_name():
    model, ids = native(), torch.tensor([[1, 2, 3]])
    with pytest.raises(UnknownName, match="relp"):
        relevance(model, ids, rule="lrp")
    with pytest.raises(WorkbenchError, match="0 to 6"):
        relevance(model, ids, 7)
    with pytest.raises(WorkbenchError, match="position"):
        relevance(model, ids, position=3)
    with pytest.raises(Refused, match="linear-attention"):
        relevance(native(mixer="linear-attention"), ids)
    for name in ("gemma2", "bert", "deepseek_v3", "gpt_oss"):
        case = hugging_face(name)
        with pytest.raises(Refused, match="has no rules for a"):
            relevance(case.model, case.inputs)
    with pytest.raises(WorkbenchError, match="counts"):
        deletion_curve(model, ids, torch.zeros(1, 3), counts=(3,))
    with pytest.raises(WorkbenchError, match="one number per token"):
        deletion_curve(model, ids, torch.zeros(1, 4))
    pairs = needles(wb.load("tiny-softmax"), 64, 2)
    with pytest.raises(WorkbenchError, match="pairs say"):
        relevance(wb.load("tiny-softmax"), pairs, 3)
