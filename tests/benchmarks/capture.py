"""What capture costs: a plain forward pass against the same pass with all maps, and against other ways to see attention.

    python tests/benchmarks/capture.py [--device cuda] [--tokens 1024 4096] [--repeat 3] [--one-layer] [--store] [--json]

A Llama-shaped model with random weights, all layers, block sum + max + received + entropy. On CPUs 4 layers of width 512, 8
heads of 64, 4 key-value heads, float32; on CUDA 4 layers of width 4096, 32 heads of 128, 8 key-value heads, bfloat16. The ways:

    plain             the model's own pass on fused attention
    capture           the same pass with maps and statistics of every layer
    one layer         ... of one layer (--one-layer)
    store             ... of every layer, written to disk with q and k (--store)
    eager             output_attentions=True, the dense pattern of every layer kept
    transformer-lens  run_with_cache of a TransformerBridge on the same model, patterns only

Every way lives in a process of its own, so that peak memory is its own, and the processes take turns, round after round. Seconds
are medians of the rounds, ratios medians of the ratios to the plain pass of the same round. The physical floor is one pass of
q k^T over the causal pairs, two operations for each multiply-add, at this machine's measured rate of such products.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

WAYS = ("plain", "capture", "one layer", "store", "eager", "transformer-lens")
USUAL = ("plain", "capture", "eager", "transformer-lens")
DENSE = ("eager", "transformer-lens")
DENSE_LIMIT = 4096
"""Tokens beyond which ways that hold dense patterns are not run."""
SHAPES: dict[str, dict[str, Any]] = {
    "cpu": {"heads": 8, "kv_heads": 4, "head_width": 64, "dtype": "float32"},
    "cuda": {"heads": 32, "kv_heads": 8, "head_width": 128, "dtype": "bfloat16"},
}


def build(way: str, device: str, layers: int, tokens: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = SHAPES[device]
    width = shape["heads"] * shape["head_width"]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        head_dim=shape["head_width"],
        vocab_size=1000,
        max_position_embeddings=max(131072, tokens),
        attn_implementation="eager" if way in DENSE else "sdpa",
        architectures=["LlamaForCausalLM"],
    )
    return LlamaForCausalLM(config).eval().to(device, getattr(torch, shape["dtype"]))


def prepare(way: str, model: Any, ids: Any, folder: Path) -> Callable[[], object]:
    """The forward pass of a way."""
    if way == "plain":
        return lambda: model.model(ids)
    if way == "eager":
        return lambda: model.model(ids, output_attentions=True)
    if way == "transformer-lens":
        from transformer_lens.model_bridge import TransformerBridge

        from workbench.datasets.tokenizer import word_tokenizer

        words = word_tokenizer()
        words.save_pretrained(folder / "tokenizer")  # a bridge wants one that was loaded from somewhere
        loaded = type(words).from_pretrained(folder / "tokenizer")
        bridge = TransformerBridge.boot_transformers(
            "llama", hf_model=model, tokenizer=loaded, dtype=model.dtype, device=model.device
        )
        return lambda: bridge.run_with_cache(
            ids, return_type=None, names_filter=lambda name: name.endswith("hook_pattern")
        )
    import workbench as wb

    wrapped = wb.load(model)
    wanted: dict[str, Any] = {"blocks": 64, "reduce": ("sum", "max"), "stats": ("received", "entropy")}
    if way == "one layer":
        wanted["layers"] = [model.config.num_hidden_layers // 2]
    if way != "store":
        request = wb.capture(**wanted)
        return lambda: wrapped.run(ids, maps=request, logits=None)
    turn = iter(range(2**31))
    return lambda: wrapped.run(ids, maps=wb.capture(**wanted, store=folder / str(next(turn))), logits=None)


def work(way: str, device: str, layers: int, tokens: int, threads: int, folder: Path) -> None:
    """The process of one way: a line from the parent, a forward pass, a line of JSON back."""
    import machine
    import torch

    torch.set_num_threads(threads)
    model = build(way, device, layers, tokens)
    forward = prepare(way, model, torch.randint(0, 1000, (1, tokens), device=device), folder)
    with torch.no_grad():
        short = prepare(way, model, torch.randint(0, 1000, (1, 64), device=device), folder / "short")
        short()
        if device == "cuda":
            forward()  # compiles the kernels of this length
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before: float = torch.cuda.memory_allocated()
        else:
            before = machine.high_water()
        print(json.dumps({"ready": way}), flush=True)
        for _ in sys.stdin:
            start = time.perf_counter()
            forward()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            top = torch.cuda.max_memory_allocated() if device == "cuda" else 0
            peak = top or machine.high_water()
            print(json.dumps({"seconds": seconds, "peak_mb": (peak - before) / 2**20}), flush=True)


def measure(ways: list[str], given: argparse.Namespace, tokens: int) -> dict[str, dict[str, Any]]:
    """Seconds, memory and ratio of each way; a way whose process fails says how."""
    import machine

    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    failed: dict[str, str] = {}
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        workers: dict[str, subprocess.Popen[str]] = {}
        complaints: dict[str, Any] = {}
        for way in ways:
            errors = complaints[way] = stack.enter_context(tempfile.TemporaryFile("w+"))
            command = [sys.executable, __file__, "--one", way, "--folder", folder, "--tokens", str(tokens)]
            command += ["--threads", str(given.threads), "--device", given.device, "--layers", str(given.layers)]
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
            workers[way] = stack.enter_context(subprocess.Popen(command, text=True, **pipes))
        for way, worker in workers.items():
            if _line(worker) is None:
                failed[way] = _last(complaints[way])
        for _ in range(given.repeat):
            for way, worker in workers.items():
                if way in failed:
                    continue
                assert worker.stdin is not None
                worker.stdin.write("\n")
                worker.stdin.flush()
                answer = _line(worker)
                if answer is None:
                    failed[way] = _last(complaints[way])
                else:
                    found[way].append(answer)
        for worker in workers.values():
            assert worker.stdin is not None
            worker.stdin.close()
    rows: dict[str, dict[str, Any]] = {}
    for way in ways:
        if way in failed:
            rows[way] = {"failed": failed[way]}
            continue
        seconds = [answer["seconds"] for answer in found[way]]
        rows[way] = {
            "seconds": machine.median(seconds),
            "ratio": machine.ratio(seconds, [answer["seconds"] for answer in found["plain"]]),
            "spread": (max(seconds) - min(seconds)) / machine.median(seconds),
            "peak_mb": found[way][-1]["peak_mb"],
            "rounds": len(seconds),
        }
    return rows


def _line(worker: subprocess.Popen[str]) -> dict[str, float] | None:
    """The next answer of a process, past anything else that it prints; None if it has ended."""
    assert worker.stdout is not None
    for line in worker.stdout:
        if line.startswith("{"):
            return json.loads(line)
    return None


def _last(errors: Any) -> str:
    errors.seek(0)
    return next((line.strip() for line in reversed(errors.readlines()) if line.strip()), "its process ended")[:200]


def matmul_rate(device: str) -> float:
    """Measured FLOP/s of a q k^T-shaped product, two for each multiply-add."""
    import machine
    import torch

    shape = SHAPES[device]
    heads, width, rows, keys = shape["heads"], shape["head_width"], 512, 4096
    dtype = getattr(torch, shape["dtype"])
    q, k = torch.randn(heads, rows, width).to(device, dtype), torch.randn(heads, width, keys).to(device, dtype)
    (q @ k).sum()
    return 2 * heads * rows * width * keys / machine.seconds(lambda: q @ k, device, 20)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a row a length."""
    ways = list(rows[0]["ways"])
    head = ["tokens", *(f"{way} s" for way in ways), *(f"{way} MB" for way in ways), "q k^T floor s"]
    lines = ["| " + " | ".join(head) + " |", "|" + "-|" * len(head)]
    for row in rows:
        cells = [f"{row['tokens']:,}"]
        for way in ways:
            found = row["ways"].get(way)
            if found is None:
                cells.append("not run")
            elif "failed" in found:
                cells.append("failed")
            else:
                cells.append(f"{found['seconds']:.3g}" + ("" if way == "plain" else f" ({found['ratio']:.2f} x)"))
        for way in ways:
            found = row["ways"].get(way, {})
            cells.append(f"{found['peak_mb']:,.0f}" if "peak_mb" in found else "")
        lines.append("| " + " | ".join([*cells, f"{row['floor_seconds']:.3g}"]) + " |")
    failed = {f"{way}: {found['failed']}" for row in rows for way, found in row["ways"].items() if "failed" in found}
    return "\n".join([*lines, *sorted(failed)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--repeat", type=int, default=3, help="rounds")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--device", choices=tuple(SHAPES), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="of torch on CPUs")
    parser.add_argument("--only", nargs="+", choices=USUAL, default=USUAL, help="ways beside the plain one")
    parser.add_argument("--one-layer", action="store_true", help="also with the maps of one layer only")
    parser.add_argument("--store", action="store_true", help="also with maps written to a temporary folder")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        work(given.one, given.device, given.layers, given.tokens[0], given.threads, given.folder / given.one)
        return
    import machine
    import torch

    torch.set_num_threads(given.threads)
    rate, shape = matmul_rate(given.device), SHAPES[given.device]
    asked = {"plain", *given.only, *["one layer"] * given.one_layer, *["store"] * given.store}
    rows = []
    for tokens in given.tokens:
        ways = [way for way in WAYS if way in asked and (way not in DENSE or tokens <= DENSE_LIMIT)]
        operations = given.layers * shape["heads"] * (tokens * (tokens + 1) / 2) * 2 * shape["head_width"]
        rows.append({"tokens": tokens, "ways": measure(ways, given, tokens), "floor_seconds": operations / rate})
    name = torch.cuda.get_device_name() if given.device == "cuda" else machine.processor()
    about = f"{name}, torch {torch.__version__}, {rate / 1e9:,.0f} GFLOP/s in q k^T products of {shape['dtype']}"
    if given.json:
        print(json.dumps({"machine": about, "layers": given.layers, **shape, "rows": rows}))
    else:
        print(f"{about}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
