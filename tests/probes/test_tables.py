"""Tables of numbers: what a row holds, what ranks first, what is undefined, what is refused."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from workbench.errors import UnknownName, WorkbenchError
from workbench.probes.tables import Head, HeadTable, LayerTable, TokenTable
from workbench.results import load_result
from workbench.run import Provenance

NAN = float("nan")


def heads(**options):
    values = {
        "score": {0: torch.tensor([0.1, 0.9]), "encoder.1": torch.tensor([NAN, 0.4, 0.9])},
        "other": {0: torch.tensor([3.0, -1.0]), "encoder.1": torch.tensor([0.0, 5.0, 2.0])},
    }
    null = {"score": {0: torch.tensor([0.5, 0.5]), "encoder.1": torch.tensor([0.25, 0.25, 0.25])}}
    given = dict(title="heads", values=values, units={"score": "share", "other": "nats"}, null=null)
    return HeadTable(**{**given, **options})


def layers(**options):
    given = dict(
        title="layers",
        layers=(0, 1, 2),
        values={"width": torch.tensor([1.0, NAN, 3.0])},
        units={"width": "tokens"},
        low={"width": torch.tensor([0.5, NAN, 2.5])},
        high={"width": torch.tensor([1.5, NAN, 3.5])},
        null={"width": torch.tensor([2.0, 2.0, 2.0])},
    )
    return LayerTable(**{**given, **options})


def tokens(**options):
    values = {"mass": torch.arange(12.0).view(2, 2, 3)}
    given = dict(
        title="tokens",
        values=values,
        units={"mass": "share"},
        layers=(0, 1),
        tokens=(("a", "b", "c"), ("d", "e")),
        null={"mass": torch.full((2, 2, 3), 0.5)},
    )
    return TokenTable(**{**given, **options})


def test_a_head_table_has_a_row_per_head_with_its_extras_beside():
    table = heads().frame()
    assert list(table.columns) == ["layer", "head", "score", "score_null", "other"]
    assert table["layer"].tolist() == [0, 0, "encoder.1", "encoder.1", "encoder.1"]
    assert table["head"].tolist() == [0, 1, 0, 1, 2]
    assert table["score"].tolist()[:2] == pytest.approx([0.1, 0.9])
    assert math.isnan(table["score"][2])
    assert table["other"].tolist() == [3.0, -1.0, 0.0, 5.0, 2.0]
    assert heads().layers == (0, "encoder.1")


def test_the_top_heads_are_the_largest_with_a_number():
    found = heads()
    best = found.top()
    assert [(head.layer, head.head) for head in best] == [(0, 1), ("encoder.1", 2), ("encoder.1", 1), (0, 0)]
    assert [head.null for head in best] == [0.5, 0.25, 0.25, 0.5]
    assert isinstance(best[0], Head)
    assert found.top("other", 1)[0].value == 5
    assert math.isnan(found.top("other", 1)[0].null)
    assert found.top(n=2) == best[:2]
    with pytest.raises(UnknownName, match="measure"):
        found.top("nothing")


def test_an_undefined_head_is_blank_in_the_picture():
    ax = heads().plot()
    image = np.ma.filled(ax.images[0].get_array(), NAN)
    np.testing.assert_allclose(image, [[0.1, 0.9, NAN], [NAN, 0.4, 0.9]], rtol=1e-6)
    assert "score" in ax.get_title()
    assert heads().plot(measure="other").images[0].get_clim()[0] == -1
    nothing = heads(values={"score": {0: torch.tensor([NAN, NAN])}}, null={})
    assert nothing.plot().has_data()


def test_a_layer_table_has_a_row_per_layer():
    table = layers().frame()
    assert list(table.columns) == ["layer", "width", "width_low", "width_high", "width_null"]
    assert len(table) == 3
    assert math.isnan(table["width"][1])
    ax = layers().plot()
    assert ax.get_ylabel() == "tokens"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["width", "by chance"]


def test_a_token_table_has_a_row_per_layer_sequence_and_position():
    table = tokens().frame()
    assert list(table.columns) == ["layer", "sequence", "position", "token", "mass", "mass_null"]
    assert len(table) == 12
    row = table[(table["layer"] == 1) & (table["sequence"] == 1) & (table["position"] == 2)]
    assert row["mass"].tolist() == [11.0]
    assert row["token"].tolist() == [""]
    row = table[(table["layer"] == 0) & (table["sequence"] == 1) & (table["position"] == 0)]
    assert (row["token"].tolist(), row["mass"].tolist()) == (["d"], [3.0])


def test_a_token_table_without_layers():
    found = tokens(values={"mass": torch.arange(6.0).view(2, 3)}, layers=(), null={})
    table = found.frame()
    assert list(table.columns) == ["sequence", "position", "token", "mass"]
    assert table["mass"].tolist() == list(range(6))
    assert len(found.plot().lines) == 1
    assert len(tokens().plot().lines) == 2
    assert tokens(tokens=()).frame()["token"].tolist() == [""] * 12


@pytest.mark.parametrize("make", [heads, layers, tokens])
def test_a_table_is_saved_and_read_back(make, tmp_path):
    found = make(provenance=Provenance("a model"), undefined={"score": "no token"} if make is heads else {})
    saved = load_result(found.save(tmp_path / "table"))
    assert saved.type == type(found).__name__
    frame = found.frame()
    frame["layer"] = frame["layer"].astype(str)
    got = saved.frame()
    got["layer"] = got["layer"].astype(str)
    pd.testing.assert_frame_equal(got, frame)
    assert "<table" in found._repr_html_()


@pytest.mark.parametrize("make", [heads, layers, tokens])
def test_a_table_that_makes_no_sense_is_refused(make):
    with pytest.raises(WorkbenchError, match="holds no measure"):
        make(values={}, null={}, **({} if make is not layers else {"low": {}, "high": {}}))
    with pytest.raises(WorkbenchError, match="has no unit"):
        make(units={})
    with pytest.raises(UnknownName, match="measure"):
        make(null={"nothing": torch.zeros(1)})


def test_a_measure_of_other_sizes_is_refused():
    with pytest.raises(WorkbenchError, match=r"other.*layer 0: \[2\]; got layer 0: \[3\]"):
        heads(values={"score": {0: torch.zeros(2)}, "other": {0: torch.zeros(3)}}, null={})
    with pytest.raises(WorkbenchError, match="other"):
        heads(values={"score": {0: torch.zeros(2)}, "other": {1: torch.zeros(2)}}, null={})
    with pytest.raises(WorkbenchError, match="width"):
        layers(layers=(0, 1))
    with pytest.raises(WorkbenchError, match="mass"):
        tokens(null={"mass": torch.zeros(3)})


def test_an_infinite_number_does_not_break_the_picture():
    found = heads(values={"score": {0: torch.tensor([1.0, float("inf")])}}, null={})
    found.plot().figure.canvas.draw()


def test_numbers_on_a_graph_are_detached():
    found = layers(values={"width": torch.ones(3, requires_grad=True)})
    assert found.frame()["width"].tolist() == [1, 1, 1]
