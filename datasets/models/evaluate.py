"""What a bundled model can do, and its card."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from workbench.datasets.catalogue import task
from workbench.datasets.corpus import filler_text
from workbench.datasets.models.mixture import KINDS
from workbench.models.native_net import NativeNet
from workbench.pairs import accuracy

TASKS = tuple(kind for kind in KINDS if kind not in ("filler", "packed"))
"""The tasks that the bundled language models are trained on."""
_MIXTURE = (
    "generated text: IOI, greater-than, colored objects, docstring, induction with random period, needles in filler, "
    "filler, and rows of several documents (`mixture.py`); rows up to 192 tokens"
)
_START = (
    "random, except that five heads of layer 0 are set to attend 1, 1, 3, 4 and 6 tokens back (`look_back` in `train.py`); "
    "they train on from there, and what all other heads do is learned"
)
_PRICE = (
    "from step 2,000 on what heads write into the residual stream has a price (`written` in `train.py`), so that a head with "
    "nothing to say learns to say nothing"
)


@torch.no_grad()
def evaluate(net: NativeNet, tokenizer: Any, n: int, longest: int, lengths: bool = False) -> dict[str, float]:
    """Accuracy per task on its test split, and what the first token receives.

    Accuracy is the share of prompts whose largest logit is an answer. ``sink``: mean of ``first_token_share``; ``sink heads``:
    how many heads give it 0.3 or more; ``sink before gate``: the mean without gates.
    Needles at the longest trained length; with ``lengths=True`` also at half of it and beyond it.
    """
    found = {}
    for name in TASKS:
        options = {"length": longest} if name == "needle" else {}
        found[name] = _accuracy(net, tokenizer, n, name, **options)
    found["colored-objects, no shot"] = _accuracy(net, tokenizer, n, "colored-objects", shots=0)
    if lengths:
        for length in (longest // 2, longest * 2, longest * 4):
            found[f"needle, {length} tokens"] = _accuracy(net, tokenizer, n, "needle", length=length)
        for length in (12, 36):
            found[f"induction, {length} words"] = _accuracy(net, tokenizer, n, "induction", length=length)
    share = first_token_share(net, tokenizer)
    found["sink"] = round(share.mean().item(), 4)
    found["sink heads"] = int((share >= 0.3).sum())
    found["sink before gate"] = round(first_token_share(net, tokenizer, gated=False).mean().item(), 4)
    return found


def _accuracy(net: NativeNet, tokenizer: Any, n: int, name: str, **options: Any) -> float:
    pairs = task(name, split="test", **options).build(0, tokenizer, n)
    logits = torch.cat([net(rows) for rows in pairs.clean.split(64)])
    return round(accuracy(logits, pairs).mean().item(), 4)


@torch.no_grad()
def first_token_share(net: NativeNet, tokenizer: Any, gated: bool = True) -> torch.Tensor:
    """Mean weight of the first token per layer and head ``[L, H]``, over later queries on eight texts of 96 filler words.

    For a gated model the weight that reaches the output, gate times softmax weight; with ``gated=False`` the softmax weight.
    """
    ids = torch.tensor(tokenizer([filler_text(seed, 96) for seed in range(8)])["input_ids"])
    seen: dict[str, torch.Tensor] = {}

    def keep(value: torch.Tensor, hook: Any) -> torch.Tensor:
        seen[hook.name] = value
        return value

    points = {n: p for n, p in net.hook_dict.items() if n.endswith(("mixer.hook_pattern", "mixer.hook_gate"))}
    try:
        for point in points.values():
            point.add_hook(keep)
        net(ids)
    finally:
        for point in points.values():
            point.remove_hooks()
    shares = []
    for layer in range(net.config.layers):
        weight = seen[f"blocks.{layer}.attn.mixer.hook_pattern"][:, :, 1:, 0]
        gate = seen.get(f"blocks.{layer}.attn.mixer.hook_gate")
        shares.append((weight * gate[:, 1:].transpose(1, 2) if gated and gate is not None else weight).mean((0, 2)))
    return torch.stack(shares)


def card(args: argparse.Namespace, net: NativeNet, found: dict[str, float], longest: int) -> str:
    """The model's card in Markdown."""
    c = net.config
    rows = "\n".join(f"| {name} | {100 * value:.1f}% |" for name, value in found.items() if not name.startswith("sink"))
    size = sum(p.numel() for p in net.parameters())
    shape = f"{c.layers} layers, {c.heads} heads of {c.head_width}, width {c.width}, MLP {c.mlp_width}"
    parts = f"{c.positions} positions, {c.norm} norm, {'tied' if c.tied else 'untied'} embeddings"
    heads = c.layers * c.heads
    before = f"\nBefore the gate the mean is {found['sink before gate']:.3f}." if "gated" in c.mixer else ""
    *solved, last = [name for name in TASKS if found[name] >= 0.95]
    named = f"{', '.join(solved)} and {last}" if solved else last
    return f"""# {args.model}

A small causal transformer that solves the tasks {named} of this workbench; made to be looked into. Not a language model.

| | |
|-|-|
| architecture | {shape}, {parts} |
| mixer | {c.mixer} |
| parameters | {size:,}, stored as float16 |
| vocabulary | {c.vocab} words (`tokenizer.json`; `<bos>` first) |
| trained on | {_MIXTURE} |
| recipe | AdamW, peak rate {args.rate}, decay 0.1, {args.steps} steps, seed {args.seed} |
| start | {_START} |
| price of writing | {_PRICE} |
| training time | {args.minutes:.0f} minutes on {args.threads} CPU thread(s) of a busy machine |

Again: `python -m workbench.datasets.models.train --model {args.model} --steps {args.steps} --seed {args.seed}`

## Accuracy

Share of {args.examples} prompts of each test split (disjoint from training by construction) whose largest logit is an
answer, measured on the stored weights. `needle` has {longest} tokens, the longest trained length, `induction` 24 words;
longer needles were never seen in training.

| task | accuracy |
|-|-|
{rows}

## First-token sink

Weight on `<bos>` that reaches the output, over layers, heads and later queries, on 96 words of filler (evenly spread
attention would give 0.04): {found["sink"]:.3f}; heads that give it 0.3 or more: {found["sink heads"]} of {heads}.{before}
"""
