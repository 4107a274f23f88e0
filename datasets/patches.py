"""Small images with one planted shape: what a vision model should look at is known to the patch.

An image is noise with one of six shapes of 8 x 8 pixels, drawn on the corners of the patch grid so that it fills two by two
patches of 4 pixels. The four quarters of another shape, the decoy, lie scattered one by one: which quarters are there says
nothing about the label, and only the place where four of them meet does.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.errors import UnknownName, WorkbenchError

PATCH = 4
SHAPES = ("frame", "plus", "cross", "disc", "rows", "columns")
SPLITS = ("train", "test")
_DRAWN = {
    "frame": ("########", "########", "##....##", "##....##", "##....##", "##....##", "########", "########"),
    "plus": ("...##...", "...##...", "...##...", "########", "########", "...##...", "...##...", "...##..."),
    "cross": ("##....##", "###..###", ".######.", "..####..", "..####..", ".######.", "###..###", "##....##"),
    "disc": ("........", "..####..", ".######.", ".######.", ".######.", ".######.", "..####..", "........"),
    "rows": ("########", "........", "########", "........", "########", "........", "########", "........"),
    "columns": ("#.#.#.#.", "#.#.#.#.", "#.#.#.#.", "#.#.#.#.", "#.#.#.#.", "#.#.#.#.", "#.#.#.#.", "#.#.#.#."),
}


@dataclass(frozen=True)
class PlantedImages:
    """``images`` ``[N, 1, rows * 4, cols * 4]`` in float32, background 0 and shape 1 under noise; ``label`` ``[N]``, the index
    in ``names``; ``planted`` ``[N, rows, cols]``, True on the four patches of the shape; ``decoy`` likewise on the scattered
    quarters; ``box`` ``[N, 4]``: top, left, bottom, right of the shape in pixels, the last two exclusive. ``corrupt`` are the
    same images with another shape in its place (``other`` ``[N]``)."""

    images: Tensor
    label: Tensor
    planted: Tensor
    decoy: Tensor
    box: Tensor
    corrupt: Tensor
    other: Tensor
    names: tuple[str, ...] = SHAPES


def planted_images(
    n: int,
    *,
    seed: int = 0,
    split: str = "test",
    grid: tuple[int, int] = (8, 8),
    noise: float = 0.3,
    decoy: bool = True,
) -> PlantedImages:
    """``n`` images with a shape at a random place of a grid of patches; the splits draw from different random numbers.

    ``noise`` is the standard deviation of the pixels' noise. Without ``decoy`` there is nothing but the shape.
    """
    if split not in SPLITS:
        raise UnknownName("split", split, SPLITS)
    rows, cols = grid
    if n < 1 or min(rows, cols) < (5 if decoy else 2):
        raise WorkbenchError(
            f"planted images: one or more, on a grid of at least {'5 x 5' if decoy else '2 x 2'} patches; got {n} on {grid}"
        )
    rng = random.Random(f"patches/{split}/{seed}")
    label, other, scattered = (torch.tensor(values) for values in _labels(rng, n))
    top = torch.tensor([rng.randrange(rows - 1) for _ in range(n)])
    left = torch.tensor([rng.randrange(cols - 1) for _ in range(n)])
    quarters = shapes().unflatten(2, (2, PATCH)).unflatten(1, (2, PATCH)).permute(0, 1, 3, 2, 4).flatten(1, 2)
    patches = torch.zeros(n, rows * cols, PATCH, PATCH)
    decoys = torch.zeros(n, rows * cols, dtype=torch.bool)
    corner = top * cols + left
    places = corner[:, None] + torch.tensor([0, 1, cols, cols + 1])
    each = torch.arange(n)[:, None]
    if decoy:
        spots = torch.tensor([_apart(rng, rows, cols, i, j) for i, j in zip(top.tolist(), left.tolist(), strict=True)])
        patches[each, spots] = quarters[scattered]
        decoys[each, spots] = True
    corrupt = patches.clone()
    patches[each, places] = quarters[label]
    corrupt[each, places] = quarters[other]
    planted = torch.zeros(n, rows * cols, dtype=torch.bool)
    planted[each, places] = True
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    grain = noise * torch.randn(n, 1, rows * PATCH, cols * PATCH, generator=generator)
    box = PATCH * torch.stack([top, left, top + 2, left + 2], 1)
    return PlantedImages(
        _joined(patches, rows, cols) + grain,
        label,
        planted.view(n, rows, cols),
        decoys.view(n, rows, cols),
        box,
        _joined(corrupt, rows, cols) + grain,
        other,
    )


def shapes() -> Tensor:
    """The six shapes, ``[6, 8, 8]``, 1 where they are."""
    return torch.tensor([[[float(pixel == "#") for pixel in row] for row in _DRAWN[name]] for name in SHAPES])


def _labels(rng: random.Random, n: int) -> tuple[list[int], list[int], list[int]]:
    """Shape, another shape in its place, and the decoy's, which is a third."""
    drawn = [rng.sample(range(len(SHAPES)), 3) for _ in range(n)]
    a, b, c = zip(*drawn, strict=True)
    return list(a), list(b), list(c)


def _apart(rng: random.Random, rows: int, cols: int, top: int, left: int) -> list[int]:
    """Four patches that touch neither the shape nor each other, drawn one after the other."""
    while True:
        taken: list[int] = []
        free = {
            i * cols + j
            for i in range(rows)
            for j in range(cols)
            if not (top - 1 <= i <= top + 2 and left - 1 <= j <= left + 2)
        }
        while free and len(taken) < 4:
            place = rng.choice(sorted(free))
            taken.append(place)
            i, j = divmod(place, cols)
            free -= {(i + di) * cols + j + dj for di in (-1, 0, 1) for dj in (-1, 0, 1) if 0 <= j + dj < cols}
        if len(taken) == 4:
            return taken


def _joined(patches: Tensor, rows: int, cols: int) -> Tensor:
    """Patches ``[N, rows * cols, p, p]`` to images ``[N, 1, rows * p, cols * p]``."""
    cells = patches.unflatten(1, (rows, cols)).permute(0, 1, 3, 2, 4)
    return cells.reshape(len(patches), 1, rows * PATCH, cols * PATCH)
