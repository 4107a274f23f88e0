"""The page of variants: the same input goes through both, maps are checked against outputs, what is not shared is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pages import open_page, python_of, settled

import workbench as wb
from workbench.apps.work_variants import common_input, compared, comparison_from, passed
from workbench.errors import UnknownName, WorkbenchError
from workbench.results import load_result


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.mark.parametrize("name", ["multi-head-attention", "retention", "mamba-2", "swin-attention", "deltanet"])
def test_output_is_the_map_times_the_values(name: str) -> None:
    found = passed(name, tokens=36)
    assert found.shared
    assert found.error is not None
    assert found.error < 1e-5 * float(found.output.abs().max())
    assert found.output.shape == (1, 4, 36, 8)


def test_softmax_gets_the_common_input() -> None:
    given = common_input(3, 16)
    weights = (
        (given["q"] @ given["k"].transpose(-1, -2) * 8**-0.5)
        .masked_fill(torch.ones(16, 16).triu(1).bool(), -torch.inf)
        .softmax(-1)
    )
    found = passed("multi-head-attention", 3, 16, causal=True)
    assert torch.allclose(found.output, weights @ given["v"], atol=1e-5)
    assert torch.allclose(found.amap.rows(0, 16), weights, atol=1e-6)
    assert not torch.allclose(passed("multi-head-attention", 4, 16, causal=True).output, found.output, atol=1e-2)


def test_parameters_follow_from_the_seed_alone() -> None:
    torch.manual_seed(99)
    first = passed("mamba-2", 0, 16).output
    torch.manual_seed(5)
    assert torch.equal(passed("mamba-2", 0, 16).output, first)


def test_what_cannot_take_it_gets_its_own_example() -> None:
    ahead = passed("swin-attention", tokens=36, causal=True)
    assert not ahead.shared
    apart = next(record.name for record in wb.variants() if record.recipe is None)
    assert not passed(apart, tokens=36).shared


def test_why_an_identity_is_not_checked() -> None:
    assert "linear in no argument" in passed("mlp-mixer", tokens=16).unchecked
    assert "makes its values itself" in passed("cascaded-group-attention", tokens=16).unchecked
    assert passed("multi-head-attention", tokens=16).unchecked == ""


def test_mistakes_are_said() -> None:
    with pytest.raises(WorkbenchError, match="from 4 to 512; got 3"):
        passed("retention", tokens=3)
    with pytest.raises(UnknownName, match="retention"):
        passed("retension")


def test_difference_is_that_of_the_outputs_and_only_for_one_input() -> None:
    same = compared("retention", "retention", 0, 16)
    assert (same.difference, same.relative) == (0.0, 0.0)
    assert same.names == ("retention", "retention (again)")
    found = compared("retention", "multi-head-attention", 0, 16)
    gap = found.outputs["multi-head-attention"] - found.outputs["retention"]
    assert found.difference == pytest.approx(float(gap.abs().max()))
    assert found.relative == pytest.approx(float(gap.norm() / found.outputs["retention"].norm()))
    apart = next(record.name for record in wb.variants() if record.recipe is None)
    other = compared("retention", apart, 0, 16)
    assert other.difference is None
    assert other.facts[apart]["shared"] is False


def test_both_are_causal_only_if_both_can_be() -> None:
    found = compared("multi-head-attention", "swin-attention", 0, 16)
    assert float(found.maps["multi-head-attention"].triu(1).abs().max()) > 0
    causal = compared("multi-head-attention", "retention", 0, 16)
    assert float(causal.maps["multi-head-attention"].triu(1).abs().max()) == 0


def test_a_comparison_comes_back_from_its_folder(tmp_path: Path) -> None:
    found = compared("retention", "multi-head-attention", 0, 16)
    back = comparison_from(load_result(found.save(tmp_path / "found")))
    assert back.frame().equals(found.frame())
    assert torch.equal(back.maps["retention"], found.maps["retention"])
    assert len(back.numbers()) == 4 * 16 * 8
    assert len(back.plot().get_lines()) == 2


def test_the_page_compares_two_variants(store: Path) -> None:
    page = open_page("variants", store, variant="retention", against="multi-head-attention", tokens="16")
    shown = compared("retention", "multi-head-attention", 0, 16)
    metric = {one.label: one.value for one in page.metric}
    assert metric["Difference of outputs"] == f"{shown.relative:.1%}"
    captions = [one.value for one in page.caption]
    assert sum("map × values differ by" in one for one in captions) == 2
    table = next(one.value for one in page.dataframe if "retention" in one.value.columns and "" in one.value.columns)
    assert table.set_index("").loc["family", "retention"] == "linear"
    assert len(page.get("bidi_component")) == 3


def test_another_variant_stands_in_the_address(store: Path) -> None:
    page = open_page("variants", store, variant="retention", against="multi-head-attention", tokens="16")
    page.selectbox(key="against").set_value("deltanet")
    page = settled(page.run())
    assert page.query_params["against"] == "deltanet"
    assert page.metric[0].value == f"{compared('retention', 'deltanet', 0, 16).relative:.1%}"


def test_inputs_that_differ_are_said(store: Path) -> None:
    apart = next(record.name for record in wb.variants() if record.recipe is None)
    page = open_page("variants", store, variant="retention", against=apart, tokens="16")
    assert any("its own example" in one.value for one in page.info)
    assert any("not comparable" in one.value for one in page.caption)
    assert not page.metric


def test_names_that_are_none_are_said(store: Path) -> None:
    open_page("variants", store, against="retention", tokens="16")
    page = open_page("variants", store, variant="<b>attention", against="retention", tokens="16")
    assert any("no variant in the address" in one.value for one in page.warning)


def test_its_python_runs(store: Path) -> None:
    page = open_page("variants", store, variant="retention", against="multi-head-attention", tokens="16")
    found = python_of(page)
    assert len(found) == 5
    for code in found:
        exec(code, {})
