"""Sizes and choices of a native model, and the cache that it keeps between steps."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from workbench.errors import UnknownName, WorkbenchError
from workbench.models.native_mixers import MIXERS


@dataclass(frozen=True)
class NativeConfig:
    """Sizes and choices of a ``NativeNet``; axis letters as everywhere (H heads, G kv heads, D width, E head width).

    ``mixer`` is ``softmax``, ``gated-softmax``, or any variant of ``workbench.variants()`` that is ``in models``.
    """

    layers: int
    heads: int
    width: int
    head_width: int
    vocab: int
    kv_heads: int | None = None
    mlp_width: int = 0
    mixer: str = "softmax"
    positions: str = "rotary"
    norm: str = "rms"
    activation: str = "gelu"
    context: int = 32768
    causal: bool = True
    scale: float | None = None
    theta: float = 10000.0
    tied: bool = False
    bias: bool = False
    """Biases ``b_Q b_K b_V`` on queries, keys and values: with rotary positions a head that looks at a distance needs them."""
    trained: int | None = None
    """Tokens of the longest row in training."""
    grid: tuple[int, int] | None = None
    """Rows and columns of patches: the model reads images ``[B, channels, rows * patch, columns * patch]`` and gives the logits
    ``[B, vocab]`` of the mean patch."""
    patch: int = 4
    channels: int = 3

    def __post_init__(self) -> None:
        for name, least in (
            ("layers", 1), ("heads", 1), ("width", 1), ("head_width", 1), ("context", 1), ("vocab", 0), ("mlp_width", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise WorkbenchError(f"{name} is a whole number of at least {least}; got {value!r}")
        if self.kv_heads is not None and (not isinstance(self.kv_heads, int) or self.kv_heads < 1):
            raise WorkbenchError(
                f"kv_heads is a whole number of at least 1, or None for as many as heads; got {self.kv_heads!r}"
            )
        if self.grid is not None:
            grid = tuple(self.grid)
            if (
                len(grid) != 2
                or any(not isinstance(n, int) or n < 1 for n in grid)
                or self.patch < 1
                or self.channels < 1
            ):
                raise WorkbenchError(
                    f"an image is a grid of rows and columns of patches with channels; got grid={self.grid!r}, "
                    f"patch={self.patch!r}, channels={self.channels!r}"
                )
            object.__setattr__(self, "grid", grid)
            if self.tied or self.positions == "rotary":
                raise WorkbenchError("a model of images has learned or no positions, and is not tied")
        if self.mixer not in MIXERS:
            from workbench.models.native_variants import variant_of

            variant_of(self)
        for name, known in (
            ("positions", ("rotary", "learned", "none")),
            ("norm", ("rms", "none")),
            ("activation", ("gelu", "relu")),
        ):
            if getattr(self, name) not in known:
                raise UnknownName(name, getattr(self, name), known)
        if self.heads % (self.kv_heads or self.heads):
            raise WorkbenchError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.positions == "rotary" and self.head_width % 2:
            raise WorkbenchError(f"rotary positions need an even head width; got {self.head_width}")

    @property
    def positions_known(self) -> int:
        """Positions that a table of learned positions has."""
        return self.context if self.grid is None else self.grid[0] * self.grid[1]

    def dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class NativeCache:
    """Rotated keys and values per layer, ``[B, G, K, E]``, and which of them are real, ``[B, K]``. For mixers that need them,
    queries ``[B, H, K, E]`` and the inputs of queries and of keys follow."""

    layers: tuple[tuple[Tensor, ...], ...]
    mask: Tensor

    @property
    def length(self) -> int:
        return self.mask.shape[1]
