"""What capture costs: a plain forward pass against the same pass with all maps, and against eager attention.

    python tests/benchmarks/capture.py [--tokens 1024 2048 4096 8192] [--repeat 3] [--json]

A Llama-shaped model with random weights (4 layers, 8 heads of 64, 4 key-value heads, width 512), float32, all layers, block
sum + max + received + entropy. Each measurement runs in a process of its own, so that peak memory is its own; the median of
the repeats is reported, as is the physical floor: one pass of q k^T over the causal pairs, two operations for each multiply-add,
at this machine's measured matmul rate.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time

LAYERS, HEADS, KV_HEADS, HEAD_WIDTH, WIDTH = 4, 8, 4, 64, 512
WAYS = ("plain", "capture", "eager")
EAGER_LIMIT = 4096


def measure(way: str, tokens: int, repeat: int, threads: int) -> dict[str, float]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_WIDTH,
        vocab_size=1000,
        max_position_embeddings=131072,
        attn_implementation="eager" if way == "eager" else "sdpa",
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 1000, (1, tokens))

    def forward() -> object:
        if way == "capture":
            return wrapped.run(ids, maps=request, logits=None)
        if way == "eager":
            return model.model(ids, output_attentions=True)
        return model.model(ids)

    if way == "capture":
        import workbench as wb

        wrapped = wb.load(model)
        request = wb.capture(blocks=64, reduce=("sum", "max"), stats=("received", "entropy"))
    with torch.no_grad():
        model.model(ids[:, :64])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        times = []
        for _ in range(repeat):
            start = time.perf_counter()
            forward()
            times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": sorted(times)[len(times) // 2], "peak_mb": (peak - before) / 1024}


def matmul_rate(threads: int) -> float:
    """Measured multiply-add throughput in FLOP/s of a q k^T-shaped product."""
    import torch

    torch.set_num_threads(threads)
    q, k = torch.randn(HEADS, 512, HEAD_WIDTH), torch.randn(HEADS, HEAD_WIDTH, 4096)
    q @ k
    start = time.perf_counter()
    for _ in range(20):
        q @ k
    return 20 * 2 * HEADS * 512 * HEAD_WIDTH * 4096 / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.tokens[0], args.repeat, args.threads)))
        return
    rate = matmul_rate(args.threads)
    rows = []
    for tokens in args.tokens:
        operations = LAYERS * HEADS * (tokens**2 / 2) * 2 * HEAD_WIDTH
        row: dict[str, float] = {"tokens": tokens, "floor_seconds": operations / rate}
        for way in WAYS:
            if way == "eager" and tokens > EAGER_LIMIT:
                continue
            command = [sys.executable, __file__, "--one", way, "--tokens", str(tokens), "--repeat", str(args.repeat)]
            done = subprocess.run(
                [*command, "--threads", str(args.threads)], check=True, capture_output=True, text=True
            )
            result = json.loads(done.stdout.splitlines()[-1])
            row |= {f"{way}_seconds": result["seconds"], f"{way}_peak_mb": result["peak_mb"]}
        row["ratio"] = row["capture_seconds"] / row["plain_seconds"]
        rows.append(row)
    machine = f"{platform.machine()}, {args.threads} threads, {rate / 1e9:.0f} GFLOP/s in q k^T products"
    if args.json:
        print(json.dumps({"machine": machine, "rows": rows}))
        return
    print(f"{machine}\n")
    print("| tokens | plain s | capture s | ratio | eager s | plain MB | capture MB | eager MB | q k^T floor s |")
    print("|-|-|-|-|-|-|-|-|-|")
    for row in rows:
        cells = [
            f"{row['tokens']:,.0f}",
            f"{row['plain_seconds']:.2f}",
            f"{row['capture_seconds']:.2f}",
            f"{row['ratio']:.2f}",
        ]
        cells.append(f"{row['eager_seconds']:.2f}" if "eager_seconds" in row else "not run")
        cells += [f"{row['plain_peak_mb']:.0f}", f"{row['capture_peak_mb']:.0f}"]
        cells.append(f"{row['eager_peak_mb']:.0f}" if "eager_peak_mb" in row else "not run")
        print("| " + " | ".join([*cells, f"{row['floor_seconds']:.2f}"]) + " |")


if __name__ == "__main__":
    main()
