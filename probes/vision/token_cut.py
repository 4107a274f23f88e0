"""Which patches are the object, without labels?

TokenCut (Wang et al., arXiv 2202.11539; checked against the authors' `ncut`) cuts the graph of patches in two. Edges between
patches with features f (the keys of the last layer of a self-supervised encoder) are

    E_ij = 1 if cos(f_i, f_j) > tau, else eps,     tau = .2, eps = 1e-5,     D = diag(sum_j E_ij)

and the cut is the second smallest solution of (D - E) x = lambda D x, split at mean(x). The side that holds argmax |x| is the
object; its connected component with that patch is the mask, whose bounding box is the answer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.errors import UnknownName, WorkbenchError
from workbench.probes.catalogue import Analysis
from workbench.probes.vision.grid import Grid
from workbench.results import Result, axis
from workbench.run import Provenance, Run
from workbench.sites import Site

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

ONE_PIECE = "all pairs of patches are alike (or none is), so the graph has no cut that is better than another"


@dataclass(frozen=True)
class TokenCut(Result):
    """``vector`` ``[B, N]``: the second eigenvector, positive on the object's side; ``side`` ``[B, rows, cols]`` is that side,
    ``mask`` its component with the largest entry, ``box`` ``[B, 4]`` top, left, bottom, right in pixels (exclusive; NaN without
    a cut).

    ``cut`` ``[B]`` is the eigenvalue (0: two pieces without edges between them, 1: no structure). ``null`` ``[R, B]`` is how
    much of the object's side one component would hold if the same features lay on shuffled patches, to compare with
    ``together`` ``[B]``. ``undefined`` names images without a cut.
    """

    vector: Tensor
    side: Tensor
    mask: Tensor
    box: Tensor
    cut: Tensor
    together: Tensor
    null: Tensor
    grid: Grid
    undefined: dict[str, str] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=lambda: Provenance("features"))

    def frame(self) -> pd.DataFrame:
        """One row per image: ``image, top, left, bottom, right`` (pixels), ``patches`` of the mask, ``cut``, ``together`` (share
        of the object's side in the mask) and ``together_null``, the same with shuffled patches, with its 95th percentile."""
        import pandas as pd

        sides = dict(zip(("top", "left", "bottom", "right"), self.box.T.numpy(), strict=True))
        return pd.DataFrame(
            {
                "image": range(len(self.box)),
                **sides,
                "patches": self.mask.flatten(1).sum(1).numpy(),
                "cut": self.cut.numpy(),
                "together": self.together.numpy(),
                "together_null": self.null.mean(0).numpy(),
                "together_null_95": self.null.quantile(0.95, dim=0).numpy(),
            }
        )

    def overlap(self, truth: Tensor, *, draws: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Intersection over union with true masks ``[B, ...]``, ``[B]``; and of the same masks rolled to ``draws`` random places
        of the image, ``[draws, B]``. ``truth`` is of patches or pixels; a patch counts if half of it is covered."""
        wanted = (self.grid.covered(truth) >= 0.5).view(self.mask.shape)
        generator = torch.Generator().manual_seed(seed)
        down = torch.randint(self.grid.rows, (draws,), generator=generator).tolist()
        right = torch.randint(self.grid.cols, (draws,), generator=generator).tolist()
        moved = [self.mask.roll(by, (1, 2)) for by in zip(down, right, strict=True)]
        return _iou(self.mask, wanted), torch.stack([_iou(mask, wanted) for mask in moved])

    def plot(self, ax: Axes | None = None, image: int = 0) -> Axes:
        """The eigenvector of one image where its patches lie, and the box."""
        from matplotlib.patches import Rectangle

        if not 0 <= image < len(self.box):
            raise UnknownName("image", image, range(len(self.box)))
        ax = axis(ax, 4.0, 4.0)
        height, width = self.grid.size
        values = self.grid.image(self.vector[image]).numpy()
        ax.imshow(values, extent=(0, width, height, 0), cmap="coolwarm", interpolation="nearest")
        top, left, bottom, right = self.box[image].tolist()
        if top == top:
            ax.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor="black", linewidth=2))
        ax.set(xlabel="pixels", ylabel="pixels", title=f"TokenCut\n{self.provenance.model}")
        return ax


@torch.no_grad()
def token_cut(
    features: Tensor | Run, grid: Grid, *, tau: float = 0.2, eps: float = 1e-5, draws: int = 64, seed: int = 0
) -> TokenCut:
    """The object of each image, from features of its patches.

    ``features``: ``[B, N, F]``, one vector per patch, or a run that read the keys of a layer (``hook_k``, else
    ``hook_rot_k``; the last of those read), whose heads are joined. ``draws`` shufflings of the patches make the null. The
    graph is N x N and solved whole, as published: some thousand patches at most.
    """
    provenance = features.provenance if isinstance(features, Run) else Provenance("features")
    values = key_features(features, grid) if isinstance(features, Run) else features
    if values.ndim != 3 or values.shape[1] != grid.patches:
        raise WorkbenchError(f"features are [B, {grid.patches}, F], one vector per patch; got {list(values.shape)}")
    if not -1 < tau < 1 or not 0 < eps < 1:
        raise WorkbenchError(f"tau is a cosine and eps a small weight of the missing edges; got {tau!r} and {eps!r}")
    generator = torch.Generator().manual_seed(seed)
    vectors, sides, masks, boxes, cuts, null, undefined = [], [], [], [], [], [], {}
    for image, each in enumerate(values.detach().cpu().double()):
        vector, value = _second(each, tau, eps)
        if vector is None:
            undefined[f"image {image}"] = ONE_PIECE
            vector = torch.full((grid.patches,), float("nan"), dtype=torch.float64)
        side = vector > vector.mean()
        seeds = int(vector.abs().nan_to_num().argmax())
        if not side[seeds] and not vector.isnan().any():
            vector, side = -vector, ~side
        mask = _component(side, seeds, grid)
        orders = [torch.randperm(grid.patches, generator=generator) for _ in range(draws)]
        null.append(torch.stack([_held(_component(side[o], int(o.argsort()[seeds]), grid), side) for o in orders]))
        vectors.append(vector)
        sides.append(side.view(grid.rows, grid.cols))
        masks.append(mask)
        boxes.append(_box(mask, grid))
        cuts.append(value)
    mask, side = torch.stack(masks), torch.stack(sides)
    together = torch.stack([_held(m, s) for m, s in zip(mask, side, strict=True)])
    cut = torch.tensor(cuts, dtype=torch.float64)
    return TokenCut(
        torch.stack(vectors),
        side,
        mask,
        torch.stack(boxes),
        cut,
        together,
        torch.stack(null, 1),
        grid,
        undefined,
        provenance,
    )


def key_features(run: Run, grid: Grid, layer: int | None = None) -> Tensor:
    """Keys of the patches, heads side by side, ``[B, N, G * E]``: of one layer, or of the last one that the run has read."""
    found: dict[int, Site] = {}
    for site in map(Site.parse, run.acts):
        if site.kind in ("k", "rot_k") and site.head is None and site.stack == grid.stack and site.layer is not None:
            better = site.layer not in found or site.kind == "k"
            found[site.layer] = site if better else found[site.layer]
    stack = f"{grid.stack}." if grid.stack else ""
    if not found or (layer is not None and layer not in found):
        raise WorkbenchError(
            f"this run read no keys{'' if layer is None else f' of layer {layer}'}; run the model with "
            f"read=['{stack}blocks.{'<layer>' if layer is None else layer}.attn.hook_k'] (hook_rot_k where it has no hook_k)"
        )
    keys = run.acts[found[max(found) if layer is None else layer]]
    return grid.of_tokens(keys.flatten(2).transpose(1, 2)).transpose(1, 2)


def _second(features: Tensor, tau: float, eps: float) -> tuple[Tensor | None, float]:
    """Second smallest generalised eigenvector and its eigenvalue; no vector where all edges are alike."""
    from scipy.linalg import eigh

    unit = torch.nn.functional.normalize(features, dim=-1)
    edges = torch.where(unit @ unit.T > tau, 1.0, eps).double()
    apart = edges[~torch.eye(len(edges), dtype=torch.bool)]
    if not len(apart) or bool((apart == apart[0]).all()):
        return None, float("nan")
    degree = edges.sum(1).diag()
    values, vectors = eigh((degree - edges).numpy(), degree.numpy(), subset_by_index=[1, 1])
    return torch.from_numpy(vectors[:, 0].copy()), float(values[0])


def _component(side: Tensor, seed: int, grid: Grid) -> Tensor:
    """The connected component (four neighbours) of one patch, ``[rows, cols]``."""
    from scipy.ndimage import label

    pieces = torch.from_numpy(label(side.view(grid.rows, grid.cols).numpy())[0])
    number = pieces.flatten()[seed]
    return (pieces == number) & (number > 0)


def _held(mask: Tensor, side: Tensor) -> Tensor:
    return mask.sum() / side.sum() if side.any() else torch.tensor(float("nan"))


def _box(mask: Tensor, grid: Grid) -> Tensor:
    if not mask.any():
        return torch.full((4,), float("nan"), dtype=torch.float64)
    rows, cols = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    corners = torch.stack([rows.min(), cols.min(), rows.max() + 1, cols.max() + 1])
    return corners.double() * torch.tensor(grid.patch * 2, dtype=torch.float64)


def _iou(mask: Tensor, truth: Tensor) -> Tensor:
    both, either = (mask & truth).flatten(1).sum(1), (mask | truth).flatten(1).sum(1)
    return both.double() / either


def _example() -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    inside = torch.zeros(6, 7, dtype=torch.bool)
    inside[1:4, 2:5] = True
    sides = torch.where(
        inside.flatten()[:, None], torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0, 0.0])
    )
    return {"features": (sides + 0.2 * torch.randn(42, 4, generator=generator))[None], "grid": Grid(6, 7, (8, 8))}


ANALYSES = (
    Analysis(
        name="token-cut",
        question="Which patches are the object, without labels?",
        function=token_cut,
        example=_example,
        paper="Wang et al. 2022 (arXiv 2202.11539), section 3",
        source="tensors",
        null="how much of the object's side hangs together if the patches are shuffled",
    ),
)
