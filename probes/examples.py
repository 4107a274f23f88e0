"""Small inputs with known answers that the examples of the analyses share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.maps import AttentionMap

if TYPE_CHECKING:
    from workbench.models.protocol import Model
    from workbench.pairs import Pairs
    from workbench.run import Run

SENTENCE = "Mary and John went to the store . John gave a book to"


def random_rows(
    batch: int = 1, heads: int = 2, tokens: int = 12, *, seed: int = 0, causal: bool = True, keys: int | None = None
) -> Tensor:
    """Softmax of random scores, ``[B, H, Q, K]`` in float64; causal rows stand on the last keys."""
    keys = tokens if keys is None else keys
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(batch, heads, tokens, keys, dtype=torch.float64, generator=generator)
    if causal:
        scores = scores.masked_fill(torch.ones(tokens, keys).triu(1 + keys - tokens).bool(), float("-inf"))
    return scores.softmax(-1)


def random_maps(
    layers: int = 2, batch: int = 1, heads: int = 2, tokens: int = 12, **options: Any
) -> list[AttentionMap]:
    """A map of random rows per layer."""
    seed = options.pop("seed", 0)
    return [AttentionMap.from_dense(random_rows(batch, heads, tokens, seed=seed + i, **options)) for i in range(layers)]


def bundled(name: str = "tiny-softmax") -> Model:
    """A bundled model."""
    import workbench as wb

    return wb.load(name)


def bundled_run(
    name: str = "tiny-softmax", text: str | list[str] = SENTENCE, read: tuple[str, ...] = (), **options: Any
) -> Run:
    """A run of a bundled model on a sentence, with maps; ``read`` names sites, ``options`` go to ``wb.capture``."""
    import workbench as wb

    model = wb.load(name)
    with torch.no_grad():
        return model.run(text, read=read, maps=wb.capture(**options))


def needles(model: Model, length: int = 64, n: int = 4, depth: float = 0.5) -> Pairs:
    """Examples of the needle task."""
    import workbench as wb

    return wb.task("needle", length=length, depth=depth, split="test").build(0, model.tokenizer, n)
