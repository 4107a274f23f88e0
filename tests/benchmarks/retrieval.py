"""What a sweep for retrieval heads takes at a long context: seconds and memory.

    python tests/benchmarks/retrieval.py [--tokens 32768] [--depths 2] [--steps 8] [--layers 4] [--limit 8] [--json]

A Llama-shaped model with random weights (8 heads, 4 key-value heads) is asked for a needle of 16 tokens at every depth, as
``wb.retrieval_heads`` does it: the prompt once, then one query and one attention row per step. It retrieves nothing, which
changes no cost. Peak memory is the process's own (resident set), and exceeding ``--limit`` gigabytes ends with exit code 1.
Beside it stands what the maps alone would take if they were stored.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from typing import Any

HEADS, KV_HEADS, VOCAB, NEEDLE = 8, 4, 1000, 16


def build(layers: int, width: int, tokens: int, device: str) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import workbench as wb

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=VOCAB,
        max_position_embeddings=tokens + 64,
        attn_implementation="sdpa",
    )
    return wb.load(LlamaForCausalLM(config).to(device).eval())


def prompts(device: str) -> Any:
    """Random tokens with a needle of tokens that occur nowhere else."""
    import torch

    from workbench.pairs import Pairs

    def make(length: int, depth: float, seed: int) -> Pairs:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(NEEDLE, VOCAB, (1, length), generator=generator)
        at = round(depth * (length - NEEDLE - 1))
        ids[0, at : at + NEEDLE] = torch.arange(NEEDLE)
        span = torch.tensor([[at, at + NEEDLE]])
        nothing = torch.full((1, 1), -1)
        ids = ids.to(device)
        return Pairs(ids, ids, nothing, nothing, torch.tensor([length - 1]), {"NEEDLE": span})

    return make


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--depths", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--limit", type=float, default=8.0, help="gigabytes of memory that must not be exceeded")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    import torch
    from machine import high_water

    import workbench as wb

    torch.set_num_threads(args.threads)
    model = build(args.layers, args.width, args.tokens, args.device)
    make = prompts(args.device)
    wb.retrieval_heads(model, min(256, args.tokens), 1, prompts=make, max_new_tokens=2)
    before = high_water()
    start = time.perf_counter()
    result = wb.retrieval_heads(model, args.tokens, args.depths, prompts=make, max_new_tokens=args.steps)
    taken = time.perf_counter() - start
    row = {
        "tokens": args.tokens,
        "prompts": len(result.recall),
        "steps": args.steps,
        "seconds": taken,
        "seconds_per_prompt": taken / len(result.recall),
        "peak_gb": high_water() / 1e9,
        "before_gb": before / 1e9,
        "maps_gb": 4 * args.layers * HEADS * args.tokens**2 / 1e9,
        "limit_gb": args.limit,
        "shape": list(result.copied.shape),
    }
    if args.device != "cpu":
        row["device_gb"] = torch.cuda.max_memory_allocated() / 1e9
    name = torch.cuda.get_device_name() if args.device != "cpu" else f"{platform.machine()}, {args.threads} threads"
    machine = f"{name}; {args.layers} layers, width {args.width}, {HEADS} heads, {KV_HEADS} key-value heads, float32"
    if args.json:
        print(json.dumps({"machine": machine, "rows": [row]}))
    else:
        print(f"{machine}\n")
        print("| tokens | prompts | steps | s per prompt | peak GB | before GB | maps, if stored, GB |")
        print("|-|-|-|-|-|-|-|")
        print(
            f"| {row['tokens']:,} | {row['prompts']} | {row['steps']} | {row['seconds_per_prompt']:.1f} | "
            f"{row['peak_gb']:.2f} | {row['before_gb']:.2f} | {row['maps_gb']:.1f} |"
        )
    if row["peak_gb"] > args.limit:
        print(f"peak memory {row['peak_gb']:.2f} GB exceeds {args.limit:g} GB", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
