"""Edges: every number of a hand-written model, finite differences, what flows into a node; thresholds, graphs, refusals."""

import pytest
import torch
from feature_nets import axes, coder, hugging, native, pairs_of, written

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.feature_graph import FeatureGraph
from workbench.pairs import logit_difference
from workbench.probes.features.feature_circuit import feature_circuit
from workbench.probes.features.splice import ERROR, splice
from workbench.sites import Site

IN, MLP0, MID, MLP1, OUT = (f"blocks.{s}" for s in ("0.hook_resid_pre", "0.hook_mlp_out", "0.hook_resid_post",
                                                    "1.hook_mlp_out", "1.hook_resid_post"))  # fmt: skip
# dm/dd * dd/du * (clean - corrupted) of every pair of neighbours in the model of ``written``; all others are 0.
WRITTEN = {
    (f"{IN}/0", f"{MLP0}/0"): 3 * 1 * -2,
    (f"{IN}/0", f"{MLP0}/1"): 7 * 1 * -2,
    (f"{IN}/1", f"{MLP0}/1"): 7 * 2 * 1,
    (f"{IN}/0", f"{MID}/0"): 3 * 1 * -2,  # the stream alone, without the path through the MLP
    (f"{IN}/1", f"{MID}/1"): 7 * 1 * 1,
    (f"{MLP0}/0", f"{MID}/0"): 3 * 1 * -2,
    (f"{MID}/0", f"{MLP1}/1"): 1 * 1 * -4,
    (f"{MID}/1", f"{MLP1}/0"): 2 * 3 * 1,
    (f"{MID}/0", f"{OUT}/0"): 2 * 1 * -4,
    (f"{MID}/1", f"{OUT}/1"): 1 * 1 * 1,
    (f"{MLP1}/0", f"{OUT}/0"): 2 * 1 * 3,
    (f"{MLP1}/1", f"{OUT}/1"): 1 * 1 * -4,
    (f"{OUT}/0", "metric"): -2,
    (f"{OUT}/1", "metric"): -3,
}


def edges(circuit):
    """{(source, target): weight}."""
    names, ends = circuit.names, zip(circuit.source.tolist(), circuit.target.tolist(), strict=True)
    return {(names[u], names[d]): w for (u, d), w in zip(ends, circuit.weight.tolist(), strict=True)}


def dictionaries(model, kinds=("resid_pre", "z", "mlp_out", "resid_post")):
    sites = [Site(k, l) for l in range(model.shape.layers) for k in kinds if k != "resid_pre" or l == 0]
    return {site: coder(model.shape.width, seed=i) for i, site in enumerate(sites)}


@pytest.mark.parametrize("method", ["attribution", "ig"])
def test_every_edge_of_the_written_model(method):
    model, pairs, coders = written()
    found = edges(feature_circuit(model, coders, pairs, method=method, node_threshold=0, edge_threshold=1e-9))
    assert found.keys() == WRITTEN.keys()
    for name, weight in WRITTEN.items():
        assert found[name] == pytest.approx(weight, abs=1e-10), name


def test_what_flows_into_a_node_is_its_effect():
    """On a linear model whose dictionary leaves no error and never switches, the edges into a node add up to the node's effect,
    those into the metric to m(clean) - m(corrupted)."""
    model, pairs = native(linear=True), pairs_of()
    rows = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).double())[0]
    eye = axes(rows, both=False)
    eye.b_dec.copy_(-100 * rows.sum(0))
    sites = ["blocks.0.hook_resid_pre"]
    sites += [f"blocks.{layer}.{kind}" for layer in range(2) for kind in ("hook_attn_out", "hook_resid_post")]
    found = feature_circuit(
        model, dict.fromkeys(sites, eye), pairs, method="attribution", node_threshold=0, edge_threshold=0
    )
    into = torch.zeros(len(found) + 1, dtype=torch.float64).index_add_(0, found.target, found.weight)
    later = (found.nodes.site > 0) & (found.nodes.feature != ERROR)
    assert later.sum() == 4 * 8
    assert found.nodes.effect[later].abs().max() > 0.1
    torch.testing.assert_close(into[:-1][later], found.nodes.effect[later], rtol=0, atol=1e-10)
    assert float(into[-1]) == pytest.approx(found.effects.full - float(found.effects.without[-1]), abs=1e-10)


@pytest.mark.parametrize(
    ("make", "h", "within"),
    [(native, 1e-6, 1e-6), (hugging, 2e-3, 2e-3)],  # norms of transformers work in float32
    ids=["native", "llama"],
)
@pytest.mark.parametrize("positions", ["all", "each"])
def test_edges_are_finite_differences(make, h, within, positions):
    """Every edge of one circuit: with all other sites held, move one upstream node a little along clean - replaced, and see what
    its downstream node, weighted with the slope that scored it, does."""
    model = make()
    pairs = pairs_of(n=2, length=4, vocab=11, low=3)
    coders = dictionaries(model, ("resid_pre", "z", "mlp_out", "resid_post"))
    found = feature_circuit(
        model, coders, pairs, method="attribution", node_threshold=0, edge_threshold=0, positions=positions
    )
    nodes, weights = found.nodes, torch.zeros(len(found), len(found) + 1, dtype=torch.float64)
    weights[found.source, found.target] = found.weight
    spliced = splice(model, coders)
    run = spliced.run(pairs.clean)
    slopes = torch.autograd.grad(
        logit_difference(run.logits, pairs).sum(), [run.sites[s].output for s in spliced.sites], retain_graph=True
    )
    slopes = dict(zip(spliced.sites, slopes, strict=True))
    held = {s: (p.features.detach(), p.error.detach()) for s, p in run.sites.items()}
    with torch.no_grad():
        after = {s: spliced.coded(s, x) for s, x in spliced.values(pairs.corrupt).items()}
    generator = torch.Generator().manual_seed(0)
    for u in torch.randperm(len(found), generator=generator)[:12].tolist():
        up, place, feature = spliced.sites[int(nodes.site[u])], int(nodes.place[u]), int(nodes.feature[u])
        here = torch.zeros(4, dtype=torch.float64)
        here[slice(None) if positions == "all" else place] = 1

        def moved(sign, up=up, feature=feature, here=here):
            def change(site, f, eps):
                f, eps = (x.clone() for x in held[site])
                if site == up and feature == ERROR:
                    eps += sign * h * (held[up][1] - after[up][1]) * here[:, None]
                elif site == up:
                    f[..., feature] += sign * h * (held[up][0] - after[up][0])[..., feature] * here
                return f, eps

            with torch.no_grad():
                return spliced.run(pairs.clean, change)

        plus, minus = moved(1), moved(-1)
        for d in range(len(found)):
            down, there, index = spliced.sites[int(nodes.site[d])], int(nodes.place[d]), int(nodes.feature[d])
            if spliced.sites.index(down) <= spliced.sites.index(up):
                assert weights[u, d] == 0
                continue
            codes = [(r.sites[down].left * slopes[down]).sum(-1) if index == ERROR
                     else r.sites[down].encoded[..., index] * (slopes[down] @ coders[down].W_dec[index])
                     for r in (plus, minus)]  # fmt: skip
            slope = (codes[0] - codes[1]) / (2 * h)
            slope = slope.sum() if positions == "all" else slope[:, there].sum()
            assert float(weights[u, d]) == pytest.approx(float(slope) / 2, abs=within), (found.names[u], found.names[d])
        logits = [logit_difference(r.logits, pairs).sum() for r in (plus, minus)]
        into = float(nodes.effect[u]) if up == spliced.sites[-1] else float(logits[0] - logits[1]) / (2 * h) / 2
        assert float(weights[u, -1]) == pytest.approx(into, abs=within)


def test_batches_add_up():
    model, pairs = native(), pairs_of(n=5)
    coders = dictionaries(model)
    whole = edges(feature_circuit(model, coders, pairs, edge_threshold=1e-6))
    assert edges(feature_circuit(model, coders, pairs, edge_threshold=1e-6, batch=2)) == pytest.approx(whole, abs=1e-9)


def test_parallel_blocks_have_no_edge_from_attention_to_mlp():
    model, pairs = hugging("GPTNeoXForCausalLM", "GPTNeoXConfig"), pairs_of(vocab=61, low=3)
    found = feature_circuit(
        model,
        dictionaries(model, ("resid_pre", "z", "mlp_out", "resid_post")),
        pairs,
        node_threshold=0,
        edge_threshold=1e-12,
    )
    ends = {(u.split("/")[0], d.split("/")[0]) for u, d in edges(found)}
    assert ("blocks.0.attn.hook_z", "blocks.0.hook_mlp_out") not in ends
    assert ("blocks.0.hook_resid_post", "blocks.1.hook_mlp_out") in ends
    assert ("blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out") not in ends  # the stream between them is a site


def test_thresholds_narrow_a_circuit():
    model, pairs = native(), pairs_of()
    coders = dictionaries(model)
    wide = feature_circuit(model, coders, pairs, node_threshold=0.02, edge_threshold=0.001)
    narrow = wide.threshold(0.1, 0.01)
    again = feature_circuit(model, coders, pairs)
    assert narrow.names == again.names
    assert edges(narrow) == pytest.approx(edges(again), abs=1e-12)
    assert 0 < len(narrow) < len(wide) < len(wide.effects)
    assert (narrow.nodes.effect.abs() >= 0.1).all()
    last = {name: effect for name, effect in zip(wide.names, wide.nodes.effect.tolist(), strict=False) if OUT in name}
    into = {source: weight for (source, target), weight in edges(wide).items() if target == "metric" and OUT in source}
    assert into == last  # integrated gradients of the last site, nothing in between
    assert (narrow.weight.abs() >= 0.01).all()
    with pytest.raises(Refused, match="find it again"):
        narrow.threshold(0.05)


def test_circuit_as_a_graph(tmp_path):
    model, pairs, coders = written()
    circuit = feature_circuit(model, coders, pairs, node_threshold=1, edge_threshold=1)
    graph = circuit.graph()
    assert len(graph.nodes) == len(circuit) + 1 == 9 + 1
    frame = graph.frame()
    assert frame.kind.tolist() == ["residual feature"] * 2 + ["feature"] + ["residual feature"] * 2 + ["feature"] * 2 + [
        "residual feature"] * 2 + ["logit"]  # fmt: skip
    assert frame.layer.tolist() == [-1, -1, 0, 0, 0, 1, 1, 1, 1, 2]
    assert frame.effect.tolist()[:-1] == circuit.nodes.effect.tolist()
    back = FeatureGraph.load(graph.save(tmp_path / "graph"))
    assert torch.equal(back.weight, circuit.weight)
    assert back.meta["ablation"] == "counterfactual"
    assert circuit.plot().get_title().startswith("10 nodes")
    assert circuit.edge_frame().iloc[0].to_dict() == {"source": f"{MID}/0", "target": f"{OUT}/0", "weight": -8.0}
    assert len(circuit.frame()) == 9
    circuit.save(tmp_path / "circuit")


def test_two_sites_of_one_place_make_no_graph():
    model, pairs = native(), pairs_of()
    sites = ("blocks.0.attn.hook_z", "blocks.0.hook_attn_out")
    circuit = feature_circuit(model, {site: coder(8) for site in sites}, pairs, node_threshold=0)
    with pytest.raises(Refused, match="cannot tell blocks.0.attn.hook_z from blocks.0.hook_attn_out"):
        circuit.graph()


def test_refusals():
    model, pairs = native(), pairs_of()
    coders = {"blocks.0.hook_mlp_out": coder(8)}
    with pytest.raises(UnknownName, match="method of feature circuits 'exact'"):
        feature_circuit(model, coders, pairs, method="exact")
    for name in ("node_threshold", "edge_threshold"):
        for value in (-1.0, float("nan")):
            with pytest.raises(WorkbenchError, match=name):
                feature_circuit(model, coders, pairs, **{name: value})


def test_a_circuit_may_be_empty():
    model, pairs = native(), pairs_of()
    circuit = feature_circuit(model, {"blocks.0.hook_mlp_out": coder(8)}, pairs, node_threshold=1e9)
    assert len(circuit) == 0
    assert len(circuit.weight) == 0
    assert circuit.names == ("metric",)
    assert len(circuit.graph().nodes) == 1
