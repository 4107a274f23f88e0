"""Edges of attribution graphs against interventions in the model."""

import pytest
import torch
from frozen_cases import MID, cross_layer, gaps, ids, model_of, native, transcoders

from workbench.coders.estimators import Transcoder
from workbench.errors import WorkbenchError
from workbench.probes.features.attribution_graph import attribution_graph
from workbench.probes.features.graph_effects import graph_effects
from workbench.probes.features.influence import pruned
from workbench.probes.features.subgraph import find_nodes, subgraph

MODELS = ["tiny-softmax", "tiny-gated", "siit-ioi", "compiled-greater-than", "compiled-reverse", "compiled-histogram",
          "hf:llama", "hf:gpt2", "hf:qwen2", "hf:qwen3", "hf:mistral", "hf:opt", "hf:bloom"]  # fmt: skip


def agree(found, exact=1e-9):
    """Every edge by itself, and the correlation over all and in each layer of targets."""
    assert found.correlation >= 1 - 1e-6
    assert found.worst <= exact
    layers = found.by_layer()
    told = layers[layers["edges"] > 2]
    assert len(told)
    assert (told["correlation"] > 0.9999).all()


@pytest.mark.parametrize("name", MODELS)
def test_every_kept_edge_agrees_with_an_intervention(name):
    model = model_of(name)
    coders = transcoders(model, k=6, features=80)
    length = min(10, model.shape.context or 10)
    graph = pruned(attribution_graph(model, coders, ids(model, length), max_logits=3), 0.9, 0.95)
    found = graph_effects(model, coders, graph)
    assert len(found.edge) == len(graph.source) > 3
    agree(found)
    assert -1 <= found.free_correlation <= 1


@pytest.mark.parametrize("mixer", ["linear-attention", "retention", "gated-linear-attention", "sigmoid-attention"])
def test_attention_that_is_no_softmax_is_frozen_as_its_map(mixer):
    model = native(mixer=mixer)
    coders = transcoders(model)
    whole = attribution_graph(model, coders, ids(model))
    assert float(gaps(whole).abs().max()) < 1e-10
    agree(graph_effects(model, coders, pruned(whole, 0.8, 0.9)))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
def test_skip_terms_scales_and_coders_of_the_stream(skip, scale):
    model = native()
    for reads in (MID, None):
        coders = transcoders(model, skip=skip, **({"reads": reads} if reads else {}))
        graph = pruned(attribution_graph(model, coders, ids(model, 6), targets=(3, 5)), 0.8, 0.9)
        agree(graph_effects(model, coders, graph, scale=scale))


def test_cross_layer_features_are_changed_in_every_layer_they_write():
    model = native()
    coders = cross_layer(model, skip=True)
    graph = pruned(attribution_graph(model, coders, ids(model, 6)), 0.8, 0.9)
    agree(graph_effects(model, coders, graph))


def test_trained_transcoders_in_float32():
    model = model_of("tiny-softmax", torch.float32)
    texts = torch.randint(3, model.shape.vocab, (16, 24), generator=torch.Generator().manual_seed(1))
    coders = {}
    reads = [f"blocks.{layer}.{part}" for layer in range(4) for part in ("hook_mlp_in", "hook_mlp_out")]
    acts = model.run(texts, read=reads, logits=None).acts
    for layer in range(4):
        x, y = acts[reads[2 * layer]].detach(), acts[reads[2 * layer + 1]].detach()
        with torch.no_grad():
            x = model.net.blocks[layer].ln2(x)
        fitted = Transcoder(kind="topk", features=128, k=8, steps=30, batch=128, seed=0).fit(
            x.flatten(0, 1), y.flatten(0, 1)
        )
        coders[layer] = fitted.coder_
    prompt = "When Mary and John went to the store, John gave a drink to"
    graph = pruned(attribution_graph(model, coders, prompt), 0.95, 0.95)
    found = graph_effects(model, coders, graph, edges=200)
    assert (graph.nodes.kind[graph.source[found.edge]] == 1).sum() > 10
    assert len(found.edge) == 200
    agree(found, 1e-4)
    assert found.free_correlation > 0.3


def test_frozen_runs_leave_the_model_as_it_was():
    model = native()
    prompt = ids(model)
    before = model.run(prompt[None]).logits
    coders = transcoders(model)
    graph_effects(model, coders, attribution_graph(model, coders, prompt), edges=5)
    assert torch.equal(model.run(prompt[None]).logits, before)


def test_a_wrong_weight_shows():
    model = native()
    coders = transcoders(model)
    graph = pruned(attribution_graph(model, coders, ids(model)), 0.7, 0.9)
    strongest = int(graph.weight.abs().argmax())
    graph.weight[strongest] *= -1
    found = graph_effects(model, coders, graph)
    assert found.worst > 1
    assert found.correlation < 0.99


def test_table_and_picture(tmp_path):
    model = native()
    coders = transcoders(model)
    graph = attribution_graph(model, coders, ids(model))
    found = graph_effects(model, coders, graph, edges=[0, 5, 9])
    assert list(found.frame().columns) == ["source", "target", "layer", "predicted", "measured", "free"]
    assert found.plot().get_title().startswith("3 edges")
    found.save(tmp_path / "effects")


def test_refusals():
    model = native()
    coders = transcoders(model)
    graph = attribution_graph(model, coders, ids(model))
    with pytest.raises(WorkbenchError, match="multiplied by 1"):
        graph_effects(model, coders, graph, scale=1)
    for edges in ([], [len(graph.source)], 0):
        with pytest.raises(WorkbenchError, match="edges"):
            graph_effects(model, coders, graph, edges=edges)
    at = int((graph.source == find_nodes(graph, "feature")[0]).nonzero()[0])
    with pytest.raises(WorkbenchError, match="not active"):
        graph_effects(model, transcoders(model, seed=5), graph, edges=[at])
    other = native()
    other.name = "another"
    with pytest.raises(WorkbenchError, match="another"):
        graph_effects(other, coders, graph)
    part = subgraph(graph, find_nodes(graph, "feature"))
    assert len(graph_effects(model, coders, part, edges=3).edge) == 3
