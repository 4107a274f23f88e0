"""Pages of features as HTML: escaped, without scripts and without anything from elsewhere."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from workbench.probes.features.feature_pages import Example, FeatureDashboard, FeaturePage

_SHOWN = 10
"""Pages in a notebook."""
_SOURCES = 40
"""Source tokens that are drawn, the last ones before the feature's."""
_ON, _OFF = "31,111,139", "193,80,46"
_STYLE = """
.wbf{color:inherit;font:14px/1.5 system-ui,sans-serif;padding:8px 12px}
.wbf section{border-top:1px solid color-mix(in srgb,currentColor 20%,transparent);padding:10px 0}
.wbf h3{margin:0 0 4px;font-size:16px}
.wbf .row{font-family:ui-monospace,monospace;white-space:pre-wrap;margin:1px 0;line-height:1.7}
.wbf .row b{font-weight:600;outline:1px solid currentColor}
.wbf .no{opacity:.75;font-family:system-ui,sans-serif;font-size:12px}
.wbf .cols{display:flex;flex-wrap:wrap;gap:24px;margin:6px 0}
.wbf table{border-collapse:collapse;font-size:12px}
.wbf td{padding:0 8px 0 0;text-align:left}
.wbf td.n{text-align:right;font-variant-numeric:tabular-nums}
.wbf .group{margin-top:6px;opacity:.75;font-size:12px}
"""


def document(board: FeatureDashboard) -> str:
    """A whole HTML file."""
    title = f"features of {', '.join(board.writes)}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title></head>'
        f"<body>{fragment(board, len(board.pages))}</body></html>\n"
    )


def fragment(board: FeatureDashboard, pages: int = _SHOWN) -> str:
    """The first ``pages`` pages, for a notebook."""
    head = (
        f"<b>{escape(board.kind)}</b> coder of {escape(', '.join(board.reads))}"
        f"{'' if board.reads == board.writes else ' to ' + escape(', '.join(board.writes))}, {board.features:,} features; "
        f"{board.tokens:,} positions of {board.texts:,} texts of {escape(board.provenance.model)}"
    )
    notes = "".join(f'<p class="no">{escape(note)}</p>' for note in board.notes)
    more = f"<p>first {pages} of {len(board.pages)} pages shown</p>" if len(board.pages) > pages else ""
    body = "".join(_page(page) for page in board.pages[:pages])
    return f'<div class="wbf"><style>{_STYLE}</style><p>{head}</p>{notes}{more}{body}</div>'


def shown(token: str) -> str:
    """A token as it is read: markers of spaces become spaces, line ends are drawn."""
    return token.replace("Ġ", " ").replace("▁", " ").replace("Ċ", "↵").replace("\n", "↵").replace("\t", "⇥")


def _page(page: FeaturePage) -> str:
    blocks = [_bars(page.histogram, page.largest)]
    if page.raises:
        blocks += [_table("raises", page.raises), _table("lowers", page.lowers)]
    if len(page.heads):
        order = page.heads.argsort(descending=True)[:8].tolist()
        blocks.append(_table("heads", [(str(h), float(page.heads[h])) for h in order]))
    if page.goes_with:
        blocks.append(_table("goes with", [(str(other), r) for other, r in page.goes_with]))
    groups = []
    for name in page.groups:
        said = "strongest" if name == "top" else f"drawn from {name} of the largest activation"
        rows = "".join(_example(example, page.largest) for example in page.group(name))
        groups.append(f'<div class="group">{escape(said)}</div>{rows}')
    title = f"feature {page.feature}"
    line = f"active at {page.density:.3%} of positions, mean {page.mean:.3g} there, largest {page.largest:.3g}"
    if not page.examples:
        groups = ['<p class="no">never active on these texts</p>']
    return (
        f'<section><h3>{title}</h3><div class="no">{line}</div><div class="cols">{"".join(blocks)}</div>'
        f"{''.join(groups)}</section>"
    )


def _example(example: Example, largest: float) -> str:
    spans = []
    for i, (token, value) in enumerate(zip(example.tokens, example.values, strict=True)):
        text, share = escape(shown(token)), max(0.0, value) / (largest or 1.0)
        if i == example.at:
            text = f"<b>{text}</b>"
        style = f' style="background:rgba({_ON},{min(share, 1.0):.3f})"' if value > 0 else ""
        spans.append(f'<span{style} title="{value:.4g}">{text}</span>')
    place = f'<span class="no">{example.activation:.3g} text {example.text}:{example.position} </span>'
    return f'<div class="row">{place}{"".join(spans)}</div>{_sources(example)}'


def _sources(example: Example) -> str:
    if not len(example.sources):
        return ""
    first = max(0, example.position + 1 - _SOURCES)
    values = example.sources[first : example.position + 1].tolist()
    size = max((abs(v) for v in values), default=0.0) or 1.0
    spans = [
        f'<span title="{value:+.4g}" style="background:rgba({_ON if value >= 0 else _OFF},{abs(value) / size:.3f})">'
        f"{escape(shown(token))}</span>"
        for token, value in zip(example.source_tokens[first:], values, strict=False)
    ]
    return f'<div class="row"><span class="no">from </span>{"".join(spans)}</div>'


def _table(title: str, rows: object) -> str:
    assert isinstance(rows, list | tuple)
    body = "".join(
        f'<tr><td>{escape(shown(str(name)))}</td><td class="n">{value:.3g}</td></tr>' for name, value in rows
    )
    return f'<div><div class="no">{escape(title)}</div><table>{body}</table></div>'


def _bars(counts: Tensor, largest: float) -> str:
    """A histogram of square roots of counts, so that rare strong activations can be seen."""
    roots = counts.double().sqrt()
    heights = (56 * roots / roots.max().clamp(min=1e-12)).tolist()
    width = 200 / max(len(heights), 1)
    bars = "".join(
        f'<rect x="{i * width:.1f}" y="{60 - h:.1f}" width="{max(width - 1, 1):.1f}" height="{h:.1f}" fill="rgb({_ON})">'
        f"<title>{int(n)}</title></rect>"
        for i, (h, n) in enumerate(zip(heights, counts.tolist(), strict=True))
    )
    end = f'<text x="200" y="74" font-size="10" text-anchor="end">{largest:.3g}</text>'
    label = f'<text x="0" y="74" font-size="10">0</text>{end}'
    return f'<div><div class="no">activations (square root of counts)</div><svg width="204" height="78">{bars}{label}</svg></div>'
