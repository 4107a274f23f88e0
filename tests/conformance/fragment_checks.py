"""What every piece of HTML that a notebook shows must be."""

import re
from html.parser import HTMLParser

from matplotlib.axes import Axes

from workbench.results import axis

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
REFERENCES = {"src", "srcset", "href", "xlink:href", "action", "poster", "data", "background"}
FOREIGN = {"link", "iframe", "object", "embed", "base", "meta"}
LARGEST = 2_000_000


class Fragment(HTMLParser):
    """A fragment with every element closed, no id twice, and nothing that is fetched from elsewhere or runs on an event."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open, f"not closed: {self.open}"
        assert len(set(self.ids)) == len(self.ids), "an id occurs twice"
        assert len(html) < LARGEST

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag not in FOREIGN, tag
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), (tag, name)
            if name in REFERENCES:
                assert value.startswith(("#", "data:image/")), (tag, name, value[:80])
            if name == "id":
                self.ids.append(value)
            self._style(value or "")

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data):
        inside = self.open[-1] if self.open else ""
        if inside == "style":
            self._style(data)
        elif inside != "script":
            self.text += data + "\n"

    def _style(self, text):
        assert "@import" not in text
        for target in re.findall(r"url\(\s*['\"]?([^)]*)", text):
            assert target.startswith(("#", "data:image/")), target[:80]


def powers_of_ten() -> Axes:
    """Axes whose ticks are powers of ten, with a sign on one side."""
    ax = axis(None)
    ax.plot([0.001, 1, 300], [-100, 0, 100])
    ax.set_xscale("log")
    ax.set_yscale("symlog")
    return ax
