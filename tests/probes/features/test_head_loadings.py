from dataclasses import replace

import pytest
import torch
from builders import hugging_face
from coders_at import transcoders
from frozen_cases import MID, cross_layer, ids, native
from frozen_cases import transcoders as gathered
from natives import CONFIG, DATA, VARIANTS, make

import workbench as wb
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.feature_graph import FeatureGraph, FeatureNodes
from workbench.models.native import NativeModel
from workbench.models.native_net import NativeConfig, NativeNet
from workbench.probes.features.attribution_graph import attribution_graph
from workbench.probes.features.direct_effects import DirectEffects, feature_targets, logit_targets
from workbench.probes.features.frozen import frozen_model
from workbench.probes.features.head_loadings import head_loadings
from workbench.probes.features.replacement import active_features, replacement

ONE = DATA[:1, :5]


def some(graph, count=40):
    return list(range(0, len(graph.weight), max(1, len(graph.weight) // count)))


def test_one_layer_by_hand():
    """Two heads between an embedding and a logit, no norm: A x W_V W_O u for each, and the stream itself at its own token."""
    torch.manual_seed(0)
    config = NativeConfig(layers=1, heads=2, width=4, head_width=2, vocab=5, positions="none", norm="none", context=8)
    net = NativeNet(config).double().eval()
    model, ids = NativeModel(net, name="hand"), torch.tensor([[3, 1, 4]])
    pattern = model.run(ids, maps=wb.capture()).maps[0].dense()[0]
    u = net.W_U[:, 2] - net.W_U.mean(1)
    moved = torch.stack([net.W_E[ids[0]] @ net.blocks[0].attn.W_V[h] @ net.blocks[0].attn.W_O[h] @ u for h in range(2)])
    parts = pattern[:, 2] * moved  # [H, S]
    alone = net.W_E[4] @ u
    nodes = FeatureNodes.of(["embedding"] * 3 + ["logit"], [-1] * 3 + [1], [0, 1, 2, 2], [3, 1, 4, 2])
    weights = parts.sum(0)
    weights[2] += alone
    graph = FeatureGraph(nodes, torch.arange(3), torch.full((3,), 3), weights.detach(), tokens=("3", "1", "4"))
    found = head_loadings(graph, model, {}, [0, (1, 3), 2])
    assert found.edges.tolist() == [0, 1, 2]
    assert found.error < 1e-12
    for s in range(3):
        assert (found.loading[s, 0] - parts[:, s]).abs().max() < 1e-12
        assert (found.last[s, 0, :, s] - parts[:, s]).abs().max() < 1e-12
        assert found.cell[s, 0].tolist() == [[2, s], [2, s]]
        assert abs(found.direct[s] - (alone if s == 2 else 0)) < 1e-12


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("name", ["grouped", "gated", "biased", "learned"])
def test_parts_sum_to_the_edges_of_the_graph(name, skip):
    model = make(replace(VARIANTS[name], layers=3))
    coders = transcoders(model, skip=skip)
    graph = attribution_graph(model, coders, ONE)
    found = head_loadings(graph, model, coders, some(graph, 60))
    assert found.error < 1e-10
    kinds = {graph.frame()["kind"][int(graph.source[e])] for e in found.edges.tolist()}
    assert kinds == {"embedding", "feature", "error"}


def skipping(frozen, layer, head):
    """The frozen model with one head silent."""
    attention = frozen.attention[layer]
    pattern = attention.pattern.clone()
    pattern[head] = 0
    silent = (*frozen.attention[:layer], replace(attention, pattern=pattern), *frozen.attention[layer + 1 :])
    return replace(frozen, attention=silent)


def only_below(frozen, layer):
    """All heads above a layer silent."""
    above = [
        replace(a, pattern=torch.zeros_like(a.pattern)) if i > layer else a for i, a in enumerate(frozen.attention)
    ]
    return replace(frozen, attention=tuple(above))


@pytest.mark.parametrize("skip", [False, True])
def test_loadings_are_what_vanishes_when_the_head_is_skipped(skip):
    """Against rows of the graph made again with patterns silenced: one head, and all heads above a layer."""
    model = make(replace(CONFIG, layers=3, bias=True))
    coders = transcoders(model, skip=skip)
    graph = attribution_graph(model, coders, ONE, max_logits=1)
    frozen = frozen_model(model, ONE)
    coded = replacement(frozen, coders)
    active = active_features(frozen, coded)
    feature = int(((active.layer == 2) & (active.position == 4)).nonzero()[0, 0])
    token = int(graph.nodes.feature[graph.logits[0]])
    direction = torch.full((1, 23), -1 / 23, dtype=torch.float64)
    direction[0, token] += 1

    def row(variant, kind):
        targets = (
            logit_targets(variant, direction, 4)
            if kind == "logit"
            else feature_targets(variant, coded, active, torch.tensor([feature]))
        )
        return DirectEffects(variant, coded, active).rows(targets)[0][0]

    order = DirectEffects(frozen, coded, active).order
    for kind in ("feature", "logit"):
        name = [7, model.shape.layers, 4, token] if kind == "logit" else [1, 2, 4, int(active.feature[feature])]
        target = int((graph.nodes.key == torch.tensor(name)).all(1).nonzero()[0, 0])
        edges = (graph.target == target).nonzero()[:, 0].tolist()[:30]
        found = head_loadings(graph, model, coders, edges)
        place = {tuple(k): i for i, k in enumerate(_keys(frozen, active, order))}
        at = [place[tuple(graph.nodes.key[graph.source[e]].tolist())] for e in edges]
        full = row(frozen, kind)[at]
        for layer in range(3):
            for head in range(4):
                lost = full - row(skipping(frozen, layer, head), kind)[at]
                assert (found.loading[:, layer, head] - lost).abs().max() < 1e-10
                below = only_below(frozen, layer)
                end = row(below, kind)[at] - row(skipping(below, layer, head), kind)[at]
                assert (found.last[:, layer, head].sum(-1) - end).abs().max() < 1e-10
        assert (found.direct - row(only_below(frozen, -1), kind)[at]).abs().max() < 1e-10


def _keys(frozen, active, order):
    """Kind, layer, position and feature of the columns of a row."""
    tokens = frozen.tokens.ids[0].tolist()
    keys = [(0, -1, t, tokens[t]) for t in range(frozen.length)]
    for layer in range(frozen.layers):
        keys += [(2, layer, t, -1) for t in range(frozen.length)]
        of = active.of(layer)
        keys += [
            (1, layer, p, f) for p, f in zip(active.position[of].tolist(), active.feature[of].tolist(), strict=True)
        ]
    assert len(keys) == order.first[-1]
    return keys


def test_between_neighbouring_layers_both_splits_are_the_same():
    model = make(replace(CONFIG, layers=3))
    coders = transcoders(model)
    graph = attribution_graph(model, coders, ONE)
    layer = graph.nodes.layer
    step = ((layer[graph.source] == 0) & (layer[graph.target] == 1)).nonzero()[:, 0].tolist()[::5]
    found = head_loadings(graph, model, coders, step)
    assert (found.loading - found.last.sum(-1)).abs().max() < 1e-12
    assert not found.loading[:, [0, 2]].any()
    assert found.loading[:, 1].any()
    assert torch.allclose(found.direct + found.loading.sum((1, 2)), found.weight, atol=1e-12)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_hugging_face(name):
    model = hugging_face(name).model
    coders = transcoders(model)
    graph = attribution_graph(model, coders, torch.arange(6)[None] + 3)
    assert head_loadings(graph, model, coders, some(graph)).error < 1e-6


@pytest.mark.parametrize("skip", [False, True])
def test_cross_layer_transcoders_and_coders_of_the_stream(skip):
    """A cross-layer feature writes behind several MLPs; its edge is the sum of what it writes in front of the target."""
    model = native()
    for coders in (cross_layer(model, skip=skip), gathered(model, skip=skip, reads=MID, features=12)):
        graph = attribution_graph(model, coders, ids(model, 5))
        features = (graph.nodes.kind[graph.source] == 1).nonzero()[:, 0].tolist()
        assert head_loadings(graph, model, coders, features[:: max(1, len(features) // 40)]).error < 1e-10


def test_the_difference_of_two_logits_and_pruned_graphs():
    model = make(replace(CONFIG, layers=2))
    coders = transcoders(model)
    graph = attribution_graph(model, coders, ONE, targets=[3, 9])
    edges = (graph.target == int(graph.logits[0])).nonzero()[:, 0].tolist()[:20]
    assert head_loadings(graph, model, coders, edges).error < 1e-10
    kept = (graph.nodes.position > 0).nonzero()[:, 0]
    number = torch.full((len(graph.nodes),), -1)
    number[kept] = torch.arange(len(kept))
    inside = (number[graph.source] >= 0) & (number[graph.target] >= 0)
    part = replace(graph, nodes=graph.nodes.take(kept), source=number[graph.source[inside]], target=number[graph.target[inside]],
                   weight=graph.weight[inside], columns={})  # fmt: skip
    with pytest.raises(WorkbenchError, match="prompt="):
        head_loadings(part, model, coders, 0)
    assert head_loadings(part, model, coders, [0, 5], prompt=ONE).error < 1e-10


def test_frame_columns_plot_page_and_file(tmp_path):
    model = make(replace(CONFIG, layers=2))
    coders = transcoders(model)
    graph = attribution_graph(model, coders, ONE)
    found = wb.head_loadings(graph, model, coders, some(graph, 6))
    frame = found.frame()
    first = frame[frame["edge"] == int(found.edges[0])]
    assert abs(first["last"].sum() - float(found.weight[0])) < 1e-10
    told = found.onto(graph)
    assert {"carrier_layer", "carrier_head", "carrier_query", "carrier_key", "carrier_loading"} <= set(told.columns)
    assert int(told.columns["carrier_loading"].isfinite().sum()) == len(found.edges)
    best = int(found.edges[0])
    layer, head = int(told.columns["carrier_layer"][best]), int(told.columns["carrier_head"][best])
    if layer >= 0:
        assert float(told.columns["carrier_loading"][best]) == float(found.loading[0, layer, head])
    with pytest.raises(WorkbenchError, match="not the one"):
        found.onto(replace(graph, weight=graph.weight * 2))
    found.plot(edge=best).figure.canvas.draw()
    assert "<table" in found._repr_html_()
    assert torch.equal(wb.load_result(found.save(tmp_path / "split")).tensors["loading"], found.loading)


def test_an_edge_of_the_stream_alone_has_no_carrier():
    model = make(replace(CONFIG, layers=2))
    coders = transcoders(model)
    graph = attribution_graph(model, coders, ONE)
    nodes = graph.nodes
    own = (nodes.position[graph.source] == nodes.position[graph.target]) & (nodes.layer[graph.source] == 1)
    edges = own.nonzero()[:, 0].tolist()[:3]
    told = head_loadings(graph, model, coders, edges).onto(graph)
    assert told.columns["carrier_head"][edges].tolist() == [-1] * 3
    assert torch.allclose(told.columns["carrier_loading"][edges], graph.weight[edges], atol=1e-12)


def test_refusals():
    model = make(replace(CONFIG, layers=2))
    coders = transcoders(model)
    graph = attribution_graph(model, coders, ONE)
    with pytest.raises(UnknownName, match="edge"):
        head_loadings(graph, model, coders, len(graph.weight))
    with pytest.raises(UnknownName, match="edge between"):
        head_loadings(graph, model, coders, (len(graph.nodes) - 1, 0))
    with pytest.raises(WorkbenchError, match="at least one"):
        head_loadings(graph, model, coders, [])
    with pytest.raises(Refused, match="not those of the graph"):
        head_loadings(replace(graph, weight=graph.weight * 1.1), model, coders, int(graph.weight.abs().argmax()))
    with pytest.raises(Refused, match="not those of the graph"):
        head_loadings(graph, model, transcoders(model, seed=5), int((graph.nodes.kind[graph.source] == 1).nonzero()[0]))
    with pytest.raises(WorkbenchError, match="another prompt"):
        head_loadings(graph, model, coders, 0, prompt=ONE + 1)
    nodes = FeatureNodes.of(["bias", "logit"], [0, 2], [0, 4], [-1, 3])
    odd = FeatureGraph(nodes, torch.tensor([0]), torch.tensor([1]), torch.tensor([1.0]), tokens=graph.tokens)
    with pytest.raises(Refused, match="paths begin"):
        head_loadings(odd, model, coders, 0, prompt=ONE)
