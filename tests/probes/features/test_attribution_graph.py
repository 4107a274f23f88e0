"""Edges against gradients of the frozen model, sums against pre-activations, selection, memory."""

import subprocess
import sys

import pytest
import torch
from frozen_cases import MID, cross_layer, gaps, ids, model_of, native, sums, transcoders

from workbench.feature_graph import FeatureGraph
from workbench.probes.features.attribution_graph import attribution_graph
from workbench.probes.features.subgraph import find_nodes
from workbench.probes.structure.relevance_rules import propagating
from workbench.sites import Site

CASES = {
    "rms": lambda: native(),
    "no norm, learned positions": lambda: native(norm="none", positions="learned"),
    "gated heads": lambda: native(mixer="gated-softmax"),
    "no biases": lambda: native(bias=False),
    "llama with groups": lambda: model_of("hf:llama"),
    "gpt2": lambda: model_of("hf:gpt2"),
    "qwen3": lambda: model_of("hf:qwen3"),
}


def scale_of(graph):
    return float(graph.nodes.columns["pre"].nan_to_num().abs().max())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("skip", [False, True])
def test_incoming_edges_and_biases_sum_to_the_pre_activation(name, skip):
    model = CASES[name]()
    graph = attribution_graph(model, transcoders(model, skip=skip), ids(model))
    assert len(find_nodes(graph, "feature")) == graph.meta["active_features"]
    assert not graph.nodes.columns["omitted"].nan_to_num().any()
    # Hugging Face's RMSNorm computes in float32 whatever the weights are.
    exact = 2e-6 if name in ("llama with groups", "qwen3") else 1e-10
    assert float(gaps(graph).abs().max()) <= exact * scale_of(graph)
    assert graph.meta["identity_error"] <= exact


@pytest.mark.parametrize("kind", ["relu", "topk", "gated", "jumprelu", "batchtopk", "matryoshka"])
def test_the_sum_holds_for_every_kind_in_float32(kind):
    model = native(dtype=torch.float32)
    graph = attribution_graph(model, transcoders(model, kind, dtype=torch.float32), ids(model))
    assert len(find_nodes(graph, "feature")) > 5
    assert float(gaps(graph).abs().max()) <= 1e-5 * scale_of(graph)
    assert graph.weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["tiny-softmax", "siit-ioi", "compiled-greater-than", "compiled-histogram"])
def test_the_sum_holds_on_bundled_models_also_where_later_tokens_are_seen(name):
    model = model_of(name)
    graph = attribution_graph(model, transcoders(model, k=4), ids(model, 8))
    assert float(gaps(graph).abs().max()) <= 1e-10 * scale_of(graph)
    later = graph.nodes.position[graph.source] > graph.nodes.position[graph.target]
    assert bool(later.any()) == (not model.shape.causal)


@pytest.mark.parametrize("skip", [False, True])
def test_a_cross_layer_transcoder_and_coders_of_the_stream(skip):
    model = native()
    for coders in (cross_layer(model, skip=skip), transcoders(model, skip=skip, reads=MID)):
        graph = attribution_graph(model, coders, ids(model))
        assert len(find_nodes(graph, "feature")) > 20
        assert float(gaps(graph).abs().max()) <= 1e-10 * scale_of(graph)


def by_gradient(model, coders, prompt):
    """Weights into every active feature and one logit as gradients of the model itself: norms and maps held by the rule
    ``relp``, MLP outputs and the embedding leaves of the graph. Without skip terms."""
    found, leaves = {}, {}
    layers = range(model.shape.layers)

    def leaf(site):
        def edit(x):
            leaves[site] = x.detach().requires_grad_()
            return leaves[site]

        return edit

    def keep(site):
        def edit(x):
            found[site] = x
            return x

        return edit

    sites = [Site("resid_pre", 0), *(Site("mlp_out", layer) for layer in layers)]
    mids = [Site("resid_mid", layer) for layer in layers]
    with torch.enable_grad(), propagating(model, "relp") as edits:
        edits = {**edits, **{s: leaf(s) for s in sites}, **{s: keep(s) for s in mids}}
        run = model.run(prompt[None], edit=edits)
        normed = {layer: model.net.blocks[layer].ln2(found[Site("resid_mid", layer)])[0] for layer in layers}
    return run.logits[0], normed, leaves


@pytest.mark.parametrize("name", ["rms", "gated heads", "no norm, learned positions"])
def test_edges_are_gradients_of_the_model_with_maps_and_norms_held(name):
    model = CASES[name]()
    prompt, coders = ids(model, 6), transcoders(model)
    graph = attribution_graph(model, coders, prompt, targets=3)
    logits, normed, leaves = by_gradient(model, coders, prompt)
    edges = {
        (s, t): w for s, t, w in zip(graph.source.tolist(), graph.target.tolist(), graph.weight.tolist(), strict=True)
    }
    nodes, checked = graph.nodes, 0
    layers = range(model.shape.layers)
    written = [leaves[Site("mlp_out", layer)][0] for layer in layers]
    errors = [written[la].detach() - coders[la](normed[la].detach()) for la in layers]
    for t in [*find_nodes(graph, "feature").tolist()[::7], int(graph.logits[0])]:
        layer, position = int(nodes.layer[t]), int(nodes.position[t])
        if layer == len(layers):
            goal = logits[position, 3] - logits[position].mean()
        else:
            goal = normed[layer][position] @ coders[layer].W_enc[:, int(nodes.feature[t])]
        grads = torch.autograd.grad(goal, list(leaves.values()), retain_graph=True, allow_unused=True)
        grads = {site: grad for site, grad in zip(leaves, grads, strict=True) if grad is not None}
        for s in range(len(nodes)):
            kind, at, where = int(nodes.kind[s]), int(nodes.position[s]), int(nodes.layer[s])
            site = Site("resid_pre", 0) if kind == 0 else Site("mlp_out", where)
            if kind == 7 or site not in grads or (kind != 0 and where >= layer):
                continue
            if kind == 0:
                vector = leaves[site][0, at].detach()
            elif kind == 1:
                vector = nodes.activation[s] * coders[where].W_dec[int(nodes.feature[s])].detach()
            else:
                vector = errors[where][at]
            assert edges.get((s, t), 0.0) == pytest.approx(float(vector.detach() @ grads[site][0, at]), abs=1e-10)
            checked += 1
    assert checked > 50


def test_selection_keeps_the_most_influential_and_the_identity():
    model = native(vocab=30)
    coders, prompt = transcoders(model, features=60, k=12), ids(model, 14)
    whole = attribution_graph(model, coders, prompt)
    some = attribution_graph(model, coders, prompt, max_features=40, batch=4)
    assert len(find_nodes(some, "feature")) == 40
    assert some.meta["active_features"] == len(find_nodes(whole, "feature")) > 400
    assert float(gaps(some).abs().max()) <= 1e-10 * scale_of(some)
    assert some.nodes.columns["omitted"].nan_to_num().any()

    # Edges that are in both graphs have one weight.
    def keys(graph):
        key = [tuple(row) for row in graph.nodes.key.tolist()]
        return {
            (key[s], key[t]): w
            for s, t, w in zip(graph.source.tolist(), graph.target.tolist(), graph.weight.tolist(), strict=True)
        }

    a, b = keys(whole), keys(some)
    assert set(b) <= set(a)
    assert all(b[e] == pytest.approx(a[e], abs=1e-12) for e in b)
    features = find_nodes(whole, "feature")
    best = features[whole.nodes.influence[features].topk(40).indices]
    mine = {tuple(row) for row in some.nodes.key[find_nodes(some, "feature")].tolist()}
    assert sum(tuple(row) in mine for row in whole.nodes.key[best].tolist()) >= 32


def test_weakest_edges_of_a_row_go_to_omitted_where_there_are_too_many():
    model = native()
    coders, prompt = transcoders(model), ids(model)
    whole = attribution_graph(model, coders, prompt)
    few = attribution_graph(model, coders, prompt, max_edges=6 * (len(find_nodes(whole, "feature")) + 10))
    assert len(few.source) < len(whole.source)
    counts = torch.bincount(few.target)
    assert int(counts.max()) <= 6 + 6
    assert float(gaps(few).abs().max()) <= 1e-10 * scale_of(few)


def test_the_strongest_edges_of_a_row_are_the_ones_kept():
    model = native()
    coders, prompt = transcoders(model), ids(model)
    whole = attribution_graph(model, coders, prompt)
    few = attribution_graph(model, coders, prompt, max_edges=6 * (len(find_nodes(whole, "feature")) + 10))
    for target in few.logits.tolist():
        kept = few.weight[few.target == target].abs().sort(descending=True).values
        every = whole.weight[whole.target == target].abs().sort(descending=True).values
        assert 0 < len(kept) < len(every)
        torch.testing.assert_close(kept, every[: len(kept)])


def test_later_tokens_are_seen_beyond_one_tile_of_keys():
    model = native(layers=2, causal=False, context=256, mlp_width=0)
    graph = attribution_graph(model, {}, ids(model, 150), position=10)
    later = graph.nodes.position[graph.source] > 10
    assert int(later.sum()) > 100
    assert float(gaps(graph).abs().max()) <= 1e-10 * scale_of(graph)


def test_logits_are_the_likely_ones_or_those_asked_for():
    model = native(vocab=30)
    coders, prompt = transcoders(model), ids(model, 5)
    logits = model.run(prompt[None]).logits[0].detach()
    share, best = logits[-1].softmax(-1).sort(descending=True)
    graph = attribution_graph(model, coders, prompt, mass=0.5, max_logits=4)
    count = min(4, int((share.cumsum(0) < 0.5).sum()) + 1)
    assert graph.nodes.feature[graph.logits].tolist() == best[:count].tolist()
    torch.testing.assert_close(graph.nodes.probability[graph.logits], share[:count].double())
    torch.testing.assert_close(
        graph.nodes.columns["pre"][graph.logits], logits[-1, best[:count]] - logits[-1].mean(), atol=1e-12, rtol=0
    )
    one = attribution_graph(model, coders, prompt, targets=7, position=2)
    assert one.nodes.feature[one.logits].tolist() == [7]
    assert one.nodes.position[one.logits].tolist() == [2]
    assert float(one.nodes.columns["pre"][one.logits]) == pytest.approx(float(logits[2, 7] - logits[2].mean()))
    both = attribution_graph(model, coders, prompt, targets=(7, 4))
    assert float(both.nodes.columns["pre"][both.logits]) == pytest.approx(float(logits[-1, 7] - logits[-1, 4]))
    assert both.nodes.label[int(both.logits[0])] == "7 - 4"


def test_texts_and_tokens_by_name():
    model = model_of("tiny-softmax")
    coders = transcoders(model, k=3)
    graph = attribution_graph(model, coders, "When Mary and John went to the store", targets=("Mary", "John"))
    assert graph.tokens[-1] == "store"
    assert graph.meta["targets"] == ["Mary - John"]


def test_mlps_without_a_coder_are_errors_as_a_whole_and_models_without_mlps_have_none():
    model = native()
    graph = attribution_graph(model, transcoders(model, layers=[1]), ids(model))
    assert set(graph.nodes.layer[find_nodes(graph, "feature")].tolist()) == {1}
    assert len(find_nodes(graph, "error")) == 3 * 9
    assert float(gaps(graph).abs().max()) <= 1e-10 * scale_of(graph)
    plain = native(mlp_width=0)
    graph = attribution_graph(plain, {}, ids(plain))
    assert not len(find_nodes(graph, "error"))
    assert graph.meta["replacement_score"] == 1.0
    assert float(gaps(graph).abs().max()) <= 1e-10 * scale_of(graph)


def test_a_perfect_coder_leaves_no_error():
    model = native(activation="relu", mlp_width=40)
    coders = transcoders(model, "relu", features=40)
    with torch.no_grad():
        for layer, coder in coders.items():
            mlp = model.net.blocks[layer].mlp
            for ours, theirs in (
                (coder.W_enc, mlp.W_in),
                (coder.b_enc, mlp.b_in),
                (coder.W_dec, mlp.W_out),
                (coder.b_dec, mlp.b_out),
            ):
                ours.copy_(theirs)
    graph = attribution_graph(model, coders, ids(model))
    assert graph.meta["replacement_score"] == pytest.approx(1, abs=1e-10)
    assert graph.meta["completeness_score"] == pytest.approx(1, abs=1e-10)


def test_saved_graphs_come_back(tmp_path):
    model = native()
    graph = attribution_graph(model, transcoders(model), ids(model))
    again = FeatureGraph.load(graph.save(tmp_path / "graph"))
    torch.testing.assert_close(sums(again), sums(graph))
    assert again.meta["replacement_score"] == graph.meta["replacement_score"]
    torch.testing.assert_close(again.nodes.columns["bias"], graph.nodes.columns["bias"], equal_nan=True)


_LONG = """
import torch
from pathlib import Path
import workbench as wb
from frozen_cases import transcoders
from workbench.probes.features.attribution_graph import attribution_graph
torch.set_num_threads(1)
model = wb.load("tiny-softmax")
coders = transcoders(model, features={size}, k=32, dtype=torch.float32)
graph = attribution_graph(model, coders, torch.arange(512) % 600 + 3, max_features={features})
assert len(graph.tokens) == 512 and len(graph.nodes) > {features}, graph
status = Path("/proc/self/status").read_text().split()
print(int(status[status.index("VmHWM:") + 1]) * 1024)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of memory from /proc")
@pytest.mark.slow
@pytest.mark.parametrize("features", [300, 7500])
def test_512_tokens_within_4_gb(features):
    paths = [path for path in sys.path if path.endswith(("tests/models", "tests/probes"))]
    code = f"import sys; sys.path += {paths!r}\n" + _LONG.format(
        features=features, size=1024 if features > 1000 else 256
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 4e9
