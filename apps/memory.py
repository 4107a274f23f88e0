"""What does it take to keep the attention of a long input?

Counted for L layers, H query heads, G key heads of width E, and N tokens, one input, no sharing between layers:

    dense pattern        L H N^2 w              w = 4 bytes in fp32, 2 in fp16
    block maps           L H ceil(N/B)^2 2 x 4  the mass and the maximum of B x B blocks, fp32
    queries and keys     L N ((H + G) E w + 4 H)  any exact tile follows from them and the row's normaliser (fp32)
    received mass        L H N 4                one fp32 number per key

Only the first is what a model has to hold if it is run with its patterns as output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workbench.errors import UnknownName, WorkbenchError
from workbench.models.protocol import Shape
from workbench.results import axis

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

BLOCKS = (32, 64, 128)
SHORTEST, LONGEST = 512, 131072
_FLOAT = 4
_WIDTHS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


@dataclass(frozen=True)
class Kept:
    """A way to keep attention: ``bytes`` for all layers and heads at once; ``formula`` says how they are counted."""

    name: str
    bytes: int
    formula: str


def kept(shape: Shape, tokens: int, *, dtype: str = "float16") -> list[Kept]:
    """Every way with its size for one input of ``tokens``; ``dtype`` is the type that queries and keys are kept in."""
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise WorkbenchError(f"tokens is a whole number of at least 1; got {tokens!r}")
    if dtype not in _WIDTHS:
        raise UnknownName("type of numbers", dtype, _WIDTHS)
    maps, wide = shape.layers * shape.heads, _WIDTHS[dtype]
    rows = (shape.heads + shape.kv_heads) * shape.head_width * wide + _FLOAT * shape.heads
    return [
        Kept("dense patterns, fp32", maps * tokens**2 * 4, "layers × heads × tokens² × 4 bytes"),
        Kept("dense patterns, fp16", maps * tokens**2 * 2, "layers × heads × tokens² × 2 bytes"),
        *(
            Kept(
                f"block maps of {size}",
                maps * (-(-tokens // size)) ** 2 * 2 * _FLOAT,
                f"layers × heads × ⌈tokens / {size}⌉² × (mass + max) × 4 bytes",
            )
            for size in BLOCKS
        ),
        Kept(
            f"queries and keys, {dtype}",
            shape.layers * tokens * rows,
            f"layers × tokens × ((heads + key heads) × head width × {wide} + heads × 4) bytes",
        ),
        Kept("received mass, fp32", maps * tokens * _FLOAT, "layers × heads × tokens × 4 bytes"),
    ]


def memory_frame(shape: Shape, tokens: int | Sequence[int], *, dtype: str = "float16") -> pd.DataFrame:
    """One row per length and way: ``tokens, kept, bytes, size`` (for people) and ``formula``."""
    import pandas as pd

    lengths = [tokens] if isinstance(tokens, int) else list(tokens)
    return pd.DataFrame(
        [
            {"tokens": n, "kept": one.name, "bytes": one.bytes, "size": size_text(one.bytes), "formula": one.formula}
            for n in lengths
            for one in kept(shape, n, dtype=dtype)
        ]
    )


def memory_plot(
    shape: Shape, tokens: int, ax: Axes | None = None, *, dtype: str = "float16", machine: int | None = None
) -> Axes:
    """Bytes over tokens, both logarithmic, a line per way; upright at ``tokens``, dashed the memory of ``machine`` in bytes."""
    from matplotlib.ticker import LogLocator

    lengths = [SHORTEST * 2**i for i in range((LONGEST // SHORTEST).bit_length())]
    frame = memory_frame(shape, lengths, dtype=dtype)
    ax = axis(ax, 7.6, 3.6)
    for name, part in frame.groupby("kept", sort=False):
        ax.plot(part["tokens"], part["bytes"], marker=".", label=str(name), linestyle=_line(str(name)))
    ax.axvline(tokens, color="0.5", linewidth=1)
    if machine is not None:
        ax.axhline(machine, color="0.5", linewidth=1, linestyle="--", label=f"memory here, {size_text(machine)}")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
    ax.yaxis.set_major_locator(LogLocator(base=1000))
    ax.yaxis.set_major_formatter(lambda value, _: size_text(int(value)))
    ax.minorticks_off()
    ax.set(xlabel="tokens", ylabel="memory for all layers and heads")
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return ax


def size_text(size: int) -> str:
    """Bytes for people, in decimal units: ``8.6 GB``."""
    if size < 0:
        raise WorkbenchError(f"a size in bytes is not negative; got {size}")
    power = 0
    while power < len(_UNITS) - 1 and size >= 999.5 * 1000**power:
        power += 1
    value = size / 1000**power
    return f"{value:.0f} {_UNITS[power]}" if power == 0 or value >= 99.5 else f"{value:.2g} {_UNITS[power]}"


def _line(name: str) -> str:
    return "-" if name.startswith("dense") else "--" if name.startswith("block") else ":"
