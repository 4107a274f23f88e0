import pytest

from workbench.circuits import Circuit
from workbench.datasets.published.circuits import published_circuit, published_circuits
from workbench.datasets.tokenizer import vocabulary
from workbench.errors import UnknownName

SIZES = {
    "ioi": (26, 144),
    "ioi-11.3": (26, 144),
    "greater-than": (17, 156),
    "docstring": (6, 32),
    "docstring-1.2": (6, 32),
    "merullo-ioi": (11, 384),
    "merullo-colored-objects": (10, 384),
}


def test_every_published_circuit_has_its_size():
    found = {name: (len(c), len(c.names)) for name in published_circuits() if (c := published_circuit(name))}
    assert found == SIZES


@pytest.mark.parametrize("name", list(SIZES))
def test_roles_are_columns_that_cover_the_circuit_once(name):
    circuit = published_circuit(name)
    assert sum(flags.long() for flags in circuit.columns.values()).tolist() == circuit.kept.long().tolist()
    for role, nodes in circuit.provenance["roles"].items():
        assert [n for n, inside in zip(circuit.names, circuit.columns[role].tolist(), strict=True) if inside] == sorted(
            nodes, key=circuit.names.index
        )
    assert "arXiv" in circuit.provenance["source"]


def test_two_readings_differ_in_one_head():
    wang, other = published_circuit("ioi"), published_circuit("ioi-11.3")
    assert ((wang - other).nodes, (other - wang).nodes) == (("a9.h0",), ("a11.h3",))
    ours, acdc = published_circuit("docstring"), published_circuit("docstring-1.2")
    assert ((ours - acdc).nodes, (acdc - ours).nodes) == (("a1.h0",), ("a1.h2",))


def test_heads_of_greater_than_are_nine_without_mlps():
    nodes = published_circuit("greater-than").nodes
    assert sum(node.startswith("a") for node in nodes) == 9
    assert [node for node in nodes if node.startswith("m")] == ["m0", "m1", "m2", "m3", "m8", "m9", "m10", "m11"]


def test_movers_of_the_two_tasks_on_gpt2_medium_are_shared_and_inhibition_is_not():
    ioi, colored = published_circuit("merullo-ioi"), published_circuit("merullo-colored-objects")
    assert set((ioi & colored).nodes) == {"a6.h4", "a9.h3", "a15.h14", "a16.h15", "a17.h4", "a18.h5", "a19.h15"}
    assert (colored - ioi).nodes == ("a11.h6", "a11.h7", "a12.h15")


def test_it_survives_saving_and_adds_no_words_to_the_tokenizer(tmp_path):
    circuit = published_circuit("ioi")
    back = Circuit.load(circuit.save(tmp_path / "ioi"))
    assert back.nodes == circuit.nodes
    assert back.provenance["roles"] == circuit.provenance["roles"]
    assert "Merullo" not in vocabulary()


def test_unknown_names_list_what_exists():
    with pytest.raises(UnknownName, match="greater-than"):
        published_circuit("addition")
