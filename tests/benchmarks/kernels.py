"""What block maps and statistics cost in one attention call, next to plain attention and to every other way to get them.

    python tests/benchmarks/kernels.py [--device cuda] [--tokens 4096 32768] [--only attention received] [--json]

Random causal attention; sizes are a Llama-shaped layer on CUDA (32 heads of 128, 8 key-value heads, bfloat16) and a small one on
CPUs (8 heads of 64, 4 key-value heads, float32). Needs torch, triton and numpy; baselines from other packages say so when they
are not installed. In a table, after warming up, the rows take turns round after round; columns:

    seconds     median of the rounds, and their spread (largest less smallest, over the median)
    x first     median over the rounds of the time over that of the first row: plain attention (the fastest fused attention of
                torch here) or, for the sparse autoencoder, plain torch
    x its base  the same over another row of the table, named in brackets
    peak MB     memory that one call needs beside its inputs
    of limit    the least time that arithmetic and traffic allow at this machine's measured rates, over the time
    error       largest difference of maps and statistics from the reference in float64 on 256 tokens, over the largest number of
                the reference; of the output where there is nothing else

Exponentials are not counted as arithmetic. A row that did not run says why.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import machine
import other_ways
import peers
import softmax_ways
import torch
import truths
from machine import Machine, Way
from setting import CODES, Setting
from torch import Tensor

from workbench.kernels.selfcheck import compare, lse_selfcheck

CPU: dict[str, Any] = {"heads": 8, "kv_heads": 4, "width": 64, "dtype": "float32", "tokens": [1024, 2048, 4096, 8192]}
CUDA: dict[str, Any] = {
    "heads": 32,
    "kv_heads": 8,
    "width": 128,
    "dtype": "bfloat16",
    "tokens": [4096, 8192, 16384, 32768],
}
SMALL = 256


@dataclass(frozen=True)
class Question:
    """``ways`` are the rows at a setting; ``truth`` is what they must answer; ``most`` tokens it is asked at."""

    asks: str
    ways: Callable[[Setting], list[Way]]
    truth: Callable[[Setting], dict[str, Tensor]]
    most: int = 2**31


QUESTIONS = {
    "attention": Question(
        "block sum, block max, received mass and entropy of softmax attention",
        softmax_ways.attention_ways,
        truths.softmax_truth,
    ),
    "received": Question("received mass alone", softmax_ways.received_ways, truths.softmax_truth),
    "maximum": Question("the block maximum alone", softmax_ways.maximum_ways, truths.softmax_truth),
    "sparse": Question("block-sparse attention and its map", softmax_ways.sparse_ways, truths.sparse_truth),
    "sigmoid": Question("sigmoid attention, block sum and max", other_ways.sigmoid_ways, truths.sigmoid_truth),
    "linear": Question("decayed linear attention, block sum and abs", other_ways.linear_ways, truths.linear_truth),
    "delta": Question("the gated delta rule, block sum and abs", other_ways.delta_ways, truths.delta_truth),
    "encode": Question(
        f"the best {CODES} features of a sparse autoencoder", other_ways.encode_ways, truths.code_truth, 8192
    ),
    "decode": Question(
        f"what {CODES} features of each token decode to", other_ways.decode_ways, truths.code_truth, 8192
    ),
}


def settings(given: argparse.Namespace) -> tuple[Setting, list[int]]:
    """The setting without its length, and the lengths."""
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    usual = CUDA if device == "cuda" else CPU
    chosen: dict[str, Any] = {name: getattr(given, name) or value for name, value in usual.items()}
    dtype = getattr(torch, str(chosen["dtype"]), None)
    if not isinstance(dtype, torch.dtype):
        raise SystemExit(f"--dtype is float32, bfloat16 or float16; got {chosen['dtype']}")
    if chosen["heads"] % chosen["kv_heads"]:
        raise SystemExit(f"--kv-heads must divide --heads; got {chosen['kv_heads']} and {chosen['heads']}")
    free = 0.7 * machine.free_bytes(device)
    sizes = {name: chosen[name] for name in ("heads", "kv_heads", "width")}
    return Setting(tokens=1, **sizes, dtype=dtype, device=device, block=given.block, free=free), chosen["tokens"]


def natural_logs(at: Setting) -> dict[str, str]:
    """Whether log-sum-exps are natural logs, of every backend of torch that a table can use, and of the workbench's own."""
    small = replace(at, tokens=64)
    q, k = small.q.double(), peers.repeated(small.k, small.heads).double()
    s = q @ k.transpose(-1, -2) * small.width**-0.5
    hidden = torch.ones(64, 64, dtype=torch.bool, device=small.device).triu(1)
    exact = s.masked_fill(hidden, -math.inf).logsumexp(-1).cpu()
    found = {name: str(check) for name, check in lse_selfcheck().items()}
    for backend in peers.backends(at.device):
        try:
            found[f"SDPA {backend.name}"] = str(compare(backend.name, backend.run(small.q, small.k, small.v)[1], exact))
        except Exception as error:  # a backend that cannot run these tensors
            found[f"SDPA {backend.name}"] = f"absent: {machine.first_line(error)}"
    return found


def ask(question: Question, at: Setting, computer: Machine, repeat: int, budget: float) -> list[dict[str, Any]]:
    """The rows of a question at a setting, with their errors at a small one."""
    small = replace(at, tokens=min(SMALL, at.tokens))
    errors = machine.differences(question.ways(small), question.truth(small))
    rows = machine.measure(question.ways(at), computer, repeat, budget)
    for row in rows:
        row["error"] = errors.get(row["way"])
        if row["error"] is not None and not math.isfinite(row["error"]):
            row |= {"error": None, "remark": f"its answers are not finite; {row['remark']}"}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda if there is one")
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--heads", type=int)
    parser.add_argument("--kv-heads", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5, help="rounds")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds after which a row gets no further round")
    parser.add_argument("--threads", type=int, help="of torch on CPUs")
    parser.add_argument("--only", nargs="+", choices=tuple(QUESTIONS), default=tuple(QUESTIONS))
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    at, lengths = settings(given)
    computer = machine.examine(at.device, at.dtype)
    logs = natural_logs(at)
    if not given.json:
        print(
            f"{computer.name}, torch {computer.torch}: {computer.matmul / 1e12:.3g} TFLOP/s in {computer.dtype} products, "
            f"{computer.copy / 1e9:.3g} GB/s copied, load {computer.load:.1f}\n"
            f"{at.heads} heads of {at.width}, {at.kv_heads} key-value heads, "
            f"blocks of {at.block}, medians of {given.repeat} rounds\n"
        )
        for name, said in logs.items():
            print(f"log-sum-exp of {name}: {said}")
    tables = []
    fastest: dict[int, str] = {}
    with torch.no_grad():
        for name in given.only:
            for tokens in lengths:
                if tokens > QUESTIONS[name].most:
                    continue
                if tokens not in fastest:
                    fastest[tokens] = replace(at, tokens=tokens).backend.name
                here = replace(at, tokens=tokens, sdpa=fastest[tokens])
                rows = ask(QUESTIONS[name], here, computer, given.repeat, given.budget)
                tables.append({"question": name, "tokens": tokens, "rows": rows})
                if given.json:
                    print(f"{name}, {tokens} tokens: done", file=sys.stderr)
                else:
                    print(f"\n{name}, {tokens:,} tokens: {QUESTIONS[name].asks}\n\n{machine.table(rows)}", flush=True)
    if given.json:
        sizes = {name: getattr(at, name) for name in ("heads", "kv_heads", "width", "block")}
        document = {"machine": asdict(computer), "sizes": sizes, "log_sum_exp": logs, "tables": tables}
        print(json.dumps(document, allow_nan=False))


if __name__ == "__main__":
    main()
