"""The capture page: what is filled in, what it will take, and the run that comes of it."""

from __future__ import annotations

from pages import open_page, python_of, settled

import workbench as wb
from workbench.apps.screen import predict


def pressed(page):
    next(button for button in page.button if button.label == "Capture").click()
    return settled(page.run())


def metrics(page):
    return {one.label: one.value for one in page.metric}


def test_a_text_is_captured_and_the_output_stays_the_same(tmp_path):
    page = open_page("capture", tmp_path)
    page.text_area(key="captured text").set_value("When Mary and John went to the store, John gave a ring to")
    page = pressed(page.run())
    assert metrics(page)["Logit difference"] == "0"
    exec(python_of(page)[0], names := {})
    assert names["run"].tokens.labels[0][1:4] == ("When", "Mary", "and")
    assert page.session_state["run"] in str(names["run"].maps) or len(wb.JobStore(tmp_path / "app").keys()) == 1


def test_bytes_are_predicted_before_and_are_about_what_is_written(tmp_path):
    page = open_page("capture", tmp_path, source="filler", tokens="1500")
    assert metrics(page)["Tokens"] == "1,500"
    page = pressed(page)
    store = wb.JobStore(tmp_path / "app")
    (key,) = store.keys()
    written = sum(size for size, _ in store.provenance(key)["files"].values())
    foretold = predict.disk(predict.sizes("tiny-softmax"), 1501)
    assert 0.9 < foretold / written < 1.1


def test_mistakes_are_one_line_and_nothing_runs(tmp_path):
    page = open_page("capture", tmp_path)
    page.text_area(key="captured text").set_value("   ")
    page.run()
    assert "the prompt is empty" in page.error[0].value
    assert next(button for button in page.button if button.label == "Capture").disabled
    page = open_page("capture", tmp_path, model="compiled-dyck", source="task", task="ioi")
    page = pressed(page)
    assert page.error
    assert not wb.JobStore(tmp_path / "app").keys()


def test_models_without_text_take_a_made_image(tmp_path):
    page = pressed(open_page("capture", tmp_path, model="tiny-vit", source="image", image="3"))
    assert metrics(page)["Tokens"] == "64"
    assert metrics(page)["Logit difference"] == "0"
