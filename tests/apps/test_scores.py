"""Scores that heads are sorted by: on maps made by hand, and in a page on the app's first run and a run of images."""

from __future__ import annotations

import math
import sys
import time

import pytest
import torch
from pages import settled
from streamlit.testing.v1 import AppTest

from workbench.apps.screen import scores
from workbench.errors import UnknownName
from workbench.maps import AttentionMap
from workbench.models.protocol import Tokens
from workbench.probes.atlas import atlas
from workbench.run import Maps, Run


def _run(*heads: torch.Tensor) -> Run:
    weights = torch.stack(heads)[None]
    return Run(Tokens.of(torch.arange(weights.shape[2])[None]), maps=Maps({0: AttentionMap.from_dense(weights)}))


def _looks(targets: list[int]) -> torch.Tensor:
    weights = torch.zeros(len(targets), len(targets))
    weights[torch.arange(len(targets)), torch.tensor(targets)] = 1
    return weights


def test_scores_of_heads_made_by_hand():
    first, itself = [0] * 10, list(range(10))
    middle = [0, 0, 0, 0, 0, 0, 0, 2, 2, 2]
    found = scores.map_scores(atlas(_run(_looks(first), _looks(itself), _looks(middle)), blocks=2))
    value = {name: table["value"].tolist() for name, table in found.items()}
    assert list(found) == list(scores.STORED)
    assert value["sink"][0] == 1
    assert value["distance"] == [4.5, 0, 3.9]
    assert value["entropy"] == [0, 0, 0]
    # blocks 0 and 1 of the five see key 0 in their own block or the one beside it
    assert value["locality"] == [pytest.approx(0.4), 1, pytest.approx(0.4)]
    # nothing far away but the first keys, nothing far away, and all of the last block on keys 2 and 3
    assert value["largest block"] == [0, 0, 1]


def test_maps_without_blocks_have_no_locality():
    found = scores.map_scores(atlas(_run(_looks([0, 1, 2]))))
    assert math.isnan(found["locality"]["value"][0])
    assert math.isnan(found["largest block"]["value"][0])
    assert found["distance"]["value"][0] == 0


def test_a_last_block_that_is_not_full_counts_by_its_queries():
    found = scores.map_scores(atlas(_run(_looks([0, 1, 2, 3, 0])), blocks=2))
    assert found["locality"]["value"][0] == pytest.approx(0.8)


def _page() -> None:
    import streamlit as st

    from workbench.apps.screen import runs, scores
    from workbench.apps.screen.need import guarded

    def draw() -> None:
        run = runs.current()
        for name, table in scores.scores(run).items():
            st.text(f"{name} {len(table)} {table['value'].notna().sum()}")
        for name in scores.ASKED:
            done = scores.asked(run, name)
            if done is not None:
                table = scores.score_of(done, name)
                best = table.loc[table["value"].idxmax()]
                st.text(f"{name}: {list(table)} {len(table)} best {best['layer']}.{best['head']} {best['value']:.3f}")

    guarded(draw)


def _opened(store, **query) -> AppTest:
    sys.argv = ["main.py", "--store", str(store)]
    page = AppTest.from_function(_page, default_timeout=120)
    for key, value in query.items():
        page.query_params[key] = value
    return settled(page.run())


def test_scores_of_the_first_run(tmp_path):
    said = [text.value for text in _opened(tmp_path).text]
    assert said[:5] == [f"{name} 32 32" for name in scores.STORED]
    asked = dict(line.split(": ", 1) for line in said[5:])
    assert set(asked) == {"induction", "retrieval", "importance"}
    for line in asked.values():
        assert line.startswith("['layer', 'head', 'value'] 32 best ")
    assert " best 1." in asked["induction"]
    assert float(asked["induction"].split()[-1]) > 0.5
    assert " best 1." in asked["retrieval"]
    assert float(asked["importance"].split()[-1]) > 0


def test_a_run_without_a_text_says_what_it_lacks(tmp_path):
    from workbench.apps.screen.need import job, work

    sys.argv = ["main.py", "--store", str(tmp_path)]
    image = job("capture", "tiny-vit", image=0)
    work().submit(image)
    ends = time.monotonic() + 60
    while work().state(image.key).kind != "done":
        assert time.monotonic() < ends
        time.sleep(0.1)
    page = _opened(tmp_path, run=image.key)
    assert "this run is of an image" in " ".join(error.value for error in page.error)
    assert len([text for text in page.text if text.value.startswith(tuple(scores.STORED))]) == 5


def test_unknown_scores_are_told():
    with pytest.raises(UnknownName, match="importance"):
        scores.asked(None, "fame")
