"""The home page: what a newcomer sees."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pages import open_page

from workbench.apps.screen.pages import SENTENCES, titles


def test_every_page_has_a_sentence_and_a_link(tmp_path):
    page = open_page("home", tmp_path)
    links = {link.proto.page for link in page.get("page_link")}
    assert set(SENTENCES) == set(titles())
    assert {f"{name}" for name in titles() if name != "home"} <= {link.rpartition("/")[2] for link in links}
    said = " ".join(one.value for one in page.markdown)
    for start in ("A sink is", "A retrieval head", "A circuit is"):
        assert start in said


def test_nothing_heavy_is_needed_for_the_first_page(tmp_path):
    start = f"import sys; sys.argv = ['main.py', '--store', {str(tmp_path)!r}]"
    code = f"{start}; import workbench.apps.views.home; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split()[-1:] == ["False"], done.stderr[-2000:]


def test_the_documentation_lists_the_pages():
    told = (Path(__file__).parents[3] / "docs" / "app.md").read_text(encoding="utf-8")
    for name, (title, _) in titles().items():
        assert f"**{title}** `/{'' if name == 'home' else name}` | {SENTENCES[name]} |" in told
