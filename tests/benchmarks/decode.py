"""What capture costs while generating: seconds per decode step with and without it.

    python tests/benchmarks/decode.py [--prompt 512] [--steps 128] [--repeat 5] [--layers 2] [--device cpu] [--json]

A Llama-shaped model with random weights (8 layers of width 512, 8 heads of 64, 4 key-value heads) generates greedily by its own
``generate``. Ways alternate in one process: without capture, with the named number of layers, with all layers. A step is the time
between two tokens; the median over the steps of all repeats is reported, with its 10th and 90th percentile, and beside it the one
pass over all steps that computes statistics (received, entropy, top 8 keys of all captured layers) after the last token.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import time
from typing import Any

LAYERS, HEADS, KV_HEADS, HEAD_WIDTH, WIDTH, VOCAB = 8, 8, 4, 64, 512, 1000


def build(device: str, dtype: str) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import workbench as wb

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_WIDTH,
        vocab_size=VOCAB,
        max_position_embeddings=131072,
        attn_implementation="sdpa",
    )
    return wb.load(LlamaForCausalLM(config).to(device, getattr(torch, dtype)).eval())


def steps_of(model: Any, ids: Any, steps: int, request: Any) -> tuple[list[float], Any]:
    """Seconds between consecutive tokens, the first (the prompt) left out, and the result."""
    import torch

    import workbench as wb

    at: list[float] = []

    def stamp(tokens: Any, scores: Any, **options: Any) -> Any:
        if tokens.is_cuda:
            torch.cuda.synchronize()
        at.append(time.perf_counter())
        return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)

    found = wb.generate(model, ids, steps, request, eos_token_id=None, stopping_criteria=[stamp])
    return [b - a for a, b in itertools.pairwise(at)], found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    import torch

    import workbench as wb
    from workbench.models.requests import kept

    torch.set_num_threads(args.threads)
    model = build(args.device, args.dtype)
    ids = torch.randint(0, VOCAB, (1, args.prompt))
    some = tuple(range(0, LAYERS, max(1, LAYERS // args.layers)))[: args.layers]
    ways = {"plain": None, f"{len(some)} layers": wb.capture(layers=some), "all layers": wb.capture()}
    wanted = wb.capture(stats=("received", "entropy"), topk=8)
    taken: dict[str, list[float]] = {name: [] for name in ways}
    passes: dict[str, list[float]] = {name: [] for name in ways}
    steps_of(model, ids, 8, ways["all layers"])
    for i in range(args.repeat):
        order = list(ways) if i % 2 == 0 else list(ways)[::-1]
        for name in order:
            times, found = steps_of(model, ids, args.steps, ways[name])
            taken[name] += times
            start = time.perf_counter()
            for layer, amap in found.maps.items():
                kept(amap, wanted, layer)
            if args.device != "cpu":
                torch.cuda.synchronize()
            passes[name].append(time.perf_counter() - start)
    rows = []
    for name, times in taken.items():
        ten = statistics.quantiles(times, n=10)
        step, base = statistics.median(times), statistics.median(taken["plain"])
        rows.append(
            {
                "way": name,
                "step_ms": 1e3 * step,
                "p10_ms": 1e3 * ten[0],
                "p90_ms": 1e3 * ten[-1],
                "over_plain": step / base - 1,
                "pass_ms": 1e3 * statistics.median(passes[name]),
            }
        )
    name = torch.cuda.get_device_name() if args.device != "cpu" else f"{platform.machine()}, {args.threads} threads"
    machine = f"{name}, {args.dtype}; prompt {args.prompt}, {args.steps} steps, {LAYERS} layers"
    if args.json:
        print(json.dumps({"machine": machine, "rows": rows}))
        return
    print(f"{machine}\n")
    print("| way | step ms | p10 | p90 | over plain | pass at the end ms |")
    print("|-|-|-|-|-|-|")
    for row in rows:
        cells = [f"{row['step_ms']:.2f}", f"{row['p10_ms']:.2f}", f"{row['p90_ms']:.2f}", f"{row['over_plain']:+.1%}"]
        print("| " + " | ".join([str(row["way"]), *cells, f"{row['pass_ms']:.1f}"]) + " |")


if __name__ == "__main__":
    main()
