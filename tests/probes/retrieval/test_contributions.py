from dataclasses import replace

import pytest
import torch
from builders import hugging_face, native
from random_nets import ids

import workbench as wb
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.native import NativeModel
from workbench.pairs import Pairs
from workbench.probes.examples import needles
from workbench.probes.importance.comparison import compare_rankings
from workbench.probes.retrieval.contributions import contributions
from workbench.probes.retrieval.direct_path import norm_of, output_weights
from workbench.probes.retrieval.trials import by_position, needle_spans, windows_elsewhere
from workbench.sites import Site


def prompts(model, batch=2, length=13, spans=((3, 5), (6, 9)), steps=1):
    """Random prompts whose accepted answers are the tokens that the model writes after them."""
    text = ids(batch, length)
    written = text
    for _ in range(steps):
        written = torch.cat([written, model.run(written, logits="last").logits[:, -1:].argmax(-1)], 1)
    answer = written[:, length:]
    where = torch.full((batch,), length - 1)
    return Pairs(text, text, answer, answer, where, {"NEEDLE": torch.tensor(spans[:batch])})


def by_hand(model, text, span, tokens, norm="none"):
    """S, the needle's sum, all keys' sum and the contrast of the weights by loops: ``[steps, 4, L, H]`` of one prompt."""
    shape, found = model.shape, []
    lo, hi = span
    last = Site("resid_post", shape.layers - 1)
    for t, y in enumerate(tokens):
        whole = torch.cat([text, torch.tensor(tokens[:t], dtype=torch.long)])[None]
        sites = [Site(kind, layer) for layer in range(shape.layers) for kind in ("v", "result")]
        run = model.run(whole, read=[*sites, last], maps=wb.capture())
        u = model.weight("W_U")[:, y].double()
        if norm == "frozen":
            x = run.acts[last][0, -1].double()
            u = u * model.net.ln_final.w / (x.pow(2).mean() + 1e-6).sqrt()
        step = torch.zeros(4, shape.layers, shape.heads, dtype=torch.float64)
        for layer in range(shape.layers):
            dense = run.maps[layer].dense()[0].double()
            values = run.acts[Site("v", layer)][0].double()
            for h in range(shape.heads):
                out = model.weight("W_O", layer)[h].double()
                keys = dense.shape[-1]
                phi = [
                    dense[h, -1, j] * (values[j, h // (shape.heads // shape.kv_heads)] @ out @ u) for j in range(keys)
                ]
                needle = sum(phi[lo:hi])
                rest = sum(phi[:lo]) + sum(phi[hi:])
                looks, away = dense[h, -1, lo:hi].sum(), dense[h, -1, :lo].sum() + dense[h, -1, hi:].sum()
                share = (hi - lo) / (keys - (hi - lo))
                step[:, layer, h] = torch.stack([needle - share * rest, needle, needle + rest, looks - share * away])
                # the keys' contributions are the head's own, u^T result
                torch.testing.assert_close(needle + rest, run.acts[Site("result", layer)][0, -1, h].double() @ u)
        found.append(step)
    return torch.stack(found)


def measured(table):
    return torch.stack([torch.stack(list(table.values[name].values())) for name in table.values])


MODELS = {
    "grouped": lambda: native().model,
    "gated": lambda: native(mixer="gated-softmax").model,
    "plain": lambda: native(positions="learned", norm="none", kv_heads=None, tied=True).model,
    "llama": lambda: hugging_face("llama").model,
    "gpt2": lambda: hugging_face("gpt2").model,
    "falcon": lambda: hugging_face("falcon").model,
}


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cache", [True, False])
def test_contributions_are_what_loops_over_keys_give(name, cache):
    model = MODELS[name]()
    pairs = prompts(model, steps=3)
    expected = []
    for b in range(2):
        tokens = pairs.answer[b].tolist()
        expected.append(by_hand(model, pairs.clean[b], pairs.spans["NEEDLE"][b].tolist(), tokens).mean(0))
    found = contributions(model, pairs, max_new_tokens=3, cache=cache)
    torch.testing.assert_close(measured(found), torch.stack(expected).mean(0), atol=1e-9, rtol=1e-7)


@torch.no_grad()
def test_the_scale_of_the_norm_is_frozen_where_asked():
    case = native()
    case.net.ln_final.w.uniform_(0.5, 2.0)
    pairs = prompts(case.model)
    expected = torch.stack(
        [
            by_hand(case.model, pairs.clean[b], pairs.spans["NEEDLE"][b].tolist(), pairs.answer[b].tolist(), "frozen")[
                0
            ]
            for b in range(2)
        ]
    ).mean(0)
    found = contributions(case.model, pairs, norm="frozen")
    torch.testing.assert_close(measured(found), expected, atol=1e-6, rtol=1e-4)  # the norm's epsilon is not seen
    with pytest.raises(UnknownName, match="none, frozen"):
        contributions(case.model, pairs, norm="folded")


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_all_direct_paths_together_are_the_logit(name):
    """Embeddings, heads and MLPs along the frozen norm: the sum is the logit, so that contributions are logits."""
    model = MODELS[name]()
    run = model.run(ids(1, 9), read=["blocks.1.hook_resid_post"])
    stream = run.acts[Site("resid_post", 1)][0]
    norm = norm_of(stream, run.output[0])
    y = 7
    through = norm.through(model.weight("W_U")[:, y][None].double(), stream[-1:])
    shift = run.output[0, -1] - (stream[-1] * norm.through(torch.eye(len(stream[-1])).double(), stream[-1:])).sum(-1)
    logit = through[0] @ stream[-1] + shift @ model.weight("W_U")[:, y]
    torch.testing.assert_close(logit, run.logits[0, -1, y], atol=1e-6, rtol=1e-6)
    assert norm.kind == ("rms" if name == "llama" else "layer")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_directions_are_the_gradient_with_the_scale_held_fixed(name):
    model = MODELS[name]()
    run = model.run(ids(1, 9), read=["blocks.1.hook_resid_post"])
    stream, normalised = run.acts[Site("resid_post", 1)][0].detach(), run.output[0].detach()
    u = model.weight("W_U")[:, [7]].T.detach()
    x = stream[-1:].clone().requires_grad_()
    inner = model.model.transformer.ln_f if name == "gpt2" else model.model.model.norm
    middle = x - x.mean() if name == "gpt2" else x
    scale = (middle.square().mean() + 1e-5 * (name == "gpt2")).sqrt().detach()
    (middle / scale * inner.weight.detach() @ u[0]).sum().backward()
    found = norm_of(stream, normalised).through(u, stream[-1:])
    torch.testing.assert_close(found, x.grad, atol=1e-6, rtol=1e-4)


def test_a_norm_of_another_kind_is_refused():
    x = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(Refused, match="norm='none'"):
        norm_of(x, x.tanh())
    with pytest.raises(WorkbenchError, match="two tokens"):
        norm_of(x[:1], x[:1])
    assert norm_of(x, x).kind == "none"


@pytest.mark.parametrize("attention", ["hard", "soft"])
@pytest.mark.parametrize("rotate", [None, 3])
def test_the_copying_head_comes_first(attention, rotate):
    from workbench.datasets.models.compile import compiled

    model = compiled("compiled-needle", attention, rotate=rotate)
    model.tokenizer = wb.load("compiled-needle").tokenizer
    found = contributions(model, needles(model, 96, 6))
    best, second = found.top("contribution", 2)
    assert best[:2] == (1, 1)
    assert best.value > (4.9 if attention == "hard" else 2)
    assert abs(second.value) < 1e-3
    assert best.null < 0


def test_trained_heads_that_write_the_answer_are_in_one_layer():
    model = wb.load("tiny-softmax")
    found = contributions(model, needles(model, 96, 8))
    assert {head.layer for head in found.top("contribution", 5)} == {1}
    low = found.low["contribution"][1]
    assert (low > found.null["contribution"][1]).all()


@torch.no_grad()
def test_the_null_is_the_mean_over_windows_elsewhere():
    model = native().model
    pairs = prompts(model, batch=1)
    lo, hi = 3, 5
    found = contributions(model, pairs).null["contribution"]
    windows = [(i, i + 2) for i in range(12) if i + 2 <= lo or i >= hi]
    expected = torch.stack([by_hand(model, pairs.clean[0], w, pairs.answer[0].tolist())[0, 0] for w in windows]).mean(0)
    torch.testing.assert_close(torch.stack(list(found.values())), expected, atol=1e-9, rtol=1e-7)


def test_examples_are_scored_one_by_one():
    model = wb.load("tiny-softmax")
    pairs = needles(model, 64, 3)
    together = contributions(model, pairs)
    alone = [contributions(model, pairs[i : i + 1]) for i in range(3)]
    mean = torch.stack([measured(one) for one in alone]).mean(0)
    torch.testing.assert_close(measured(together), mean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(measured(contributions(model, [pairs[:1], pairs[1:]])), mean, atol=1e-5, rtol=1e-4)
    assert alone[0].low["contribution"][0].isnan().all()  # one trial has no interval


def test_trials_whose_answer_is_not_written_are_left_out():
    model = wb.load("compiled-needle")
    pairs = needles(model, 64, 4)
    lost = replace(pairs, clean=pairs.corrupt, spans={"NEEDLE": torch.tensor([[3, 6]] * 4)})
    silent = contributions(model, lost)
    assert all(row.isnan().all() for row in silent.values["contribution"].values())
    assert "no step is the answer's" in silent.undefined["contribution"]
    assert silent.frame()["contribution"].isna().all()
    both = contributions(model, [pairs, lost])
    torch.testing.assert_close(measured(both), measured(contributions(model, pairs)))


def test_what_cannot_be_measured_is_refused():
    model = wb.load("compiled-needle")
    pairs = needles(model, 64, 2)
    with pytest.raises(WorkbenchError, match="max_new_tokens"):
        contributions(model, pairs, max_new_tokens=0)
    with pytest.raises(WorkbenchError, match="span named OTHER"):
        contributions(model, pairs, span="OTHER")
    with pytest.raises(WorkbenchError, match="expected Pairs"):
        contributions(model, [])


def test_a_layer_that_does_not_add_up_is_refused():
    """The map of a run and its values no longer belong together if z is scaled behind the map's back."""
    model = native().model

    class Louder(NativeModel):
        def run(self, tokens, read=(), edit=None, *args, **options):
            return super().run(tokens, read, {Site("z", 1): lambda z: 2 * z}, *args, **options)

    loud = Louder(model.net, name="loud")
    with pytest.raises(Refused, match="layer 1 of loud: head outputs are not the map times"):
        contributions(loud, prompts(loud))


def test_spans_and_windows():
    pairs = needles(wb.load("compiled-needle"), 64, 2)
    assert needle_spans(pairs).equal(pairs.spans["NEEDLE"])
    assert needle_spans(pairs, "VALUE").equal(pairs.spans["VALUE"])
    absent = replace(pairs, spans={"NEEDLE": torch.tensor([[-1, -1], [3, 4]])})
    with pytest.raises(WorkbenchError, match="absent or empty"):
        needle_spans(absent)
    moved = replace(pairs, position=torch.tensor([63, 60]))
    assert [len(part) for part in by_position(moved)] == [1, 1]
    running = torch.nn.functional.pad(torch.arange(6.0).cumsum(-1), (1, 0))
    assert windows_elsewhere(running, 2, 4, 6).tolist() == [1.0, 9.0]
    assert not len(windows_elsewhere(running[:4], 1, 3, 3))


def test_contributions_name_the_heads_that_the_answer_needs():
    """Mean ablation of the compiled model: the head that contributes loses the answer; those that look elsewhere do not."""
    model = wb.load("compiled-needle")
    task = wb.task("needle", length=64, depth=0.5, corruption="filler", split="test")
    pairs = task.build(0, model.tokenizer, 8)
    scores = contributions(model, pairs)
    found = compare_rankings(
        model,
        pairs,
        {"contribution": scores, "attention": (scores, "attention"), "bos": [(1, 0), (0, 1)]},
        counts=(1, 2),
        random=4,
    )
    table = found.by_count().set_index(["ranking", "removed"])
    assert table.loc[("contribution", 1), "base"] > 0.19
    assert table.loc[("contribution", 1), "ranked"] < 0.1 * table.loc[("contribution", 1), "base"]
    assert table.loc[("contribution", 1), "random"] > 0.99 * table.loc[("contribution", 1), "base"]
    assert table.loc[("bos", 2), "ranked"] == pytest.approx(table.loc[("bos", 2), "base"], rel=1e-3)
    assert found.curves["attention"].order[0] == "blocks.1.attn.hook_z[1]"


def test_weights_are_those_of_the_heads():
    model = wb.load("compiled-needle")
    assert output_weights(model, 1).shape == (4, 64, 210)

    class Mute:
        name = "mute"

    with pytest.raises(Refused, match="does not tell its weights"):
        output_weights(Mute(), 0)
