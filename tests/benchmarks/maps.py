"""What maps of long sequences cost: the last rows, the block map and the mass received, family by family.

    python tests/benchmarks/maps.py [--tokens 32768] [--width 32] [--block 512] [--rows 64] [--only NAME,NAME] [--json]

One sequence, one head (one channel where every channel has a map), random arguments in float32. Each map is made and asked in a
process of its own, the rows first, then block sums, then received mass; each answer is timed. Memory is the peak of the process
over what the arguments and libraries took; N x N would be 4 N^2 bytes. The error is the largest difference of the last rows from
those of the same map in float64, over the largest weight.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from workbench.attention_map import AttentionMap

Draw = Callable[..., "Tensor"]


def softmax(draw: Draw, n: int, e: int, **mask: Any) -> AttentionMap:
    from workbench.kernels.mask import Mask
    from workbench.patterns.softmax import SoftmaxMap

    return SoftmaxMap(draw(0, n, e), draw(1, n, e), mask=Mask(causal=True, **mask))


def power(draw: Draw, n: int, e: int) -> AttentionMap:
    from workbench.mixers.block_masks import power_blocks

    return softmax(draw, n, e, blocks=power_blocks(-(-n // 128), 1, 1), side=128)


def sigmoid(draw: Draw, n: int, e: int) -> AttentionMap:
    from workbench.kernels.mask import Mask
    from workbench.patterns.sigmoid import SigmoidMap

    return SigmoidMap(draw(0, n, e), draw(1, n, e), mask=Mask(causal=True))


def decayed(draw: Draw, n: int, e: int) -> AttentionMap:
    from workbench.patterns.linear import LinearMap

    return LinearMap(draw(0, n, e), draw(1, n, e), -0.01 * draw(2, n).abs(), causal=True)


def gated_linear(draw: Draw, n: int, e: int) -> AttentionMap:
    from workbench.patterns.linear import ChannelDecayMap

    return ChannelDecayMap(draw(0, n, e), draw(1, n, e), -0.05 * draw(2, n, e).abs())


def prefix(draw: Draw, n: int, e: int) -> AttentionMap:
    from workbench.patterns.prefix import PrefixSoftmaxMap

    return PrefixSoftmaxMap(draw(0, n), draw(1, 1)[0, 0].abs() * 0.01, draw(2, 1)[0, 0])


def selective(draw: Draw, n: int, e: int) -> AttentionMap:
    from workbench.patterns.selective import SelectiveScanMap

    return SelectiveScanMap(draw(0, n).abs() * 0.1, -draw(1, 16)[0].abs(), draw(2, n, 16)[:, 0], draw(3, n, 16)[:, 0])


def delta(draw: Draw, n: int, e: int) -> AttentionMap:
    from workbench.patterns.delta import DeltaMap

    return DeltaMap(draw(0, n, e), unit(draw(1, n, e)), draw(2, n).sigmoid(), -0.05 * draw(3, n).abs())


def kda(draw: Draw, n: int, e: int) -> AttentionMap:
    from workbench.patterns.state import StateMap, dplr

    k, beta, keep = unit(draw(1, n, e)), draw(2, n).sigmoid()[..., None], (-0.05 * draw(3, n, e).abs()).exp()
    return StateMap(draw(0, n, e), beta * k, dplr(keep, -beta * k, keep * k))


def toeplitz(draw: Draw, n: int, e: int) -> AttentionMap:
    from workbench.patterns.toeplitz import ToeplitzMap

    return ToeplitzMap(draw(0, n), queries=n, keys=n, left=draw(1, n), right=draw(2, n))


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


CASES: dict[str, tuple[str, Callable[[Draw, int, int], AttentionMap]]] = {
    "softmax": ("softmax, causal", softmax),
    "window": ("softmax, window 1,024", lambda draw, n, e: softmax(draw, n, e, window=1024)),
    "power": ("softmax, blocks at powers of two", power),
    "sigmoid": ("sigmoid", sigmoid),
    "lightning": ("linear with decay (lightning, Mamba-2)", decayed),
    "gla": ("linear, decay per channel (GLA)", gated_linear),
    "rwkv": ("prefix softmax (RWKV-4, Aaren)", prefix),
    "mamba": ("selective scan (Mamba)", selective),
    "delta": ("gated delta rule", delta),
    "kda": ("state transporter (KDA, RWKV-7)", kda),
    "hyena": ("long convolution with gates (Hyena)", toeplitz),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("--tokens", 32768), ("--width", 32), ("--block", 512), ("--rows", 64)):
        parser.add_argument(name, type=int, default=value)
    parser.add_argument("--only", default=",".join(CASES))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(measure(asked.one, asked.tokens, asked.width, asked.block, asked.rows)))
        return 0
    unknown = set(asked.only.split(",")) - set(CASES)
    if unknown:
        print(f"no maps {', '.join(sorted(unknown))}; known: {', '.join(CASES)}", file=sys.stderr)
        return 2
    rows = []
    if not asked.json:
        print(
            f"{asked.tokens:,} tokens, width {asked.width}, float32; N x N would be {4 * asked.tokens**2 / 2**20:,.0f} MB\n"
        )
        print(f"| map | last {asked.rows} rows | blocks of {asked.block} | received | memory | error |\n|-|-|-|-|-|-|")
    for name in asked.only.split(","):
        options = ["--tokens", str(asked.tokens), "--width", str(asked.width), "--block", str(asked.block)]
        command = [sys.executable, __file__, "--one", name, *options, "--rows", str(asked.rows)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{name}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            return 1
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        if not asked.json:
            print(line(rows[-1]), flush=True)
    if asked.json:
        print(json.dumps({"tokens": asked.tokens, "rows": rows}))
    return 0


def line(row: dict[str, Any]) -> str:
    times = " | ".join(f"{row[name]:.2f} s" for name in ("rows", "blocks", "received"))
    return f"| {row['map']} | {times} | {row['memory'] / 2**20:,.0f} MB | {row['error']:.0e} |"


def measure(name: str, tokens: int, width: int, block: int, rows: int) -> dict[str, Any]:
    import torch
    from machine import high_water

    label, make = CASES[name]

    def draw(dtype: torch.dtype) -> Draw:
        def drawn(seed: int, *shape: int) -> Tensor:
            return torch.randn(1, 1, *shape, generator=torch.Generator().manual_seed(seed)).to(dtype)

        return drawn

    small = make(draw(torch.float32), 300, width)
    small.rows(200, 300), small.blocks(64), small.received()  # imports and first calls
    before = high_water()
    amap = make(draw(torch.float32), tokens, width)
    found: dict[str, Any] = {"name": name, "map": label}
    answers: dict[str, Tensor] = {}
    for what, ask in (
        ("rows", lambda: amap.rows(tokens - rows, tokens)),
        ("blocks", lambda: amap.blocks(block)),
        ("received", amap.received),
    ):
        started = time.perf_counter()
        answers[what] = ask()
        found[what] = time.perf_counter() - started
    found["memory"] = high_water() - before
    exact = make(draw(torch.float64), tokens, width).rows(tokens - rows, tokens)
    found["error"] = float((answers["rows"].double() - exact).abs().max() / exact.abs().max())
    return found


if __name__ == "__main__":
    sys.exit(main())
