"""Interactive views of a library's objects: what they draw, what they answer, what they save."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from fragment_checks import Fragment

import workbench as wb
from workbench.apps.components.pixels import unpacked
from workbench.apps.notebook import Shown
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap
from workbench.models.protocol import Tokens
from workbench.run import Maps, Provenance, Run

EVIL = "</script><img src=x onerror=alert(1)>"


def run_of(weights: torch.Tensor, labels: tuple[str, ...] = ()) -> Run:
    batch, _, tokens, _ = weights.shape
    ids = torch.arange(tokens).expand(batch, tokens)
    names = (labels or tuple(f"t{i}" for i in range(tokens)),) * batch
    maps = Maps({2: AttentionMap.from_dense(weights, mask=Mask(causal=True))})
    return Run(Tokens(ids, torch.ones_like(ids, dtype=torch.bool), names), maps=maps, provenance=Provenance("toy"))


@pytest.fixture
def run() -> Run:
    """One layer of 3 heads over 700 tokens."""
    weights = torch.rand(1, 3, 700, 700, generator=torch.Generator().manual_seed(0)).tril()
    return run_of(weights / weights.sum(-1, keepdim=True))


def told(live: Any, event: str, value: Any, number: int = 1) -> None:
    """What the browser does when something happens in it."""
    live.event = {"event": event, "value": value, "number": number}


def test_a_head_is_its_weights(run: Run) -> None:
    shown = wb.show_head(run, 2, 1, (300, 340), (280, 330))
    data = shown.data
    assert data["view"] == [300, 340, 280, 330]
    assert data["exact"]
    exact = run.maps[2].tile(slice(300, 340), slice(280, 330))[0, 1].numpy()
    got = unpacked(data["image"], data["top"])
    hidden = np.arange(280, 330)[None] > np.arange(300, 340)[:, None]
    assert np.isnan(got).tolist() == hidden.tolist()
    np.testing.assert_allclose(got[~hidden], exact[~hidden], atol=1e-4 * data["top"])
    assert data["query_labels"][0] == "t300"
    assert "layer 2" in shown.title
    mean = wb.show_head(run, 2, [0, 2], (0, 10), (0, 10)).data
    both = run.maps[2].tile(slice(0, 10), slice(0, 10))[0, [0, 2]].mean(0).numpy()
    np.testing.assert_allclose(np.nan_to_num(unpacked(mean["image"], mean["top"])), both, atol=1e-4 * mean["top"])


def test_mistakes_say_what_there_is(run: Run) -> None:
    with pytest.raises(UnknownName, match="no captured layer '5'"):
        wb.show_head(run, 5, 0)
    with pytest.raises(UnknownName, match="no head '3'"):
        wb.show_head(run, 2, 3)
    with pytest.raises(UnknownName, match="no head '3'"):
        wb.show_tokens(run, 2, 3)
    with pytest.raises(WorkbenchError, match="token 700 is outside"):
        wb.show_tokens(run, 2, 0, focus=700)
    with pytest.raises(UnknownName, match="no direction 'at'"):
        wb.show_tokens(run, 2, 0, direction="at")
    with pytest.raises(WorkbenchError, match="queries of a view are a part of 0 .. 700"):
        wb.show_head(run, 2, 0, (600, 800))
    for show in (wb.show_wall, lambda bare: wb.show_head(bare, 0, 0)):
        with pytest.raises(WorkbenchError, match="captured no attention"):
            show(Run(run.tokens))
    with pytest.raises(UnknownName, match="layer, head"):
        wb.show_wall(run, {(9, 0): 1.0})


def test_long_maps_need_block_maps() -> None:
    class Long(AttentionMap):
        def rows(self, lo: int, hi: int) -> torch.Tensor:
            raise AssertionError("rows of a long map were computed")

    amap = Long((1, 2, 8192, 8192))
    ids = torch.zeros(1, 8192, dtype=torch.int64)
    run = Run(Tokens(ids, torch.ones_like(ids, dtype=torch.bool)), maps=Maps({0: amap}))
    for show in (lambda: wb.show_wall(run), lambda: wb.show_head(run, 0, 0)):
        with pytest.raises(Refused, match="capture with blocks=64"):
            show()
    amap._memo["blocks", 64, "sum"] = torch.rand(1, 2, 128, 128)
    assert wb.show_head(run, 0, 0).data["size"] == 64
    assert len(wb.show_wall(run).data["items"]) == 2


def test_text_is_coloured_by_a_query_or_a_key(run: Run) -> None:
    last = wb.show_tokens(run, 2, 1).data
    assert (last["focus"], last["start"], last["total"]) == (699, 512, 700)
    np.testing.assert_allclose(last["weights"], run.maps[2].rows(699, 700)[0, 1, 0, 512:].tolist(), rtol=1e-5)
    to = wb.show_tokens(run, 2, 1, focus=3, direction="to").data
    np.testing.assert_allclose(to["weights"], run.maps[2].tile(slice(0, 256), slice(3, 4))[0, 1, :, 0], rtol=1e-5)


def test_a_wall_is_ordered_by_scores(run: Run) -> None:
    assert [item["head"] for item in wb.show_wall(run).data["items"]] == [0, 1, 2]
    scores = pd.DataFrame({"layer": 2, "head": [0, 1, 2], "share": [0.2, 0.9, 0.5]})
    shown = wb.show_wall(run, scores.set_index(["layer", "head"]).share)
    assert [item["head"] for item in shown.data["items"]] == [1, 2, 0]
    assert [item["value"] for item in shown.data["items"]] == [0.9, 0.5, 0.2]
    assert shown.opens["open"](0).title == "toy, layer 2, head 1"


def test_several_texts_are_not_passed_over_in_silence() -> None:
    weights = torch.eye(6).expand(2, 1, 6, 6)
    for shown in (show(run_of(weights), 2, 0) for show in (wb.show_head, wb.show_tokens)):
        assert "the first of 2 texts" in shown.title
    assert "the first of 2 texts" in wb.show_wall(run_of(weights)).title


def circuit() -> Any:
    names = ("input->a0.h0<v>", "a0.h0->m0", "m0->logits", "input->logits")
    return wb.Circuit("edge", names, [1.0, 2.0, 3.0, 0.1], torch.tensor([True, True, True, False]), {"method": "eap"})


def test_circuits_and_graphs() -> None:
    truth = wb.Circuit.of("edge", circuit().names, ["m0->logits"])
    data = wb.show_circuit(circuit(), truth).data
    edges = {(edge["source"], edge["target"]): edge for edge in data["edges"]}
    assert edges["m0", "logits"]["truth"]
    assert not edges["a0.h0", "m0"]["truth"]
    assert data["title"] == "eap"
    nodes = wb.FeatureNodes.of(["embedding", "logit"], [-1, 1], [0, 0], [3, 4])
    graph = wb.FeatureGraph(nodes, torch.tensor([0]), torch.tensor([1]), torch.tensor([1.0]), tokens=("a",))
    shown = wb.show_graph(graph, title="mine")
    assert len(shown.data["nodes"]) == 2
    assert shown.title == "mine"


def views(run: Run) -> list[Shown]:
    labelled = run_of(torch.eye(8).expand(1, 2, 8, 8), (EVIL,) * 8)
    return [
        wb.show_head(run, 2, 0),
        wb.show_wall(run),
        wb.show_tokens(labelled, 2, 0),
        wb.show_circuit(circuit(), title=EVIL),
    ]


def test_html_is_self_contained_and_escaped(run: Run, tmp_path: Path) -> None:
    for i, shown in enumerate(views(run)):
        html = shown._repr_html_()
        found = Fragment(html)
        assert found.tags.count("script") == 1
        assert "img" not in found.tags
        assert EVIL not in html
        assert html != shown._repr_html_(), "two views in one notebook would draw into one place"
        page = shown.save(tmp_path / f"{i}.html").read_text()
        assert page.startswith("<!doctype html>")
        assert EVIL not in page
        assert not re.search(r"""(src|href)=["']?(https?:|//)|@import""", page)
        shown.save(tmp_path / f"{i}.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.html", "1.html", "2.html", "3.html"]
    with pytest.raises(WorkbenchError, match="cannot write .*: No such file or directory"):
        shown.save(tmp_path / "none" / "a.html")


def test_a_live_head_answers_with_what_comes_into_view(run: Run) -> None:
    seen: list[Any] = []
    box = wb.show_head(run, 2, 1).widget(on={"view": seen.append})
    live = box.children[0]
    assert live.data["size"] == 2
    told(live, "view", [100, 140, 90, 130])
    assert live.data["view"] == [100, 140, 90, 130]
    assert live.data["exact"]
    assert live.data["query_labels"][0] == "t100"
    assert seen == [[100, 140, 90, 130]]
    told(live, "cell", [120, 100], 2)
    assert live.data["cross"] == [120, 100]
    text = box.children[1].children[0]
    assert text.data["focus"] == 120
    told(live, "view", [0, 700, 0, 700], 3)
    assert live.data["cross"] == [120, 100]
    told(text, "focus", 130)
    assert text.data["focus"] == 130
    json.dumps(live.data)


def test_a_live_wall_opens_heads_below(run: Run) -> None:
    box = wb.show_wall(run).widget()
    wall = box.children[0]
    told(wall, "select", [2, 0])
    assert wall.data["selected"] == [0, 2]
    told(wall, "open", 2)
    assert box.children[1].children[0].data["title"].endswith("head 2")
    first = box.children[1]
    told(wall, "open", 1, 2)
    assert box.children[1].children[0].data["title"].endswith("head 1")
    assert len(box.children) == 2
    assert first.comm is None, "the view that was closed still has a line to the browser"


def test_a_live_text_turns_pages(run: Run) -> None:
    live = wb.show_tokens(run, 2, 0).widget().children[0]
    told(live, "page", 0)
    assert (live.data["start"], live.data["focus"], len(live.data["labels"])) == (0, 699, 256)
    told(live, "focus", 10, 2)
    assert (live.data["start"], live.data["focus"]) == (0, 10)


def test_a_live_circuit_marks_what_is_chosen() -> None:
    live = wb.show_circuit(circuit()).widget().children[0]
    told(live, "node", "m0")
    assert live.data["selected"] == "m0"


def test_a_refused_request_says_so_in_the_title(run: Run) -> None:
    def refuse(*_: Any) -> Any:
        raise Refused("too much to ask")

    shown = wb.show_head(run, 2, 0)
    live = Shown(shown.component, shown.data, {"view": refuse}).widget().children[0]
    told(live, "view", [0, 1, 0, 1])
    assert live.data["title"] == "toy, layer 2, head 0: too much to ask"


def test_without_anywidget_one_line_says_what_to_install(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from workbench.apps.components import component

    component._widget.cache_clear()
    monkeypatch.setitem(sys.modules, "anywidget", None)
    with pytest.raises(WorkbenchError, match=r"pip install 'attention-workbench\[notebook\]'"):
        wb.show_head(run, 2, 0).widget()
