"""Any analysis called by name: what is made for it, what is refused, what its options may be."""

from __future__ import annotations

import inspect
from typing import Any

import pandas as pd
import pytest
import torch

import workbench as wb
from workbench.errors import UnknownName, WorkbenchError
from workbench.models.protocol import Model
from workbench.pairs import Pairs
from workbench.probes.calling import (
    Wording,
    analysis_frame,
    call_analysis,
    checked,
    option_defaults,
    prepare,
    takes_pairs,
    takes_prompts,
)
from workbench.probes.catalogue import Analysis

TEXT = "When Mary and John went to the store, John gave a ring to"


@pytest.fixture(scope="module")
def model() -> Model:
    return wb.load("tiny-softmax")


@pytest.fixture(scope="module")
def pairs(model: Model) -> Pairs:
    return wb.task("induction").build(seed=0, tokenizer=model.tokenizer, n=2)


def record(name: str) -> Analysis:
    return wb.analyses()[name]


def test_a_run_captures_and_reads_what_the_analysis_needs(model: Model) -> None:
    got = call_analysis(record("sink-levels"), model, text=TEXT, options={"candidates": 2})
    run = model.run(TEXT, read=[f"blocks.{layer}.hook_resid_post" for layer in range(4)], maps=wb.capture())
    pd.testing.assert_frame_equal(got.frame(), wb.sink_levels(run, candidates=2).frame())


def test_one_side_of_pairs_is_the_clean_one_and_both_go_where_they_are_compared(model: Model, pairs: Pairs) -> None:
    got = call_analysis(record("sinks"), model, pairs=pairs, layers=[1])
    pd.testing.assert_frame_equal(got.frame(), wb.sinks(model.run(pairs.clean, maps=wb.capture(layers=[1]))).frame())
    got = call_analysis(record("recovery"), model, pairs=pairs)
    pd.testing.assert_frame_equal(got.frame(), wb.recovery(model, pairs).frame())


def test_a_model_takes_the_place_of_a_run_without_prompts(model: Model) -> None:
    options: dict[str, Any] = {"batches": 1, "sequences": 2}
    alone = call_analysis(record("head-scores"), model, options=options)
    assert alone.provenance.model == "tiny-softmax"
    assert not alone.frame().equals(call_analysis(record("head-scores"), model, text=TEXT).frame())


def test_prompts_that_are_optional_are_used_when_they_are_given(model: Model) -> None:
    suppression = record("copy-suppression")
    assert takes_prompts(suppression) == "optional"
    got = call_analysis(suppression, model, text=TEXT, options={"cause": False})
    pd.testing.assert_frame_equal(got.frame(), wb.copy_suppression(model, TEXT, cause=False).frame())


def test_layers_go_to_the_capture_or_to_the_analysis(model: Model) -> None:
    by_capture = call_analysis(record("head-scores"), model, text=TEXT, layers=[2])
    by_itself = call_analysis(record("head-scores"), model, layers=[2], options={"batches": 1, "sequences": 2})
    for result in (by_capture, by_itself):
        assert set(result.frame()["layer"]) == {2}
    with pytest.raises(WorkbenchError, match="composition captures no maps of single layers; leave out layers="):
        prepare(record("composition"), {}, layers=[1])
    with pytest.raises(WorkbenchError, match="layers= and layers=... say the same twice"):
        prepare(record("moved-tokens"), {"layers": [1]}, layers=[1])


def test_one_map_needs_one_layer(model: Model) -> None:
    got = call_analysis(record("waad"), model, text=TEXT, layers=[1])
    assert got.equal(wb.waad(model.run(TEXT, maps=wb.capture()).maps[1]))
    with pytest.raises(WorkbenchError, match="waad looks at one map: choose it with layers=, one of 0, 1, 2, 3"):
        call_analysis(record("waad"), model, text=TEXT)


def test_a_prepared_call_says_what_it_will_make() -> None:
    call = prepare(record("sinks"), {"keys": 3}, text=True)
    assert (call.made, call.captures, call.options) == (("source",), True, {"keys": 3})
    call = prepare(record("zeroable"), {"counts": 2}, pairs=True)
    assert (call.made, call.captures, call.options) == (("model", "inputs"), False, {"counts": (2,)})


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("sinks", {}, "sinks looks at prompts: give text= or pairs="),
        ("sinks", {"text": True, "pairs": True}, "sinks looks at a text or at the prompts of a task; got both"),
        ("recovery", {"text": True}, "recovery compares clean and corrupted prompts: give pairs="),
        ("retrieval-heads", {"text": True}, "retrieval-heads makes its own prompts, or needs none"),
        ("composition", {"pairs": True}, "composition makes its own prompts, or needs none"),
        ("eviction", {"text": True}, "eviction needs window: give window=..."),
        (
            "masking",
            {},
            "masking needs result, which call_analysis cannot make; call workbench.probes.retrieval.masking",
        ),
        ("sink-comparison", {"text": True}, "sink-comparison needs a, b, which call_analysis cannot make"),
        ("pixel-relevance", {}, "pixel-relevance needs cnn, images, which call_analysis cannot make"),
    ],
)
def test_calls_that_cannot_be_made_are_refused_without_a_model(name: str, given: dict[str, Any], said: str) -> None:
    with pytest.raises(WorkbenchError, match=said):
        prepare(record(name), {}, **given)


def test_refusals_name_things_as_the_caller_does() -> None:
    wording = Wording("--option {name}=...", "--text or --task", "--task", "--layer", "the command line")
    for name, given, said in (
        ("sinks", {}, "give --text or --task"),
        ("eviction", {"text": True}, "give --option window=..."),
        ("recovery", {"text": True}, "give --task"),
        ("masking", {}, "which the command line cannot make"),
    ):
        with pytest.raises(WorkbenchError, match=said):
            prepare(record(name), {}, **given, wording=wording)


@pytest.mark.parametrize(
    ("name", "option", "value", "want"),
    [
        ("retrieval-heads", "lengths", 128, 128),
        ("retrieval-heads", "lengths", [128, 192], (128, 192)),
        ("token-pruning", "keep", 0.5, (0.5,)),
        ("token-pruning", "keep", 1, (1,)),
        ("layer-sharing-replaced", "exchanges", [1, 0], ((1, 0),)),
        ("layer-sharing-replaced", "exchanges", [[1, 0], [2, 1]], ((1, 0), (2, 1))),
        ("composition", "channels", "q", ("q",)),
        ("sinks", "keys", None, None),
        ("sinks", "epsilon", 1, 1),
    ],
)
def test_lists_are_tuples_and_one_item_a_sequence_of_one(name: str, option: str, value: Any, want: Any) -> None:
    assert checked(record(name), option, value) == want
    assert type(checked(record(name), option, value)) is type(want)


@pytest.mark.parametrize(
    ("name", "option", "value", "said"),
    [
        ("sinks", "epsilon", "high", "sinks, option epsilon: Input should be a valid number"),
        ("sinks", "keys", True, "option keys: Input should be a valid integer"),
        ("sinks", "mask", 3, "option mask: Input should be an instance of Mask"),
        (
            "retrieval-heads",
            "lengths",
            [128, "x"],
            r"option lengths: Input should be a valid integer; got \(128, 'x'\)",
        ),
        ("retrieval-heads", "prompts", "x", "option prompts"),
        ("block-rank", "prompts", {}, "option prompts: Input should be an instance of Documents"),
        ("token-pruning", "metric", 3, "option metric: Input should be a valid string"),
    ],
)
def test_values_of_another_type_are_refused(name: str, option: str, value: Any, said: str) -> None:
    with pytest.raises(WorkbenchError, match=said):
        checked(record(name), option, value)


def test_every_default_is_a_value_of_its_option() -> None:
    for each in wb.analyses().values():
        for option, default in option_defaults(each).items():
            if default is not inspect.Parameter.empty:
                assert checked(each, option, default) == default, (each.name, option)


def test_an_option_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(UnknownName, match="no option of sinks 'epsilom'; known: epsilon, .*nearest: epsilon"):
        prepare(record("sinks"), {"epsilom": 1}, text=True)
    with pytest.raises(
        UnknownName, match="no option of sink-removal 'levels'"
    ):  # its **levels are no option of that name
        prepare(record("sink-removal"), {"levels": 1}, text=True)


def test_what_prompts_an_analysis_takes() -> None:
    want = {
        "sinks": ("required", False),
        "waad": ("required", False),
        "zeroable": ("required", False),
        "recovery": ("required", True),
        "head-scores": ("optional", False),
        "copy-suppression": ("optional", False),
        "retrieval-heads": ("no", False),
        "composition": ("no", False),
    }
    assert {name: (takes_prompts(record(name)), takes_pairs(record(name))) for name in want} == want


def test_a_tensor_is_a_table_with_an_axis_per_column() -> None:
    frame = analysis_frame(torch.tensor([[1.0, 2.0]]))
    assert frame.to_dict("list") == {"axis 0": [0, 0], "axis 1": [0, 1], "value": [1.0, 2.0]}
