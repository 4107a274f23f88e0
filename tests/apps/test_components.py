"""What is sent to the browser: numbers inside pictures, text that cannot become markup, sizes, and clear refusals."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streamlit.testing.v1 import AppTest

from workbench.apps.components import component, pixels
from workbench.apps.components.component import Component, names
from workbench.apps.components.pixels import image, packed, unpacked
from workbench.apps.components.tilemap import TILEMAP, tilemap_data
from workbench.apps.components.tokens import TOKENS, tokens_data
from workbench.apps.components.wall import LIMIT, WALL, wall_data
from workbench.errors import Refused, UnknownName, WorkbenchError

EVIL = "</script><script>alert(1)</script><!--<img src=x onerror=alert(1)>&amp;\u2028"


def square(n: int = 4, **options: Any) -> dict[str, Any]:
    whole = {"queries": n, "keys": n, "view": [0, n, 0, n], "size": 1, "exact": True}
    return tilemap_data(np.arange(n * n).reshape(n, n) / n**2, **{**whole, **options})


def heads(layers: int, each: int) -> list[dict[str, Any]]:
    return [{"layer": l, "head": h, "text": "", "value": None} for l in range(layers) for h in range(each)]


def page_of(**options: Any) -> dict[str, Any]:
    whole = {"start": 0, "total": 3, "focus": 1, "direction": "from", "weights": [0.5, 0.5, float("nan")]}
    return tokens_data(["a", "b", "c"], **{**whole, **options})


# ---- numbers in pictures


def test_picture_holds_the_16_bits_of_the_root() -> None:
    high, low, kind = image(packed([[1.0, -0.25, float("nan"), 0.0]], top=1.0)).tolist()
    assert high == [255, 128, 0, 0]  # 0.5 * 65535 rounds to 32768
    assert low == [255, 0, 0, 0]
    assert kind == [0, 128, 255, 0]


@given(
    st.lists(
        st.lists(st.one_of(st.just(float("nan")), st.floats(-8, 8, width=32)), min_size=3, max_size=3),
        min_size=1,
        max_size=5,
    )
)
@settings(max_examples=60, deadline=None)
def test_values_come_back_to_a_step_of_the_root(rows: list[list[float]]) -> None:
    values = np.array(rows)
    back = unpacked(packed(values, top=8.0), 8.0)
    assert (np.isnan(back) == np.isnan(values)).all()
    there = ~np.isnan(values)
    # half a step of sqrt(v / top) is 1 / 131070, so v is off by at most 2 sqrt(v top) times that, and its square
    allowed = 2 * np.sqrt(8 * np.abs(values[there])) / 131070 + 8 / 131070**2
    assert (np.abs(back[there] - values[there]) <= allowed * 1.001).all()


def test_small_weights_keep_their_digits() -> None:
    back = unpacked(packed([[1.0, 1e-6]]), 1.0)[0, 1]
    assert back == pytest.approx(1e-6, rel=0.02)


def test_tensors_on_any_type_are_taken_and_values_beyond_the_top_are_cut() -> None:
    assert unpacked(packed(torch.tensor([[3, -3, 0.5]], dtype=torch.bfloat16), top=1.0), 1.0)[0] == pytest.approx(
        [1, -1, 0.5], abs=1e-4
    )


def test_a_picture_of_nothing_can_be_packed() -> None:
    assert np.isnan(unpacked(packed([[float("nan")]]), 1.0)).all()
    assert unpacked(packed([[0.0]]), 1.0).tolist() == [[0.0]]


@pytest.mark.parametrize("values", [[1.0, 2.0], [[]], [[[1.0]]], 3.0])
def test_what_is_no_grid_is_refused_with_its_shape(values: Any) -> None:
    with pytest.raises(WorkbenchError, match=re.escape(f"got shape {np.shape(values)}")):
        packed(values)


def test_infinite_values_and_tops_are_refused() -> None:
    with pytest.raises(WorkbenchError, match="infinite"):
        packed([[float("inf")]])
    for top in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(WorkbenchError, match="positive number"):
            packed([[1.0]], top=top)


def test_a_picture_too_long_to_send_is_refused_with_its_size() -> None:
    noise = np.random.default_rng(0).random((900, 900))
    with pytest.raises(Refused, match=r"900 x 900 cells takes 2\.\d MB"):
        packed(noise)
    assert len(packed(noise[:512, :512])) < pixels.LIMIT


# ---- data of each component


def test_tilemap_data_is_plain_and_complete() -> None:
    data = square(cross=(1, 2), query_labels=["a", "b", "c", EVIL], title="t", source="h")
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert (data["rows"], data["columns"], data["top"], data["cross"]) == (4, 4, 15 / 16, [1, 2])
    assert data["query_labels"][3] == EVIL
    assert unpacked(data["image"], data["top"])[3, 3] == pytest.approx(15 / 16)


def test_the_last_cells_of_a_view_may_be_cut() -> None:
    data = tilemap_data(
        np.ones((3, 2)), queries=100, keys=90, view=[90, 100, 80, 88], size=4, exact=False, query_labels=["x"] * 10
    )
    assert (data["rows"], data["columns"]) == (3, 2)


def test_labels_of_views_too_large_to_show_them_are_not_sent() -> None:
    long = square(65, key_labels=["word"] * 65)
    assert long["key_labels"] == []
    assert square(64, key_labels=["word"] * 64)["key_labels"] == ["word"] * 64


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"view": [0, 5, 0, 4]}, "view [0, 5, 0, 4] is not inside the map of 4 queries x 4 keys"),
        ({"view": [2, 2, 0, 4]}, "view [2, 2, 0, 4] is not inside"),
        ({"view": [0, 2, 0, 4]}, "values (4, 4) do not cover the view [0, 2, 0, 4] in cells of 1 tokens: (2, 4) do"),
        ({"size": 2}, "(2, 2) do"),
        ({"size": 0}, "at least one token"),
        ({"scale": "cubic"}, "no scale 'cubic'; known: linear, sqrt, log"),
        ({"cross": (4, 0)}, "cross [4, 0]"),
        ({"query_labels": ["a"]}, "query_labels: 1 labels for the 4 tokens in view"),
        ({"top": 0.0}, "positive number"),
    ],
)
def test_a_tilemap_of_wrong_shape_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(WorkbenchError, match=re.escape(said)):
        square(**options)


def test_wall_keeps_each_head_on_its_own_scale_and_cells_whole() -> None:
    weak = np.array([[0.01, np.nan], [0.0, 0.0025]])
    data = wall_data([weak, 100 * weak, weak, weak], heads(2, 2), selected=[3, 1])
    sprite, side = image(data["image"]), data["side"]
    assert (data["columns"], data["selected"], side) == (2, [1, 3], 48)
    assert sprite.shape == (96, 96)
    first = sprite[:side, :side]
    assert (first == np.kron([[255, 0], [1, 128]], np.ones((24, 24)))).all()
    assert (first == sprite[:side, side:]).all()


def test_a_thin_line_survives_a_smaller_picture() -> None:
    large = np.zeros((500, 500))
    large[:, 252] = 1.0
    data = wall_data([large], heads(1, 1))
    sprite = image(data["image"])
    assert sprite.shape == (96, 96)
    assert ((sprite == 255).sum(1) == 1).all()


def test_heads_that_are_no_whole_layers_stand_in_a_square() -> None:
    assert wall_data([np.ones((2, 2))] * 5, heads(1, 5))["columns"] == 5
    assert wall_data([np.ones((2, 2))] * 5, heads(5, 1))["columns"] == 3


def test_a_wall_of_many_heads_stays_small() -> None:
    noise = np.random.default_rng(0).random((1024, 64, 64))
    data = wall_data(noise, heads(32, 32))
    assert len(data["image"]) <= LIMIT
    assert 20 <= data["side"] < 48
    with pytest.raises(Refused, match="96 pixels a side take"):
        wall_data(noise, heads(32, 32), side=96)


def test_wrong_walls_are_refused() -> None:
    one = np.ones((2, 2))
    with pytest.raises(WorkbenchError, match="got 1 pictures and 2 heads"):
        wall_data([one], heads(1, 2))
    with pytest.raises(WorkbenchError, match="got 0 pictures"):
        wall_data([], [])
    with pytest.raises(WorkbenchError, match="layer, head, text, value; got layer"):
        wall_data([one], [{"layer": 0}])
    with pytest.raises(WorkbenchError, match=re.escape("selected [0, 2]")):
        wall_data([one], heads(1, 1), selected=[2, 0])
    with pytest.raises(WorkbenchError, match="at least 4 pixels a side, got 0"):
        wall_data([one], heads(1, 1), side=0)
    with pytest.raises(WorkbenchError, match="picture 1: a grid"):
        wall_data([one, np.ones(3)], heads(1, 2))


def test_tokens_data_is_plain_and_scaled_by_all_it_shows() -> None:
    data = page_of(tile=[[1, 0, 0], [0.5, 0.5, np.nan], [0, -2, 0]])
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["weights"] == [0.5, 0.5, None]
    assert data["top"] == 2.0
    assert unpacked(data["tile"], 2.0)[2, 1] == pytest.approx(-2)
    assert page_of(weights=torch.tensor([0.1, 0.2, 0.3]))["top"] == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"start": 1}, "a page of 3 tokens from 1 on does not lie in a text of 3"),
        ({"focus": 3}, "focus 3 is not a token"),
        ({"direction": "both"}, "no direction 'both'; known: from, to"),
        ({"weights": [1.0]}, "weights: 1 numbers for the 3 tokens"),
        ({"tile": [[1.0]]}, "tile (1, 1) does not join the 3 tokens"),
        ({"size": 2}, "1 to 2 tokens, got 3"),
    ],
)
def test_wrong_pages_of_tokens_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(WorkbenchError, match=re.escape(said)):
        page_of(**options)


def test_a_page_of_256_tokens_with_its_tile_is_small() -> None:
    noise = np.random.default_rng(0).random((256, 256))
    data = tokens_data(
        ["ab"] * 256, start=0, total=10**6, focus=9, direction="to", weights=noise[0], tile=noise, title="x"
    )
    assert len(json.dumps(data)) < 300_000
    with pytest.raises(WorkbenchError, match="1 to 256 tokens, got 257"):
        tokens_data(["ab"] * 257, start=0, total=300, focus=9, direction="to", weights=[0.0] * 257)


# ---- one file, one fragment, one widget


class Tags(HTMLParser):
    """Elements of a page and the text of its title."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.titles: list[str] = []
        self.asked: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.asked += [name for name, _ in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        if self.names[-1:] == ["title"]:
            self.titles.append(data)


@pytest.mark.parametrize(
    ("shown", "data"),
    [
        (TILEMAP, square(title=EVIL, unit=EVIL, query_labels=[EVIL] * 4)),
        (WALL, wall_data([np.ones((2, 2))], [{"layer": 0, "head": 0, "text": EVIL, "value": 1.0}], title=EVIL)),
        (TOKENS, tokens_data([EVIL], start=0, total=1, focus=0, direction="to", weights=[1.0], title=EVIL)),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_text_in_data_and_titles_cannot_become_markup(shown: Component, data: dict[str, Any]) -> None:
    tags = Tags(shown.page(data, title=EVIL))
    assert tags.names == ["html", "head", "meta", "meta", "title", "style", "body", "div", "p", "script"]
    assert tags.titles[0] == EVIL
    assert tags.asked == []


def test_a_page_names_no_other_file() -> None:
    for name in names():
        module = Component(name).html({})
        assert not re.search(r"\bimport\s*[({*'\"]|\bfetch\(|XMLHttpRequest|innerHTML|insertAdjacentHTML", module), name
        assert set(re.findall(r"https?://[^\"'\s]+", module)) <= {"http://www.w3.org/2000/svg"}, name


def test_two_fragments_of_the_same_data_draw_into_their_own_place() -> None:
    marks = {mark for _ in range(2) for mark in re.findall(r'<div data-figure="([^"]+)"', TILEMAP.html(square()))}
    assert len(marks) == 2


def test_data_that_is_no_json_or_too_long_is_refused() -> None:
    with pytest.raises(WorkbenchError, match="'tilemap' must be plain JSON without NaN"):
        TILEMAP.html({"top": float("nan")})
    with pytest.raises(WorkbenchError, match="plain JSON"):
        TILEMAP.html({"top": object()})
    with pytest.raises(Refused, match=r"'tilemap' takes 2\.6 MB, more than the 2\.5 MB"):
        TILEMAP.page({"title": "x" * 2_600_000}, title="")


def test_an_unknown_component_names_those_there_are() -> None:
    with pytest.raises(UnknownName, match=r"no component 'tilmap'; known: .*tilemap.*nearest: tilemap"):
        Component("tilmap").html({})


def test_a_widget_holds_its_data_and_its_last_event() -> None:
    widget = TILEMAP.widget(square())
    assert widget.data == square()
    assert widget.event == {}
    seen = []
    widget.observe(lambda change: seen.append(change["new"]), "event")
    for number in (1, 2):
        widget.event = {"event": "cell", "value": [1, 2], "number": number}
    assert len(seen) == 2
    assert "function draw(root, data, send)" in widget._esm


def test_without_anywidget_the_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    component._widget.cache_clear()
    monkeypatch.setitem(sys.modules, "anywidget", None)
    with pytest.raises(WorkbenchError, match=r"pip install 'attention-workbench\[notebook\]'"):
        TILEMAP.widget(square())


# ---- in Streamlit


def script() -> None:
    import numpy as np
    import streamlit as st

    from workbench.apps.components.tilemap import TILEMAP, tilemap_data

    data = tilemap_data(np.ones((2, 2)), queries=2, keys=2, view=[0, 2, 0, 2], size=1, exact=True, title="<b>")
    TILEMAP.show(data, key="one", on={"cell": lambda cell: st.session_state.update(cell=cell)})
    TILEMAP.show(data, key="two")


def test_streamlit_gets_the_data_and_the_events_that_are_heard(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):  # every session registers with a runtime of its own
        page = AppTest.from_function(script).run()
        assert not page.exception
        page.run()
        shown = page.get("bidi_component")
        assert len(shown) == 2
        sent = [json.loads(one.proto.json) for one in shown]
        assert [one["events"] for one in sent] == [["cell"], []]
        assert sent[0]["data"]["title"] == "<b>"
        assert "function draw(root, data, send)" in shown[0].proto.js_content
    assert "already registered" not in caplog.text


def test_names_are_those_of_the_scripts() -> None:
    assert {"tilemap", "tokens", "wall"} <= set(names())
    assert "shared" not in names()
    assert all("." not in name for name in names())
