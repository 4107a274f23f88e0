"""What every analysis must do, whoever wrote it."""

import contextlib
import dataclasses
import inspect
import math

import numpy as np
import pandas as pd
import pytest
import torch
from fragment_checks import Fragment

from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap
from workbench.patterns.softmax import SoftmaxMap
from workbench.probes.catalogue import analyses
from workbench.probes.examples import random_rows
from workbench.results import Result, load_result

RECORDS = analyses()
BY_MAPS = [name for name, record in RECORDS.items() if record.source == "maps"]


@pytest.fixture(scope="module")
def answered():
    """Answers to the examples, made once."""
    found = {}

    def answer(name):
        if name not in found:
            found[name] = RECORDS[name](**RECORDS[name].example())
        return found[name]

    return answer


@pytest.mark.parametrize("name", RECORDS)
def test_the_example_answers_with_numbers_and_labels(name, answered):
    result = answered(name)
    if isinstance(result, torch.Tensor):
        assert result.isfinite().any()
        return
    assert isinstance(result, Result)
    assert dataclasses.is_dataclass(result)
    assert type(result).__dataclass_params__.frozen
    table = result.frame()
    assert len(table), "an empty table"
    assert len(set(table.columns)) == len(table.columns)


@pytest.mark.parametrize("name", RECORDS)
def test_the_example_is_drawn_and_saved(name, answered, tmp_path):
    result = answered(name)
    if isinstance(result, torch.Tensor):
        return
    axis = result.plot()
    assert axis.has_data()
    assert axis.get_xlabel() or axis.get_title() or axis.get_ylabel()
    axis.figure.draw_without_rendering()
    saved = load_result(result.save(tmp_path / "result"))
    pd.testing.assert_frame_equal(
        saved.frame().reset_index(drop=True).astype(str), result.frame().reset_index(drop=True).astype(str)
    )


@pytest.mark.parametrize("name", RECORDS)
def test_a_notebook_shows_the_figure_and_the_table(name, answered):
    result = answered(name)
    if isinstance(result, torch.Tensor):
        return
    html = result._repr_html_()
    shown = Fragment(html)
    assert {"svg", "table"} <= set(shown.tags), shown.text[:300]
    assert "no figure" not in shown.text
    assert not set(shown.ids) & set(Fragment(result._repr_html_()).ids), "two views in one notebook share an id"


@pytest.mark.parametrize("name", RECORDS)
def test_the_same_call_gives_the_same_numbers(name, answered):
    again = RECORDS[name](**RECORDS[name].example())
    first = answered(name)
    if isinstance(first, torch.Tensor):
        torch.testing.assert_close(again, first, equal_nan=True)
    else:
        pd.testing.assert_frame_equal(again.frame(), first.frame())


@pytest.mark.parametrize("name", RECORDS)
def test_it_is_documented(name):
    record = RECORDS[name]
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert len(inspect.getdoc(record.function) or "") > 60
    assert not record.function.__name__.startswith("_")


def captured(weights):
    """The same weights as a map that knows queries, keys and LSE alone, as a fused kernel leaves it."""
    b, h, _, k = weights.shape
    eye = torch.eye(k, dtype=weights.dtype).expand(b, h, k, k)
    return SoftmaxMap(weights.clamp(min=1e-30).log(), eye, mask=Mask(causal=True), scale=1.0)


@pytest.mark.parametrize("name", BY_MAPS)
def test_streaming_maps_answer_as_dense_ones_do(name):
    record = RECORDS[name]
    arguments = dict(record.example())
    key = next(iter(arguments))
    source = arguments[key]
    maps = _maps(source)
    if maps is None or any(m.sign == "signed" or m.shape[2] != m.shape[3] for m in maps):
        pytest.skip("the example is no square distribution")
    b, h, n, _ = maps[0].shape
    weights = [random_rows(b, h, n, seed=7 + i) for i in range(len(maps))]
    answers = []
    for make in (AttentionMap.from_dense, captured):
        made = [make(w) for w in weights]
        arguments[key] = made[0] if isinstance(source, AttentionMap) else made
        answers.append(record(**arguments))
    _same(*answers)


def _maps(source):
    if isinstance(source, AttentionMap):
        return [source]
    if isinstance(source, (list, tuple)):
        return list(source)
    return None


def _same(a, b, tolerance=1e-5):
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance, equal_nan=True)
        return
    one, two = a.frame(), b.frame()
    assert list(one.columns) == list(two.columns)
    for column in one.columns:
        if one[column].dtype.kind == "f":
            np.testing.assert_allclose(one[column], two[column], atol=tolerance, rtol=tolerance, equal_nan=True)
        else:
            assert one[column].tolist() == two[column].tolist()


@pytest.mark.parametrize("name", BY_MAPS)
def test_maps_that_are_no_attention_over_tokens_are_answered_or_refused(name):
    """Signed weights, channels: numbers that mean something, or one clear line."""
    record = RECORDS[name]
    arguments = dict(record.example())
    key = next(iter(arguments))
    signed = torch.randn(1, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tril()
    made = AttentionMap.from_dense(signed)
    for source in (made, [made, made]):
        if isinstance(arguments[key], AttentionMap) != isinstance(source, AttentionMap):
            continue
        with contextlib.suppress(WorkbenchError):
            answer = record(**{**arguments, key: source})
            assert isinstance(answer, torch.Tensor) or len(answer.frame())


def test_the_table_names_everything():
    table = RECORDS.frame()
    assert len(table) == len(RECORDS)
    assert not any(isinstance(x, float) and math.isnan(x) for x in table["null"])
