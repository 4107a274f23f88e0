"""What there is to see of a feature: when it is active, what it says, and what it goes with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.errors import UnknownName, WorkbenchError
from workbench.results import Result, axis
from workbench.run import Provenance

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Example:
    """A token at which a feature is active: ``position`` of text ``text`` (real tokens count from 0), and the tokens around it.

    ``group``: ``top``, or the part of the range from 0 to the largest activation that it was drawn from (``0-20%`` ...).
    ``tokens`` and ``values`` are the window, of which ``tokens[at]`` is the token itself. ``sources`` ``[T]``, where it was
    asked for, is what each token of the text adds to the pre-activation, for texts that begin with ``source_tokens``.
    """

    group: str
    text: int
    position: int
    activation: float
    at: int
    tokens: tuple[str, ...]
    values: tuple[float, ...]
    sources: Tensor = field(default_factory=lambda: torch.zeros(0))
    source_tokens: tuple[str, ...] = ()

    @property
    def token(self) -> str:
        return self.tokens[self.at]


@dataclass(frozen=True)
class FeaturePage:
    """One feature. ``density``: share of positions where it is active; ``mean``: where it is; ``largest``: its largest
    activation. ``histogram`` ``[bins]``: positions by activation, in equal parts from 0 to the largest. ``raises`` and
    ``lowers``: tokens by the change of their logit on the direct path. ``heads`` ``[H]``: share of each head in the decoder
    row (coders of z). ``goes_with``: features by the correlation of their activations over all positions."""

    feature: int
    density: float
    mean: float
    largest: float
    histogram: Tensor
    examples: tuple[Example, ...]
    raises: tuple[tuple[str, float], ...] = ()
    lowers: tuple[tuple[str, float], ...] = ()
    heads: Tensor = field(default_factory=lambda: torch.zeros(0))
    goes_with: tuple[tuple[int, float], ...] = ()

    def group(self, name: str) -> tuple[Example, ...]:
        """The examples of one group, strongest first."""
        return tuple(example for example in self.examples if example.group == name)

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(example.group for example in self.examples))


@dataclass(frozen=True)
class FeatureDashboard(Result):
    """Pages of some features of a coder, from ``tokens`` positions of ``texts`` texts. ``notes`` say what could not be had."""

    kind: str
    features: int
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    texts: int
    tokens: int
    pages: tuple[FeaturePage, ...]
    notes: tuple[str, ...] = ()
    provenance: Provenance = field(default_factory=lambda: Provenance("unknown"))

    def page(self, feature: int) -> FeaturePage:
        """The page of a feature; unknown ones list those there are."""
        for page in self.pages:
            if page.feature == feature:
                return page
        raise UnknownName("page of feature", feature, [page.feature for page in self.pages])

    def frame(self) -> pd.DataFrame:
        """One row per feature: ``feature, density, mean, largest, top_token, raises, lowers, head, head_share, goes_with``."""
        import pandas as pd

        rows = []
        for page in self.pages:
            best = int(page.heads.argmax()) if len(page.heads) else -1
            rows.append(
                {
                    "feature": page.feature,
                    "density": page.density,
                    "mean": page.mean,
                    "largest": page.largest,
                    "top_token": page.examples[0].token if page.examples else "",
                    "raises": " ".join(token for token, _ in page.raises[:5]),
                    "lowers": " ".join(token for token, _ in page.lowers[:5]),
                    "head": best,
                    "head_share": float(page.heads[best]) if best >= 0 else float("nan"),
                    "goes_with": " ".join(str(other) for other, _ in page.goes_with),
                }
            )
        return pd.DataFrame(rows)

    def examples(self) -> pd.DataFrame:
        """One row per example: ``feature, group, text, position, token, activation, window``."""
        import pandas as pd

        columns = ("feature", "group", "text", "position", "token", "activation", "window")
        rows = [
            (page.feature, one.group, one.text, one.position, one.token, one.activation, "".join(one.tokens))
            for page in self.pages
            for one in page.examples
        ]
        return pd.DataFrame(rows, columns=list(columns))

    def plot(self, ax: Axes | None = None, *, feature: int | None = None) -> Axes:
        """Histogram of the activations of one feature, the first by default."""
        if not self.pages:
            raise WorkbenchError("this dashboard has no pages")
        page = self.pages[0] if feature is None else self.page(feature)
        ax = axis(ax, 5.0, 3.2)
        edges = torch.linspace(0, page.largest or 1.0, len(page.histogram) + 1)
        ax.stairs(page.histogram.numpy(), edges.numpy(), fill=True)
        title = f"feature {page.feature}: active at {page.density:.2%} of {self.tokens:,} positions"
        ax.set(xlabel="activation", ylabel="positions", yscale="symlog", title=title)
        return ax

    def html(self) -> str:
        """All pages as one self-contained document: no scripts, nothing from elsewhere."""
        from workbench.probes.features.page_html import document

        return document(self)

    def write_html(self, path: str | Path) -> Path:
        """Write ``html()`` to a file, under a temporary name first."""
        import os

        path = Path(path)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            part.write_text(self.html(), encoding="utf-8")
            part.replace(path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise WorkbenchError(f"cannot write {path}: {error.strerror or error}") from error
        return path

    def _repr_html_(self) -> str:
        from workbench.probes.features.page_html import fragment

        return fragment(self)
