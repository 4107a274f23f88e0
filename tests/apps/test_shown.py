"""Images of the app's figures: what stands on their axes is letters, never a formula that nobody typeset."""

from __future__ import annotations

import re

import numpy as np
import pytest
from fragment_checks import powers_of_ten

from workbench.apps.screen import shown
from workbench.apps.screen.charts import draw_bars


def words(svg: bytes) -> str:
    return " ".join(re.findall(r"<text[^>]*>([^<]*)</text>", svg.decode()))


def test_powers_of_ten_are_letters_in_every_image():
    said = words(shown._picture(powers_of_ten, "svg", "#000000"))
    assert "math" not in said
    for power in ("10⁻²", "10⁰", "-10²"):
        assert power in said, power


@pytest.mark.parametrize("series", [1, 4])
def test_the_names_of_bars_stand_beside_the_bars(series):
    ax = draw_bars(["a", "b"], {f"bar {i}": np.ones(2) for i in range(series)}, unit="share")
    ax.figure.canvas.draw()
    legend = ax.get_legend()
    assert (legend is None) == (series == 1)
    if legend is not None:
        assert legend.get_window_extent().y0 >= ax.get_window_extent().y1
