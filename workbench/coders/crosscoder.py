"""Whose are the features of a crosscoder? Norms of their decoders, part by part.

A crosscoder reads several places side by side, two layers or two models (Lindsey et al. 2024, "Sparse Crosscoders for Cross-Layer
Features and Model Diffing"). With d_p the part of a feature's decoder that writes into part p,

    share_p = |d_p| / sum over p' of |d_p'|

A feature of both models has a share near 1/2 in each, one that only one model has near 1 there and near 0 in the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.coders.coder import Coder
from workbench.errors import Refused, WorkbenchError
from workbench.results import Result, axis

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

EXCLUSIVE = 0.9
"""Share from which a feature counts as one part's own."""


@dataclass(frozen=True)
class CrosscoderNorms(Result):
    """``norms`` and ``shares`` ``[F, P]`` of the P parts; shares are NaN for features that write nothing. ``cosines`` ``[F]`` are
    between the first two parts of the decoder, NaN where their widths differ or one of them is 0. ``parts`` names the parts."""

    norms: Tensor
    shares: Tensor
    cosines: Tensor
    parts: tuple[str, ...]

    @property
    def kinds(self) -> list[str]:
        """Per feature: ``shared`` (every part has at least half of an even share), ``only <part>`` (a share of 0.9 or more),
        ``between`` or ``empty``."""
        largest, at = self.shares.max(1)
        shared = self.shares.amin(1) >= 0.5 / len(self.parts)
        found = []
        for share, part, both in zip(largest.tolist(), at.tolist(), shared.tolist(), strict=True):
            own = f"only {self.parts[part]}" if share >= EXCLUSIVE else "shared" if both else "between"
            found.append("empty" if share != share else own)
        return found

    def frame(self) -> pd.DataFrame:
        """Columns feature, kind, cosine, and norm and share of every part."""
        import pandas as pd

        columns: dict[str, object] = {
            "feature": range(len(self.norms)),
            "kind": self.kinds,
            "cosine": self.cosines.tolist(),
        }
        for i, part in enumerate(self.parts):
            columns[f"norm {part}"] = self.norms[:, i].tolist()
            columns[f"share {part}"] = self.shares[:, i].tolist()
        return pd.DataFrame(columns)

    def plot(self, ax: Axes | None = None) -> Axes:
        """How many features have which share in the last part; with more than two parts one line per part."""
        ax = axis(ax)
        chosen = range(len(self.parts)) if len(self.parts) > 2 else [len(self.parts) - 1]
        for i in chosen:
            values = self.shares[:, i]
            values = values[~values.isnan()]
            fill = len(self.parts) == 2
            ax.hist(
                values.tolist(), bins=40, range=(0, 1), histtype="stepfilled" if fill else "step", label=self.parts[i]
            )
        where = f" in {self.parts[-1]}" if len(self.parts) == 2 else ""
        ax.set(xlabel=f"share of the decoder's norm{where}", ylabel="features", title="Shared and exclusive features")
        if len(self.parts) > 2:
            ax.legend()
        return ax


@torch.no_grad()
def relative_norms(
    coder: Coder, *, scales: Sequence[float] | Tensor | None = None, parts: Sequence[str] | None = None
) -> CrosscoderNorms:
    """Decoder norms of a crosscoder, part by part.

    ``scales`` ``[P]``: sizes of the parts' activations, by which norms are divided, such as the mean norm of their rows; two
    models whose activations differ in size have no even shares without it. ``parts`` names the parts, by default the sites
    that the coder writes. Refuses coders of one part.
    """
    widths = coder.writes
    if len(widths) < 2:
        raise Refused("a coder of one part has nothing to compare; crosscoders have several: wb.Crosscoder")
    if parts is None:
        told = coder.about.get("writes", coder.about.get("reads"))
        fits = isinstance(told, list | tuple) and len(told) == len(widths)
        parts = [str(name) for name in told] if fits and told is not None else [f"part {i}" for i in range(len(widths))]
    names = tuple(parts)
    if len(names) != len(widths) or len(set(names)) != len(names):
        raise WorkbenchError(f"parts are {len(widths)} different names; got {list(names)}")
    pieces = [piece.double() for piece in coder.W_dec.detach().split(list(widths), 1)]
    norms = torch.stack([piece.norm(dim=1) for piece in pieces], 1)
    if scales is not None:
        sizes = torch.as_tensor(scales, dtype=torch.float64)
        if tuple(sizes.shape) != (len(widths),) or not bool((sizes > 0).all()):
            raise WorkbenchError(f"scales are {len(widths)} numbers above 0; got {sizes.tolist()}")
        norms = norms / sizes.to(norms.device)
    total = norms.sum(1, keepdim=True)
    shares = torch.where(total > 0, norms / total, torch.nan)
    cosines = torch.full((len(norms),), float("nan"), dtype=torch.float64, device=norms.device)
    if widths[0] == widths[1]:
        product = pieces[0].norm(dim=1) * pieces[1].norm(dim=1)
        cosines = torch.where(product > 0, (pieces[0] * pieces[1]).sum(1) / product, torch.nan)
    return CrosscoderNorms(norms.cpu(), shares.cpu(), cosines.cpu(), names)
