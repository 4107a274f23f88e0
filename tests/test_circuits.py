import json

import pytest
import torch

from workbench.circuits import Circuit, circuit_graph, edge_name, edge_parts
from workbench.errors import Refused, UnknownName, WorkbenchError

NAMES = ("a0.h0", "a0.h1", "m0", "a1.h0")


def nodes(scores, kept=None):
    kept = [True] * len(scores) if kept is None else kept
    return Circuit("node", NAMES[: len(scores)], torch.tensor(scores), torch.tensor(kept), {"method": "by hand"})


def brute_edges(layers, heads, kv_heads, mlp):
    """Edges by walking over the layers, writer lists kept by hand."""
    found, written = [], ["input"]
    for layer in range(layers):
        letter = "h" if kv_heads == heads else "g"
        for channel, count, kind in (("q", heads, "h"), ("k", kv_heads, letter), ("v", kv_heads, letter)):
            for i in range(count):
                found += [(source, f"a{layer}.{kind}{i}", channel) for source in written]
        written += [f"a{layer}.h{i}" for i in range(heads)]
        if mlp:
            found += [(source, f"m{layer}", "in") for source in written]
            written.append(f"m{layer}")
    return found + [(source, "logits", "in") for source in written]


@pytest.mark.parametrize("sizes", [(1, 1, 1, True), (2, 4, 4, False), (3, 4, 2, True), (2, 6, 1, False)])
def test_graph_lists_every_edge_once(sizes):
    graph = circuit_graph(*sizes)
    expected = brute_edges(*sizes)
    assert [edge_parts(name) for name in graph.edges] == expected
    assert graph.n_edges == len(expected) == len(set(expected))
    triples = zip(graph.source.tolist(), graph.target.tolist(), graph.channel.tolist(), strict=True)
    assert [(graph.nodes[s], graph.readers[t], ("q", "k", "v", "in")[c]) for s, t, c in triples] == expected


def test_graph_of_gpt2_small_has_the_published_size():
    graph = circuit_graph()
    assert graph.n_edges == 32_491
    channel = graph.channel.bincount().tolist()
    assert sum(channel[:3]) == 31_320
    assert channel[3] == 1_014 + 157


def test_graph_with_grouped_heads_reads_keys_per_group():
    graph = circuit_graph(2, 4, 2, mlp=False)
    assert "input->a1.g1<k>" in graph.edges
    assert "input->a1.h1<k>" not in graph.edges
    assert graph.n_edges == (4 + 2 + 2) * 1 + (4 + 2 + 2) * 5 + 9


def test_graph_matrix_puts_values_at_their_edges():
    graph = circuit_graph(2, 2, 1)
    values = torch.arange(1, graph.n_edges + 1)
    matrix = graph.matrix(values)
    assert (matrix != 0).sum() == graph.n_edges
    row, column = graph.writers.index("a0.h1"), [s.reader for s in graph.slots].index("m1")
    assert matrix[row, column] == 1 + graph.edges.index("a0.h1->m1")


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0), (2, 4, 3)])
def test_graph_refuses_impossible_sizes(sizes):
    with pytest.raises(WorkbenchError):
        circuit_graph(*sizes)


def test_edge_names_round_trip_and_bad_ones_raise():
    for parts in (("a0.h1", "a1.h0", "k"), ("input", "logits", "in"), ("m3", "m4", "in")):
        assert edge_parts(edge_name(*parts)) == parts
    with pytest.raises(UnknownName, match="q, k, v, in"):
        edge_name("input", "m0", "x")
    for bad in ("a0.h1", "a->b<z>", "->b", "a -> b"):
        with pytest.raises(WorkbenchError, match="source->target"):
            edge_parts(bad)


def test_top_keeps_the_largest_absolute_or_signed_scores():
    circuit = nodes([1.0, -3.0, 2.0, 0.5])
    assert circuit.top(2).nodes == ("a0.h1", "m0")
    assert circuit.top(2, signed=True).nodes == ("a0.h0", "m0")
    assert len(circuit.top(0)) == 0
    assert circuit.top(1).kept.tolist() == [False, True, False, False]
    assert circuit.kept.all(), "the circuit it was made from is unchanged"
    with pytest.raises(WorkbenchError, match="0 <= n <= 4"):
        circuit.top(5)


def test_top_breaks_ties_by_order_of_names():
    assert nodes([1.0, 1.0, 1.0, 1.0]).top(2).nodes == ("a0.h0", "a0.h1")


def test_threshold_is_inclusive():
    circuit = nodes([1.0, -3.0, 2.0, 0.5])
    assert circuit.threshold(2).nodes == ("a0.h1", "m0")
    assert circuit.threshold(2, signed=True).nodes == ("m0",)


def test_set_operations_combine_what_is_kept():
    a, b = nodes([1.0, 2.0, 3.0], [True, True, False]), nodes([9.0, 9.0, 9.0], [True, False, True])
    assert (a & b).nodes == ("a0.h0",)
    assert (a | b).nodes == ("a0.h0", "a0.h1", "m0")
    assert (a - b).nodes == ("a0.h1",)
    assert (a & b).scores.tolist() == [1.0, 2.0, 3.0]


def test_set_operations_join_different_names():
    a = nodes([1.0, 2.0])
    b = Circuit("node", ("m0", "a0.h1"), torch.tensor([5.0, 6.0]), torch.tensor([True, True]))
    joined = a | b
    assert joined.names == ("a0.h0", "a0.h1", "m0")
    assert joined.scores.tolist() == [1.0, 2.0, 5.0]
    assert (a & b).nodes == ("a0.h1",)
    graph = circuit_graph(1, 1, mlp=False)
    edges = Circuit.of("edge", graph.edges, graph.edges[:1])
    with pytest.raises(WorkbenchError, match="nodes with one of edges"):
        a & edges


def test_edges_and_their_ends():
    graph = circuit_graph(2, 2)
    circuit = Circuit.of("edge", graph.edges, ["m1->logits", "a0.h1->m1", "input->a0.h1<v>"])
    assert circuit.edges == (("input", "a0.h1", "v"), ("a0.h1", "m1", "in"), ("m1", "logits", "in"))
    assert circuit.nodes == ("input", "a0.h1", "m1", "logits")
    with pytest.raises(Refused, match="level='edge'"):
        _ = nodes([1.0]).edges
    with pytest.raises(UnknownName):
        Circuit.of("edge", graph.edges, ["m1->m0"])


def test_frames_have_the_promised_columns():
    graph = circuit_graph(1, 1)
    circuit = Circuit("edge", graph.edges, torch.arange(graph.n_edges), torch.ones(graph.n_edges, dtype=torch.bool))
    assert list(circuit.frame().columns) == ["source", "target", "channel", "score", "kept"]
    assert circuit.frame().iloc[-1].tolist() == ["m0", "logits", "in", graph.n_edges - 1, True]
    table = Circuit(
        "node", NAMES[:2], [1, 2], torch.tensor([True, False]), {}, {"z": torch.tensor([0.5, torch.nan])}
    ).frame()
    assert list(table.columns) == ["node", "score", "kept", "z"]
    assert table.z.isna().tolist() == [False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"level": "heads"}, "node, edge"),
        ({"names": ("a0.h0", "a0.h0")}, "unique"),
        ({"scores": torch.tensor([1.0])}, r"\[N\] with N=2"),
        ({"scores": torch.tensor([1.0, torch.nan])}, "finite"),
        ({"kept": torch.tensor([1, 0])}, "bool"),
        ({"columns": {"z": torch.zeros(3)}}, "z is"),
    ],
)
def test_malformed_circuits_are_refused(change, message):
    given = {
        "level": "node",
        "names": NAMES[:2],
        "scores": torch.tensor([1.0, 2.0]),
        "kept": torch.tensor([True, False]),
    }
    Circuit(**given)
    with pytest.raises(WorkbenchError, match=message):
        Circuit(**{**given, **change})


def test_save_and_load_give_the_same_circuit(tmp_path):
    graph = circuit_graph(2, 4, 2)
    scores = torch.randn(graph.n_edges, dtype=torch.float64)
    flags = torch.arange(graph.n_edges) % 3 == 0
    circuit = Circuit("edge", graph.edges, scores, flags, {"method": "x", "options": {"steps": 5}}, {"needed": ~flags})
    loaded = Circuit.load(circuit.save(tmp_path / "c"))
    assert (loaded.level, loaded.names, loaded.provenance) == (circuit.level, circuit.names, circuit.provenance)
    assert torch.equal(loaded.scores, circuit.scores)
    assert torch.equal(loaded.kept, circuit.kept)
    assert torch.equal(loaded.columns["needed"], ~flags)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    with pytest.raises(WorkbenchError, match="exists already"):
        circuit.save(tmp_path / "c")


def test_half_written_and_damaged_circuits_are_refused(tmp_path):
    with pytest.raises(WorkbenchError, match="no circuit folder"):
        Circuit.load(tmp_path / "none")
    for name in ("circuit.json", "circuit.parquet"):
        folder = nodes([1.0, 2.0]).save(tmp_path / f"without-{name}")
        (folder / name).unlink()
        with pytest.raises(WorkbenchError, match=f"{name} is missing"):
            Circuit.load(folder)
    folder = nodes([1.0, 2.0]).save(tmp_path / "cut")
    (folder / "circuit.parquet").write_bytes((folder / "circuit.parquet").read_bytes()[:50])
    with pytest.raises(WorkbenchError, match="damaged"):
        Circuit.load(folder)
    folder = nodes([1.0, 2.0]).save(tmp_path / "short")
    record = json.loads((folder / "circuit.json").read_text())
    (folder / "circuit.json").write_text(json.dumps({**record, "rows": 3}))
    with pytest.raises(WorkbenchError, match="2 rows, 3 announced"):
        Circuit.load(folder)


def test_saving_into_a_file_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkbenchError, match="cannot write"):
        nodes([1.0]).save(tmp_path / "file" / "c")


def test_nothing_is_left_behind_when_saving_fails(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pandas.DataFrame.to_parquet", full)
    with pytest.raises(WorkbenchError, match=r"cannot write .*c: No space left on device"):
        nodes([1.0]).save(tmp_path / "c")
    assert not list(tmp_path.iterdir())


def test_columns_do_not_hide_those_of_the_frame():
    with pytest.raises(WorkbenchError, match="cannot be called 'kept'"):
        Circuit("node", ("a0.h0",), torch.ones(1), torch.ones(1, dtype=torch.bool), {}, {"kept": torch.zeros(1)})


def test_plots_draw_without_a_display():
    graph = circuit_graph(2, 3)
    scores = torch.linspace(-1, 1, graph.n_edges)
    circuit = Circuit("edge", graph.edges, scores, torch.ones(graph.n_edges, dtype=torch.bool))
    ax = circuit.top(7).plot()
    assert len(ax.lines) == 7
    assert {"input", "logits"} <= {text.get_text() for text in ax.texts} | {"input", "logits"}
    assert "7 of" in ax.get_title()
    grid = nodes([1.0, -2.0, 0.5, 0.0]).top(2).plot().images[0].get_array()
    assert grid.shape == (2, 3)
    assert grid[0, 2] == -2.0
    assert grid[0, 0] == 0.5
    assert Circuit.of("edge", graph.edges, []).plot() is not None


def test_key_value_heads_have_a_place_of_their_own():
    graph = circuit_graph(2, 4, 2)
    ax = Circuit.of("edge", graph.edges, ["a0.h1->a1.g0<k>", "a0.h1->a1.h0<q>", "m0->a1.g1<v>"]).plot()
    spots = {text.get_text(): text.get_position() for text in ax.texts}
    assert set(spots) == {"a0.h1", "m0", "a1.h0", "a1.g0", "a1.g1"}
    assert len(set(spots.values())) == 5
    assert spots["m0"][1] < spots["a1.g0"][1] < spots["a1.h0"][1]


def test_html_escapes_names():
    html = Circuit("node", ("<script>",), [1.0], torch.tensor([True]))._repr_html_()
    assert "<script>" not in html
    assert "1 of 1 nodes kept" in html
