import pytest

import workbench as wb


def test_capture_keeps_what_was_asked() -> None:
    request = wb.capture(layers=[1, 2], blocks=64, reduce="max", stats=("received", "entropy"))
    assert request.layers == (1, 2)
    assert request.reduce == ("max",)
    assert request.stats == ("received", "entropy")
    assert wb.capture(layers=3).layers == (3,)
    assert wb.capture(layers="cross.0").layers == ("cross.0",)
    assert hash(request) == hash(wb.capture(layers=(1, 2), blocks=64, reduce=["max"], stats=["received", "entropy"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(stats=("entrpy",)), "no statistic 'entrpy'; known: received"),
        (dict(blocks=64, reduce="median"), "no block reduction 'median'"),
        (dict(blocks=0), "at least 1; got 0"),
        (dict(blocks=6.4), "got 6.4"),
        (dict(window=0), "window cuts a distance, in tokens, at least 1; got 0"),
        (dict(topk=True), "topk is a number of keys, at least 1; got True"),
        (dict(mass={"sink": 3}), "got 'sink': int"),
        (dict(mass={1: wb.mods.sink()}), "got 1: function"),
        (dict(layers=True), "layers names attention layers, all of them by default; got True"),
    ],
)
def test_bad_requests(arguments, message) -> None:
    with pytest.raises(wb.WorkbenchError, match=message):
        wb.capture(**arguments)
