"""The page of sinks: what it counts, on maps made by hand; what it draws; and what every page does with its address."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import torch
from pages import links, open_page, plotted, python_of, settled

import workbench as wb
from workbench.apps import work_sinks
from workbench.apps.screen import sinks_view
from workbench.apps.screen.need import job
from workbench.apps.screen.sink_causes import CAUSES
from workbench.errors import WorkbenchError
from workbench.maps import AttentionMap, GatedMap
from workbench.models.native import NativeModel
from workbench.models.native_net import NativeConfig, NativeNet
from workbench.models.protocol import Tokens
from workbench.probes.sinks.planted import planted_model, planted_texts
from workbench.run import Maps, Run


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One store for the module: what one test had computed, the next one finds."""
    return tmp_path_factory.mktemp("store")


def _run(gate=None) -> Run:
    """Two heads over six tokens: one looks at the first token, the other at itself."""
    first, itself = torch.zeros(6, 6), torch.eye(6)
    first[:, 0] = 1
    amap = AttentionMap.from_dense(torch.stack([first, itself])[None])
    labels = (("<bos>", "a", "b", "c", "d", "e"),)
    tokens = Tokens(torch.arange(6)[None], torch.ones(1, 6, dtype=torch.bool), labels)
    return Run(tokens, maps=Maps({0: amap if gate is None else GatedMap(amap, gate)}))


def test_measures_of_heads_made_by_hand():
    run = _run()
    found = wb.sinks(run)
    known = sinks_view.measures(run, found)
    assert list(known) == ["favourite token", "first token"]
    favourite, first = (known[name].table() for name in known)
    assert favourite["token"].tolist()[0] == "<bos>"
    assert favourite["value"].tolist() == [1, pytest.approx(1 / 3)]  # key 3: half as many queries see it as the first
    assert first["value"].tolist() == [1, pytest.approx(1 / 6)]
    assert first["null"].tolist() == pytest.approx([(1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5 + 1 / 6) / 6] * 2)


def test_gates_are_measures_of_gated_heads_only():
    run = _run(torch.rand(1, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    known = sinks_view.measures(run, wb.sinks(run))
    assert {name.partition(":")[0] for name in known} == {"favourite token", "first token", "gate"}
    table = known["gate: gate at sink"].table()
    assert 0 < table["value"][0] < 1  # head 1 never looks there
    assert {"null"} <= set(table)


def test_learned_sinks_are_measures_where_there_are_any():
    net = NativeNet(
        NativeConfig(layers=2, heads=2, width=16, head_width=8, vocab=30, mixer="sink-logits", mlp_width=16)
    )
    run = NativeModel(net.eval()).run(torch.arange(10)[None], maps=wb.capture())
    known = sinks_view.measures(run, wb.sinks(run))
    share = known["learned sink: share"].table()
    assert list(share) == ["layer", "head", "value", "null"]
    assert share["value"].between(0.01, 0.99).all()


def test_a_profile_keeps_the_largest_share_of_each_stretch():
    found = wb.sinks(_run())
    whole = sinks_view.profile(found, 0, 0)
    assert whole["position"].tolist() == list(range(6))
    short = sinks_view.profile(found, 0, 0, points=2)
    assert short["position"].tolist() == [0, 3]
    assert short["token"].tolist() == ["<bos>", "c"]
    assert short["share"].tolist() == [1, 0]
    last = sinks_view.profile(found, 0, 1, points=4)  # of stretches of two the later key, seen by fewer
    assert last["position"].tolist() == [1, 3, 5]


def test_keys_that_few_queries_see_are_no_favourites():
    best = sinks_view.top_keys(wb.sinks(_run()), 0, 1)
    assert best["position"].tolist() == [3, 2, 1, 0]
    assert best["queries"].tolist() == [3, 4, 5, 6]


def test_stripes_sum_to_all_of_the_attention():
    table = sinks_view.stripes(wb.sinks(_run()), count=3)
    assert table["start"].tolist() == [0, 2, 4]
    assert table["end"].tolist() == [2, 4, 6]
    # head 0 gives 6 rows to key 0, head 1 one row to each key
    assert table["part"].tolist() == pytest.approx([8 / 12, 2 / 12, 2 / 12])
    assert table["even"].sum() == pytest.approx(1)
    assert (table["part"] - table["even"]).tolist() == pytest.approx(table["more"].tolist())


def test_favourites_count_heads_per_text_and_tell_the_first_token_apart():
    rows = pd.DataFrame(
        {
            "text": [0, 0, 1, 1],
            "layer": [0, 1, 0, 1],
            "head": [0, 0, 0, 0],
            "position": [0, 3, 0, 0],
            "token": ["The", "The", "The", "The"],
            "share": [0.4, 0.2, 0.6, 0.8],
            "uniform": [0.1, 0.1, 0.1, 0.1],
        }
    )
    found = sinks_view.favourites(rows).set_index("token")
    assert found["heads"].to_dict() == {"The (first)": 1.5, "The": 0.5}
    assert found["share"]["The (first)"] == pytest.approx(0.6)
    # the means of the two texts are .4 and .7
    assert found["error"]["The (first)"] == pytest.approx(0.15)
    assert math.isnan(found["error"]["The"])


def test_several_texts_have_intervals_around_their_mean():
    model = wb.load("tiny-gated")
    rows = work_sinks.sinks_by_text(model, texts=3, words=20)
    assert set(rows["map"]) == {"effective", "raw"}
    assert len(rows) == 3 * 2 * 32
    raw = rows[rows["map"] == "raw"]
    table = sinks_view.over_texts(raw)
    one = raw[(raw["layer"] == 1) & (raw["head"] == 2)]["first"]
    row = table[(table["layer"] == 1) & (table["head"] == 2)].iloc[0]
    assert row["value"] == pytest.approx(one.mean())
    slack = 1e-12  # the mean of equal numbers
    assert one.min() - slack <= row["low"] <= row["value"] <= row["high"] <= one.max() + slack
    found = wb.sinks(model.run(work_sinks.stories(1, 20), maps=wb.capture()), raw=True)
    assert one.iloc[0] == pytest.approx(float(found.first[1][0, 2]))
    assert (row["smallest"], row["largest"]) == (one.min(), one.max())


def test_another_revision_of_the_other_model_is_refused():
    with pytest.raises(WorkbenchError, match="revision"):
        work_sinks.twins(wb.load("tiny-softmax"), "tiny-gated", "sha256:0123456789abcdef", texts=1)


def test_sinks_of_the_first_run(store):
    page = open_page("sinks", store)
    assert page.title[0].value == "Sinks"
    shown = plotted(page, "sinks grid")
    assert len(shown) == 32
    best = shown.loc[shown["value"].idxmax()]
    assert best["token"] == "<bos>"
    assert best["chosen"]
    name = best["name"]
    assert f"layer={best['layer']}&head={best['head']}" in links(page)[f"Look at head {name}"]
    assert len(plotted(page, "sinks dots")) == 16
    for code in python_of(page):
        names: dict = {}
        exec(code, names)
        if "found.plot()" in code:
            assert len(names["found"].frame()) > 0
    page.slider(key="epsilon").set_value(0.05)
    page = settled(page.run())
    assert "epsilon=0.05" in python_of(page)[0]
    heads = {one.label: one.value for one in page.metric}["heads with a sink"]
    assert 5 < int(heads.split()[0]) <= 32


def test_the_head_and_the_measure_stand_in_the_address(store):
    page = open_page("sinks", store, layer="1", head="3", measure="first token")
    shown = plotted(page, "sinks grid")
    assert shown[shown["chosen"]]["name"].tolist() == ["1.3"]
    assert "token" not in shown
    assert any("Head 1.3" in one.value for one in page.subheader)


def test_sinks_over_several_texts(store):
    page = open_page("sinks", store, part="texts", texts="3", words="20")
    shown = plotted(page, "sinks over texts grid")
    assert len(shown) == 32
    assert (shown["low"] <= shown["high"]).all()
    exec(python_of(page)[-1], names := {})
    assert names["rows"]["text"].nunique() == 3


def test_two_models_side_by_side(store):
    page = open_page("sinks", store, part="models", twin="tiny-gated", texts="2")
    shown = plotted(page, "heads of two models grid")
    assert len(shown) == 32
    assert shown["value"].min() < -0.5
    exec(python_of(page)[0], names := {})
    layers = names["found"].layers()
    assert layers["difference"].notna().all()
    whole = page.dataframe[1].value
    assert set(whole["model"]) >= {"tiny-softmax", "tiny-gated"}


def test_what_values_at_the_sink_hold(store):
    page = open_page("sinks", store, part="cause", question="Is there anything to read?")
    shown = plotted(page, "Is there anything to read? grid")
    assert (shown["value"] >= 0).all()
    exec(python_of(page)[0], names := {})
    assert names["found"].frame()["r_v"].tolist() == pytest.approx(shown["value"].tolist())


def test_causes_are_drawn_from_the_tables_that_their_jobs_leave():
    model, texts = planted_model(), planted_texts()
    removed = wb.sink_removal(model, texts, random=1).frame()
    ax = CAUSES["Take away what writes it"].draw(removed)
    heights = [[bar.get_height() for bar in bars] for bars in ax.containers]
    assert heights[0] == removed["lifetime"].tolist()
    assert heights[1] == removed["lifetime_removed"].tolist()
    plain = torch.tensor([[0, 2, 3, 4, 7, 8, 9, 10, 11], [0, 6, 7, 8, 9, 10, 11, 2, 3]])
    effect = wb.massive_effect(model, plain, ratio=100, random=1).frame()
    bars = CAUSES["Massive activations"].draw(effect).containers[0]
    assert len(bars) == len(effect) - 1
    small = wb.load("compiled-needle")
    text = work_sinks.stories(2, 20)
    evicted = CAUSES["Hide the first tokens"].draw(wb.eviction(small, text, window=8, sinks=(0, 1), random=1).frame())
    assert [line.get_label() for line in evicted.lines] == [
        "first tokens kept", "other early tokens kept", "everything kept",
    ]  # fmt: skip
    off = wb.zeroable(small, text, score="first_token", counts=(1, 2), random=1).frame()
    assert len(CAUSES["Switch off heads that sink"].draw(off).lines) == 3


def test_every_cause_is_a_job_that_the_workbench_knows():
    for question in CAUSES.values():
        job(question.probe, "tiny-softmax", question.task, **question.args)


def test_values_in_the_address_that_do_not_exist_are_told(store):
    page = open_page("sinks", store, epsilon="7", run="nothing", measure="none")
    told = " ".join(one.value for one in page.warning)
    assert "no epsilon in the address '7'" in told
    assert "no run in the address 'nothing'" in told
    assert "no heads by in the address 'none'" in told
