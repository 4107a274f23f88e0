"""The head page: what is in view, the text, another run beside it. Numbers are checked against the map itself."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from pages import drawn, open_page, python_of, settled
from PIL import Image

import workbench as wb
from workbench.jobs.job import Job


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store with three runs: a needle text, two prompts of one length, of another model too."""
    folder = tmp_path_factory.mktemp("head")
    jobs = [
        Job("capture", model="tiny-softmax", args={"needle": 512}),
        Job("capture", model="tiny-softmax", task="ioi"),
        Job("capture", model="tiny-softmax", task="ioi", args={"side": "corrupt"}),
        Job("capture", model="tiny-gated", task="ioi"),
    ]
    assert not wb.run_jobs(jobs, folder / "app", workers=1).failed
    return folder


def key_of(store, model, **wanted):
    cells = wb.JobStore(store / "app")
    for key in cells.keys():  # noqa: SIM118
        job = cells.job(key)
        if job.model == model and dict(job.args) == wanted.get("args", {}) and job.task_name == wanted.get("task"):
            return key
    raise AssertionError(f"no run of {model} {wanted}")


def values(data):
    """The numbers in a packed picture, NaN where there is nothing."""
    picture = Image.open(io.BytesIO(base64.b64decode(data["image"].partition(",")[2])))
    high, low, kind = np.split(np.asarray(picture.convert("L"), dtype=float), 3)
    found = ((high * 256 + low) / 65535) ** 2 * data["top"] * np.where(kind == 128, -1, 1)
    return np.where(kind == 255, np.nan, found)


def weights(store, key, layer, head):
    run = wb.open_run(store / "app" / key / "saved")
    return run.maps[layer].tile(slice(None), slice(None))[0, head].numpy()


def test_the_whole_map_is_drawn_and_its_code_gives_the_same(store):
    key = key_of(store, "tiny-softmax", args={"needle": 512})
    page = open_page("head", store, run=key, layer="2", head="3")
    data = drawn(page, "tilemap map")
    exact = weights(store, key, 2, 3)
    shown = values(data)
    assert data["view"] == [0, 512, 0, 512]
    assert data["exact"]
    assert np.isnan(shown[np.triu_indices(512, 1)]).all()
    assert np.allclose(np.nan_to_num(shown), exact, atol=2e-5)
    names: dict = {}
    exec(python_of(page)[0], names)
    assert torch.equal(names["view"].values.nan_to_num(), torch.from_numpy(exact))


def test_a_part_with_the_sink_hidden_and_the_rest_renormalised(store):
    key = key_of(store, "tiny-softmax", args={"needle": 512})
    page = open_page("head", store, run=key, layer="1", head="0", view="100-160-0-64", sink="renormalise")
    data = drawn(page, "tilemap map")
    exact = weights(store, key, 1, 0)
    exact = exact / (1 - exact[:, :1]).clip(1e-12)
    exact[:, 0] = 0
    assert data["view"] == [100, 160, 0, 64]
    assert len(data["query_labels"]) == 60
    assert np.allclose(values(data), exact[100:160, :64], atol=2e-5)
    names: dict = {}
    exec(python_of(page)[0], names)
    assert np.allclose(names["view"].values.numpy(), exact[100:160, :64], atol=1e-6)


@pytest.mark.parametrize("direction", ["from", "to"])
def test_the_text_is_coloured_by_the_row_or_the_column_in_focus(store, direction):
    key = key_of(store, "tiny-softmax", args={"needle": 512})
    page = open_page("head", store, run=key, layer="3", head="1", focus="300", direction=direction)
    data = drawn(page, "tokens")
    exact = weights(store, key, 3, 1)
    expected = exact[300, 256:512] if direction == "from" else exact[256:512, 300]
    assert (data["start"], data["focus"], data["total"]) == (256, 300, 512)
    assert np.allclose(data["weights"], expected, atol=1e-6)
    best = page.dataframe[0].value
    whole = exact[300] if direction == "from" else exact[:, 300]
    assert best["position"].iloc[0] == whole.argmax()
    names: dict = {}
    exec(python_of(page)[1], names)
    assert np.allclose(names["weights"].values.nan_to_num().flatten().numpy(), whole, atol=1e-6)


def test_a_second_run_stands_beside_with_the_difference(store):
    ours = key_of(store, "tiny-softmax", task="ioi")
    theirs = key_of(store, "tiny-softmax", task="ioi", args={"side": "corrupt"})
    page = open_page("head", store, run=ours, layer="2", head="1", other=theirs)
    data = drawn(page, "tilemap difference")
    apart = weights(store, ours, 2, 1) - weights(store, theirs, 2, 1)
    assert data["signed"]
    assert np.abs(apart).max() > 0.01
    assert np.allclose(np.nan_to_num(values(data)), apart, atol=2e-5)
    names: dict = {}
    exec(python_of(page)[-1], names)
    assert np.allclose(names["apart"].nan_to_num().numpy(), apart, atol=1e-6)


def test_runs_of_other_lengths_have_no_difference_and_say_so(store):
    ours = key_of(store, "tiny-softmax", task="ioi")
    page = open_page("head", store, run=ours, other=key_of(store, "tiny-softmax", args={"needle": 512}))
    drawn(page, "tilemap other")
    assert any("a difference needs runs of one length" in one.value for one in page.info)


def test_gated_heads_show_the_attention_inside_the_gate(store):
    key = key_of(store, "tiny-gated", task="ioi")
    page = open_page("head", store, run=key, layer="1", head="2")
    outside = values(drawn(page, "tilemap map"))
    page.toggle(key="raw").set_value(True)
    inside = values(drawn(settled(page.run()), "tilemap map"))
    assert np.allclose(np.nansum(inside, 1), 1, atol=1e-3)
    assert not np.allclose(np.nan_to_num(outside), np.nan_to_num(inside), atol=1e-3)
    exec(python_of(page)[0], names := {})
    assert np.allclose(names["view"].values.nan_to_num().sum(1), 1, atol=1e-5)


def test_a_view_belongs_to_its_run(store):
    page = open_page("head", store, run=key_of(store, "tiny-softmax", args={"needle": 512}), view="10-20-0-20")
    assert drawn(page, "tilemap map")["view"] == [10, 20, 0, 20]
    page.selectbox(key="run").set_value(key_of(store, "tiny-softmax", task="ioi"))
    data = drawn(settled(page.run()), "tilemap map")
    assert data["view"] == [0, data["queries"], 0, data["keys"]]


@pytest.mark.parametrize(("name", "value"), [("view", "9-3-0-5"), ("focus", "x"), ("layer", "77"), ("head", "-1")])
def test_a_wrong_address_is_told_and_the_page_stays(store, name, value):
    page = open_page("head", store, run=key_of(store, "tiny-softmax", task="ioi"), **{name: value})
    assert any(f"no {name} in the address '{value}'".replace("-", "\\-") in one.value for one in page.warning)
    drawn(page, "tilemap map")


def test_a_link_to_a_part_beside_the_map_shows_all_of_it_and_says_so(store):
    key = key_of(store, "tiny-softmax", args={"needle": 512})
    page = open_page("head", store, run=key, view="600-700-0-64")
    assert drawn(page, "tilemap map")["view"] == [0, 512, 0, 512]
    assert "600-700-0-64 of this link lies outside of the 512 x 512 tokens" in page.warning[0].value
