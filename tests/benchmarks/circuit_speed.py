"""What scores of all edges by gradient take, in forward and backward passes.

    python tests/benchmarks/circuit_speed.py [--rounds 3] [--threads 2] [--pairs 16] [--ways eap,eap-ig ...] [--lens 1] [--json]

A native model of GPT-2-small's shape (12 layers of 12 heads, width 768, MLP 3072, vocabulary 50,257, random weights) and pairs
as long as an IOI prompt (15 tokens, 3 of them other in the corrupted prompt). Ratios are medians over rounds in which every
way has its turn, so that a busy machine slows all of them. ``forward+backward`` makes the gradients of all parameters;
``input gradients`` those of the embeddings alone, which is the least any attribution needs.

With ``--lens N`` TransformerLens's own attribution patching runs on a bridge of the same shape over N pairs, with forward and
backward of the bridge on the same N pairs as its measure; it takes one pair at a time, and minutes for edges.

Limits, told by the exit code: ``eap`` at most 6 forward+backward, ``eap-ig`` with 5 steps at most 5.5 ``eap``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

SHAPE = {"layers": 12, "heads": 12, "width": 768, "head_width": 64, "vocab": 50257, "mlp_width": 3072, "context": 1024}
LENGTH, CHANGED = 15, slice(5, 8)
LIMITS = (("eap", "forward+backward", 6.0), ("eap-ig", "eap", 5.5))
DEFAULT = "forward+backward,input gradients,eap,eap-ig"
EVERY = (
    "forward+backward",
    "input gradients",
    "eap",
    "eap-ig",
    "eap-nodes",
    "clean-corrupted",
    "atp-star",
    "relp",
    "ifr",
    "discrete-sae",
)


def model_and_pairs(number: int) -> tuple[Any, Any]:
    import torch

    from workbench.models.native import NativeModel
    from workbench.models.native_net import NativeConfig, NativeNet
    from workbench.pairs import Pairs

    torch.manual_seed(0)
    model = NativeModel(NativeNet(NativeConfig(**SHAPE, positions="learned")).eval(), name="gpt2-small shape")
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(SHAPE["vocab"], (number, LENGTH), generator=generator)
    corrupt = clean.clone()
    corrupt[:, CHANGED] = torch.randint(SHAPE["vocab"], corrupt[:, CHANGED].shape, generator=generator)
    ends = torch.randint(SHAPE["vocab"], (number, 2), generator=generator)
    return model, Pairs(clean, corrupt, ends[:, :1], ends[:, 1:], torch.full((number,), LENGTH - 1))


def ways(model: Any, pairs: Any) -> dict[str, Callable[[], Any]]:
    """Every row by name."""
    import torch

    import workbench as wb
    from workbench.pairs import logit_difference
    from workbench.probes.circuits.attribution import slopes
    from workbench.probes.circuits.components import INPUT, Setting

    setting = Setting.of(model, pairs)

    def passes() -> None:
        total = logit_difference(model.run(pairs.clean).logits, pairs).sum()
        torch.autograd.grad(total, list(model.net.parameters()))

    def find(method: str, level: str = "edge", **options: Any) -> Callable[[], Any]:
        return lambda: wb.find_circuit(model, pairs, method, level, **options)

    return {
        "forward+backward": passes,
        "input gradients": lambda: slopes(setting, pairs, [INPUT]),
        "eap": find("eap"),
        "eap-ig": find("eap-ig", steps=5),
        "eap-nodes": find("eap", "node"),
        "clean-corrupted": find("clean-corrupted"),
        "atp-star": find("atp-star", "node"),
        "relp": find("relp"),
        "ifr": find("ifr"),
        "discrete-sae": find("discrete-sae", "node", pooling="mean"),
    }


def lens_ways(number: int) -> dict[str, Callable[[], Any]]:
    """TransformerLens's attribution patching over a bridge of the same shape, and one forward and backward of the bridge."""
    import torch
    from tokenizers import Tokenizer, models
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, attribution_patch
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    config = GPT2Config()
    config.architectures = ["GPT2LMHeadModel"]
    net = GPT2LMHeadModel(config).eval()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0}, "<unk>")), unk_token="<unk>"
    )
    bridge = TransformerBridge.boot_transformers("gpt2", hf_model=net, tokenizer=tokenizer)
    _, pairs = model_and_pairs(number)

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return (logits[:, -1, pairs.answer[0, 0]] - logits[:, -1, pairs.wrong[0, 0]]).sum()

    def passes() -> None:
        torch.autograd.grad(
            metric(bridge(pairs.clean)), [p for p in net.parameters() if p.requires_grad], allow_unused=True
        )

    def lens(granularity: Any) -> Callable[[], Any]:
        return lambda: attribution_patch(
            bridge, pairs.clean, pairs.corrupt, metric, config=EdgeAttributionConfig(granularity=granularity)
        )

    return {"lens forward+backward": passes, "lens nodes": lens("node"), "lens edges": lens("edge")}


def measure(calls: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of every call in every round, and why others have none."""
    times: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    for _ in range(rounds):
        for name, call in calls.items():
            if name in failed:
                continue
            start, busy = time.perf_counter(), time.process_time()
            try:
                call()
            except Exception as error:  # a peer that cannot run here is a remark in its row
                failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"
                times.pop(name, None)
                continue
            times.setdefault(name, []).append(time.perf_counter() - start)
            print(f"{name}: {times[name][-1]:.2f} s, {time.process_time() - busy:.2f} s of processors", file=sys.stderr)
    return times, failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--ways", default=DEFAULT, help=f"names with commas between them, of: {', '.join(EVERY)}")
    parser.add_argument("--lens", type=int, default=0, help="pairs that TransformerLens takes; 0: not at all")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    asked = [name.strip() for name in args.ways.split(",")]
    for name in asked:
        if name not in EVERY:
            parser.error(f"no way {name!r}; known: {', '.join(EVERY)}")

    import torch
    from machine import high_water

    torch.set_num_threads(args.threads)
    model, pairs = model_and_pairs(args.pairs)
    known = ways(model, pairs)
    times, failed = measure({name: known[name] for name in asked}, args.rounds)
    peak = high_water()
    if args.lens:
        lens_times, lens_failed = measure(lens_ways(args.lens), 1)
        times, failed = {**times, **lens_times}, {**failed, **lens_failed}
    rows = []
    for name, taken in times.items():
        base = "lens forward+backward" if name.startswith("lens") else "forward+backward"
        row = {"way": name, "seconds": median(taken), "fastest": min(taken), "rounds": len(taken)}
        row["x_passes"] = ratio(taken, times.get(base))
        row["x_eap"] = ratio(taken, times.get("eap")) if base == "forward+backward" else None
        rows.append(row)
    rows += [{"way": name, "remark": why} for name, why in failed.items()]
    load = os.getloadavg()[0]
    machine = f"{platform.machine()}, {args.threads} threads, load {load:.1f}; {args.pairs} pairs of {LENGTH} tokens"
    broken = [
        f"{name} takes {found:.1f} times {base}, over the limit of {limit:g}"
        for name, base, limit in LIMITS
        if name in times and base in times and (found := ratio(times[name], times[base]) or 0.0) > limit
    ]
    if args.json:
        print(
            json.dumps(
                {"machine": machine, "torch": torch.__version__, "peak_gb": peak / 1e9, "rows": rows, "broken": broken}
            )
        )
    else:
        print(f"{machine}, peak {peak / 1e9:.1f} GB\n\n| way | s | fastest | x forward+backward | x eap |\n|-|-|-|-|-|")
        for row in rows:
            if "remark" in row:
                print(f"| {row['way']} | | | | {row['remark']} |")
            else:
                cells = [
                    "" if row[key] is None else f"{row[key]:.2f}" for key in ("seconds", "fastest", "x_passes", "x_eap")
                ]
                print(f"| {row['way']} | {' | '.join(cells)} |")
    for line in broken:
        print(line, file=sys.stderr)
    return 1 if broken else 0


def ratio(taken: list[float], base: list[float] | None) -> float | None:
    """Median over the rounds that both have."""
    return median([a / b for a, b in zip(taken, base, strict=False)]) if base else None


if __name__ == "__main__":
    sys.exit(main())
