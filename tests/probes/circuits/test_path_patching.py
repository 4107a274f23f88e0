"""Path patching against split inputs, exact edges, PyTorch hooks on a Hugging Face module, and a compiled circuit."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import workbench as wb
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.load import load
from workbench.pairs import logit_difference
from workbench.probes.circuits.components import Setting
from workbench.probes.circuits.find import find_circuit
from workbench.probes.circuits.methods.path_patching import path_patching
from workbench.sites import Site

SENDERS = ("a1.h1", "input", "a0.h0", "m1", "a0.h3", "a2.h3", "m0", "a1.h2")
RECEIVERS = ("logits", "a1.h2<q>", "a1.g0<k>", "a2.g1<v>", "m2", ("a2.h0<q>", "a1.h3<q>"))
CHANNEL = {"q": "q_input", "k": "k_input", "v": "v_input"}
ORDER = ("input", "a0", "m0", "a1", "m1", "a2", "m2", "logits")


def before(sender, receiver):
    return ORDER.index(sender.split(".")[0]) < ORDER.index(receiver.split(".")[0].split("<")[0])


def literally(model, pairs, sender, receivers):
    """One sender, one group of receivers, one run at a time, through the split inputs of the receivers."""
    layers = range(model.shape.layers)
    z = [Site("z", layer) for layer in layers]
    clean = model.run(pairs.clean, read=z)
    corrupt = model.run(pairs.corrupt, read=[*z, *(Site("mlp_out", layer) for layer in layers), Site("resid_pre", 0)])
    frozen = {site: clean.acts[site].clone() for site in z}
    if sender == "input":
        frozen[Site("resid_pre", 0)] = corrupt.acts[Site("resid_pre", 0)]
    elif sender.startswith("m"):
        frozen[Site("mlp_out", int(sender[1:]))] = corrupt.acts[Site("mlp_out", int(sender[1:]))]
    else:
        layer, head = map(int, sender[1:].split(".h"))
        frozen[z[layer]][:, :, head] = corrupt.acts[z[layer]][:, :, head]
    inputs = {}
    for receiver in receivers:
        if receiver == "logits":
            inputs[receiver] = Site("resid_post", model.shape.layers - 1)
        elif receiver.startswith("m"):
            inputs[receiver] = Site("mlp_in", int(receiver[1:]))
        else:
            layer, index = map(int, receiver[1:-3].replace("g", "h").split(".h"))
            inputs[receiver] = Site(CHANNEL[receiver[-2]], layer, index)
    third = model.run(pairs.clean, read=list(inputs.values()), edit=frozen)
    fourth = model.run(pairs.clean, edit={site: third.acts[site] for site in inputs.values()})
    ends = [float(logit_difference(run.logits, pairs).mean()) for run in (clean, corrupt, fourth)]
    return (ends[2] - ends[0]) / (ends[1] - ends[0])


@pytest.fixture(scope="module")
def model(make):
    return make(layers=3, positions="rotary")


@pytest.fixture(scope="module")
def pairs(make_pairs):
    return make_pairs()


@pytest.mark.parametrize("batch", [2, 16])
def test_every_path_equals_the_literal_procedure(model, pairs, batch, monkeypatch):
    monkeypatch.setattr(Setting, "at_once", 3)
    found = path_patching(model, pairs, SENDERS, RECEIVERS, batch=batch)
    assert found.receivers == (*RECEIVERS[:-1], "a2.h0<q>+a1.h3<q>")
    with torch.no_grad():
        for i, sender in enumerate(SENDERS):
            for j, receiver in enumerate(RECEIVERS):
                group = (receiver,) if isinstance(receiver, str) else receiver
                if any(before(sender, each) for each in group):
                    expected = literally(model, pairs, sender, group)
                    assert float(found.effect[i, j]) == pytest.approx(expected, rel=1e-9, abs=1e-12)
                else:
                    assert found.effect[i, j].isnan()
    assert (found.effect[~found.effect.isnan()].abs() > 1e-4).double().mean() > 0.8


def test_without_mlps_a_path_is_an_edge(make, pairs):
    """No MLP lies between a sender and its receiver, so that the path is the edge alone."""
    model = make(mlp_width=0)
    edges = find_circuit(model, pairs, "patching", "edge")
    exact = dict(zip(edges.names, edges.scores.tolist(), strict=True))
    receivers = ["logits", "a1.h0<q>", "a1.h3<q>", "a1.g0<k>", "a1.g1<v>"]
    senders = ["input", *(f"a0.h{h}" for h in range(4))]
    found = path_patching(model, pairs, senders, receivers)
    change = (found.clean - found.patched).mean(-1)
    expected = [[exact[f"{sender}->{receiver}"] for receiver in receivers] for sender in senders]
    torch.testing.assert_close(change, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def gpt2(vocab=11, layers=3):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=vocab, n_positions=16, n_embd=16, n_layer=layers, n_head=4, initializer_range=0.4)
    return GPT2LMHeadModel(config).eval()


def by_hooks(module, pairs, sender, receiver, channel):
    """The same procedure with PyTorch hooks: z goes into c_proj, q, k and v come out of c_attn, 4 numbers a head."""
    blocks = module.transformer.h
    seen = {}

    def run(ids, before=(), after=()):
        handles = [blocks[l].attn.c_proj.register_forward_pre_hook(hook) for l, hook in before]
        handles += [blocks[l].attn.c_attn.register_forward_hook(hook) for l, hook in after]
        logits = module(ids).logits
        for handle in handles:
            handle.remove()
        return float(logit_difference(logits, pairs).mean())

    def keep(name):
        return lambda _, inputs, output=None: seen.__setitem__(name, (inputs[0] if output is None else output).clone())

    layers = range(len(blocks))
    clean = run(pairs.clean, [(l, keep(("clean", l))) for l in layers])
    corrupt = run(pairs.corrupt, [(l, keep(("corrupt", l))) for l in layers])
    layer, head = sender
    mixed = {l: seen["clean", l].clone() for l in layers}
    mixed[layer][..., 4 * head : 4 * head + 4] = seen["corrupt", layer][..., 4 * head : 4 * head + 4]
    freeze = [(l, lambda _, inputs, l=l: (mixed[l],)) for l in layers]
    if receiver is None:
        return (run(pairs.clean, freeze) - clean) / (corrupt - clean)
    at, index = receiver
    run(pairs.clean, freeze, [(at, keep("inputs"))])
    start = 16 * "qkv".index(channel) + 4 * index

    def put(_, inputs, output):
        output = output.clone()
        output[..., start : start + 4] = seen["inputs"][..., start : start + 4]
        return output

    return (run(pairs.clean, after=[(at, put)]) - clean) / (corrupt - clean)


def test_hugging_face_equals_hooks_on_the_module(pairs):
    module = gpt2().double()
    receivers = ["logits", "a2.h1<q>", "a2.h1<k>", "a2.h3<v>", "a1.h0<k>"]
    found = path_patching(load(module), pairs, ["a0.h2", "a0.h0", "a1.h3"], receivers, batch=2)
    places = [(None, ""), ((2, 1), "q"), ((2, 1), "k"), ((2, 3), "v"), ((1, 0), "k")]
    with torch.no_grad():
        for i, sender in enumerate([(0, 2), (0, 0), (1, 3)]):
            for j, (receiver, channel) in enumerate(places):
                if receiver is None or sender[0] < receiver[0]:
                    expected = by_hooks(module, pairs, sender, receiver, channel)
                    assert float(found.effect[i, j]) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert found.effect[2, 4].isnan()
    assert (found.effect[~found.effect.isnan()].abs() > 1e-4).double().mean() > 0.8


def test_a_bridge_gives_the_numbers_of_the_model_inside(pairs, tmp_path):
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer

    from workbench.models.bridge import BridgeModel

    wb.load("tiny-softmax").tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    module = gpt2(layers=2)
    module.config.architectures = ["GPT2LMHeadModel"]
    expected = path_patching(load(module), pairs, ["a0.h2", "m0"], ["logits", "a1.h1<q>", "a1.h0<k>", "a1.h3<v>"])
    bridge = BridgeModel(TransformerBridge.boot_transformers("gpt2", hf_model=module, tokenizer=tokenizer))
    found = path_patching(bridge, pairs, ["a0.h2", "m0"], ["logits", "a1.h1<q>", "a1.h0<k>", "a1.h3<v>"])
    torch.testing.assert_close(found.effect, expected.effect, rtol=1e-4, atol=1e-5)


def test_the_compiled_circuit_is_found_backwards(hard, induction):
    found = find_circuit(hard, induction, "path-patching")
    assert found.level == "node"
    assert found.nodes == ("a0.h1", "a1.h2")
    table = found.frame().set_index("node")
    assert table.stage[["a1.h2", "a0.h1"]].tolist() == [1, 2]
    assert table.logits["a1.h2"] == pytest.approx(1, abs=1e-4)
    assert table.k["a0.h1"] > 0.3
    assert table[["q", "v"]].loc["a0.h1"].abs().max() < 1e-4
    assert table.score[["a0.h0", "a0.h2", "a0.h3", "a1.h0", "a1.h1", "a1.h3"]].abs().max() < 1e-4
    assert table[["q", "k", "v"]].loc["a1.h2"].isna().all()  # nothing comes after it but the logits
    again = find_circuit(hard, induction, "path-patching")
    assert torch.equal(found.scores, again.scores)
    placed = find_circuit(hard, induction, "path-patching", positions="spans")
    kept = {name for name, keep in zip(placed.names, placed.kept.tolist(), strict=True) if keep}
    assert kept == {"a1.h2@END", "a0.h1@SOURCE"}


def test_grouped_heads_share_a_receiver(make, make_pairs):
    model, pairs = make(seed=9), make_pairs()
    found = find_circuit(model, pairs, "path-patching", keep=0.3, stages=2)
    assert found.names == tuple(f"a{layer}.h{head}" for layer in range(2) for head in range(4))
    first = {name for name, stage in zip(found.names, found.columns["stage"].tolist(), strict=True) if stage == 1}
    groups = {f"a{name[1]}.g{int(name[-1]) // 2}<k>" for name in first}
    assert groups == {"a1.g0<k>", "a1.g1<k>"}
    direct = path_patching(model, pairs, None, ["logits", sorted(groups)])
    sign = -1 if float((direct.corrupt - direct.clean).mean()) > 0 else 1
    assert {direct.senders[i] for i in direct.effect[:, 0].abs().argsort(descending=True)[:2]} == first
    torch.testing.assert_close(found.columns["k"][:4], sign * direct.effect[:4, 1])


def test_a_path_from_a_place_is_a_part_of_the_whole(model, make_pairs):
    """Corrupting one position at a time is exact where only one position differs in what the sender writes there."""
    pairs = make_pairs()
    last = [f"a2.h1@{t}" for t in range(pairs.clean.shape[1])]
    found = path_patching(model, pairs, ["a2.h1", *last], ["logits"], positions="each")
    torch.testing.assert_close(found.effect[0], found.effect[-1])  # the logits are read at the last position
    assert found.effect[1:-1].abs().max() < 1e-12


def test_undefined_shares_say_so(model, pairs):
    from dataclasses import replace

    same = replace(pairs, corrupt=pairs.clean)
    assert path_patching(model, same, ["a0.h1"], ["logits"]).effect.isnan().all()
    with pytest.raises(Refused, match="same mean metric"):
        find_circuit(model, same, "path-patching")


def test_result_has_a_table_a_plot_and_a_folder(model, pairs, tmp_path):
    found = path_patching(model, pairs, ["a0.h1", "a2.h0"], ["logits", "a1.h2<q>"])
    table = found.frame()
    assert list(table) == ["sender", "receiver", "effect", "low", "high"]
    first = table.iloc[0]
    assert first.low <= first.effect <= first.high
    assert table.effect.isna().tolist() == [False, False, False, True]
    assert found.plot().get_xlabel() == "receiver"
    found.save(tmp_path / "paths")


@pytest.mark.parametrize(
    ("senders", "receivers", "match"),
    [
        (["a9.h0"], ["logits"], "no sender of random 'a9.h0'"),
        (["a0.h0"], ["a1.h0<k>"], r"no receiver of random 'a1.h0<k>'.*a1\.g0<k>"),
        (["a0.h0"], ["a1.h0"], "no receiver"),
        (["a0.h0@S2"], ["logits"], "no place 'S2'"),
        (["a0.h0"], [["logits", "a1.h0<q>"]], "receiver of their own"),
        ([], ["logits"], "at least one"),
    ],
)
def test_mistakes_are_named(model, pairs, senders, receivers, match):
    with pytest.raises(WorkbenchError, match=match):
        path_patching(model, pairs, senders, receivers)


def test_options_and_levels_are_checked(model, pairs):
    with pytest.raises(Refused, match="no edge level"):
        find_circuit(model, pairs, "path-patching", "edge")
    with pytest.raises(Refused, match="cannot use ablation"):
        find_circuit(model, pairs, "path-patching", ablation="mean")
    with pytest.raises(WorkbenchError, match="share of the heads"):
        find_circuit(model, pairs, "path-patching", keep=0.0)
    with pytest.raises(UnknownName, match="option of 'path-patching'"):
        find_circuit(model, pairs, "path-patching", top=3)


def test_nothing_is_left_behind(model, pairs):
    def fail(logits, pairs):
        raise RuntimeError("metric")

    state = {name: value.clone() for name, value in model.net.state_dict().items()}
    with pytest.raises(RuntimeError, match="metric"):
        path_patching(model, pairs, ["a0.h0"], ["a1.h1<q>"], metric=fail)
    assert not any(point.fwd_hooks for point in model.net.hook_dict.values())
    assert all(torch.equal(value, state[name]) for name, value in model.net.state_dict().items())
    assert all(parameter.grad is None for parameter in model.net.parameters())
