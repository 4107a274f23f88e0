"""How fast does a TopK autoencoder train, and how well, beside other trainers on the same rows?

    python tests/benchmarks/sae_training.py [--peers PYTHON] [--width 256] [--features 2048] [--k 32] [--batch 4096] [--json]
    python tests/benchmarks/sae_training.py --device cuda --width 4096 --features 65536 --k 64 --dtype bfloat16 --batch 8192

Ways: this workbench's ``Learner``; the same step in plain torch (dense code, dense decoder, Adam); and, with ``--peers`` naming a
Python that has sae-lens and dictionary-learning, their own training classes, SAELens with and without ``use_sparse_activations``.
All see the same rows in the same order, with the same number of threads, one after the other in rounds, each in a process of its
own.

Rows are sums of k / 2 of F random directions with sizes from 0.5 to 1.5 and 1% of noise. ``fvu``: share of the variance of
fresh rows that is not explained after all steps. The least arithmetic of a step is the encoder's product, 2 D F per row. On a GPU
forward and backward passes alone are compared with those of a dense implementation in the same dtype.

An environment: ``python -m venv peers``, then ``peers/bin/pip install sae-lens greenlet astor cloudpickle`` and
``peers/bin/pip install --no-deps dictionary-learning nnsight``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

OURS, PEERS = ("workbench", "plain torch"), ("dictionary_learning", "sae-lens", "sae-lens, sparse")
RATE = 6e-4
WARM = 5
"""Steps at the start that are not timed."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", help="a Python that has sae-lens and dictionary-learning")
    for name, value in {
        "width": 256,
        "features": 2048,
        "k": 32,
        "batch": 4096,
        "steps": 200,
        "threads": 2,
        "rounds": 3,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.way:
        print(json.dumps(measured(args)))
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        print("there is no CUDA device here; the figures of a GPU stay open", file=sys.stderr)
        return 2
    if args.device == "cuda":
        return on_gpu(args)
    ways = [*OURS, *(PEERS if args.peers else ())]
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.safetensors"
        save_file({"rows": rows(args)}, path)
        for _ in range(args.rounds):
            for way in ways:
                python = args.peers if way in PEERS else sys.executable
                options = [f"--{n}={getattr(args, n)}" for n in ("width", "features", "k", "batch", "steps", "threads")]
                command = [python, str(Path(__file__).resolve()), "--way", way, "--rows", str(path), *options]
                run = subprocess.run(command, capture_output=True, text=True, check=False)
                if run.returncode:
                    print(f"{way}: {run.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                    return 1
                found[way].append(json.loads(run.stdout.splitlines()[-1]))
    table = [
        {
            "way": way,
            "tokens_per_s": statistics.median(r["tokens_per_s"] for r in runs),
            "ratio": ratio(runs, found["workbench"]),
            "fvu": statistics.median(r["fvu"] for r in runs),
        }
        for way, runs in found.items()
    ]  # fmt: skip
    if args.json:
        print(json.dumps({"rows": table, "threads": args.threads}))
        return 0
    print(
        f"D {args.width}, F {args.features}, k {args.k}, batch {args.batch}, {args.steps} steps, {args.threads} threads"
    )
    for row in table:
        print(
            f"{row['way']:24} {row['tokens_per_s']:9,.0f} rows/s  {1 / row['ratio']:5.2f} x slower  fvu {row['fvu']:.3f}"
        )
    return 0


def ratio(runs: list[dict[str, float]], ours: list[dict[str, float]]) -> float:
    """Median over rounds of a way's speed as a share of ours."""
    return statistics.median(a["tokens_per_s"] / b["tokens_per_s"] for a, b in zip(runs, ours, strict=True))


def rows(args: argparse.Namespace) -> Tensor:
    """``[steps + 4, batch, width]`` at most 64 different batches, and 4 fresh ones at the end."""
    generator = torch.Generator().manual_seed(2026)
    truth = torch.randn(args.features, args.width, generator=generator)
    truth /= truth.norm(dim=1, keepdim=True)
    out = []
    for _ in range(min(args.steps, 64) + 4):
        on = torch.rand(args.batch, args.features, generator=generator) < args.k / 2 / args.features
        sizes = on * (0.5 + torch.rand(args.batch, args.features, generator=generator))
        x = sizes @ truth
        out.append(x + 0.01 * x.std() * torch.randn(x.shape, generator=generator))
    x = torch.stack(out)
    return x * (args.width**0.5 / x.norm(dim=2).mean())


def measured(args: argparse.Namespace) -> dict[str, float]:
    """Train by one way on the stored rows."""
    sys.path.pop(0)  # the benchmarks beside this file have names that packages look for
    x = load_file(args.rows)["rows"]
    batches, fresh = x[:-4], x[-4:].flatten(0, 1)
    step, reconstruct = MAKERS[args.way](args, batches[0])
    begun = 0.0
    for i in range(args.steps):
        if i == WARM:
            begun = time.perf_counter()
        step(batches[i % len(batches)], i)
    spent = time.perf_counter() - begun
    with torch.no_grad():
        output = reconstruct(fresh)
    fvu = float((output - fresh).pow(2).sum() / (fresh - fresh.mean(0)).pow(2).sum())
    return {"tokens_per_s": (args.steps - WARM) * args.batch / spent, "fvu": fvu}


Ways = tuple[Callable[[Tensor, int], Any], Callable[[Tensor], Tensor]]


def ours(args: argparse.Namespace, first: Tensor) -> Ways:
    from workbench.coders.catalogue import make_coder
    from workbench.coders.learner import Learner

    coder = make_coder("topk", args.width, args.features, k=args.k, generator=torch.Generator().manual_seed(0))
    learner = Learner(coder, steps=args.steps, rows=args.batch, rate=RATE, normalise="none")
    learner.start(first)
    return lambda x, i: learner.step(x), coder


def plain(args: argparse.Namespace, first: Tensor) -> Ways:
    torch.manual_seed(0)
    d, f = args.width, args.features
    decoder = torch.nn.functional.normalize(torch.randn(f, d), dim=1)
    weights = [torch.nn.Parameter(w) for w in (decoder.T.clone(), torch.zeros(f), decoder, first.mean(0))]
    optimiser = torch.optim.Adam(weights, lr=RATE)

    def reconstruct(x: Tensor) -> Tensor:
        read, shift, write, centre = weights
        top = ((x - centre) @ read + shift).topk(args.k, dim=1)
        code = torch.zeros(len(x), f).scatter(1, top.indices, top.values.relu())
        return code @ write + centre

    def step(x: Tensor, i: int) -> None:
        optimiser.param_groups[0]["lr"] = schedule(i, args.steps)
        loss = (reconstruct(x) - x).pow(2).sum(1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            weights[2].div_(weights[2].norm(dim=1, keepdim=True))

    return step, reconstruct


def lens(args: argparse.Namespace, first: Tensor, sparse: bool) -> Ways:
    from sae_lens.saes.sae import TrainStepInput
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    torch.manual_seed(0)
    # With sparse activations its default of rescaling by decoder norms has no backward pass in torch 2.13.
    given = {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False} if sparse else {}
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=args.width, d_sae=args.features, k=args.k, **given))
    optimiser = torch.optim.Adam(sae.parameters(), lr=RATE)
    silent = torch.zeros(args.features)

    def step(x: Tensor, i: int) -> None:
        nonlocal silent
        optimiser.param_groups[0]["lr"] = schedule(i, args.steps)
        given = TrainStepInput(x, {}, silent > 1000, i, False)
        output = sae.training_forward_pass(given)
        optimiser.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimiser.step()
        acts = output.feature_acts.detach()
        fired = acts.to_dense() if acts.is_sparse else acts
        silent = torch.where((fired > 0).any(0), 0.0, silent + 1)

    return step, sae


def dictionary(args: argparse.Namespace, first: Tensor) -> Ways:
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        steps=args.steps, activation_dim=args.width, dict_size=args.features, k=args.k, layer=0, lm_name="", lr=RATE,
        warmup_steps=max(1, args.steps // 50), decay_start=int(0.8 * args.steps), seed=0, device="cpu",
    )  # fmt: skip
    return lambda x, i: trainer.update(i, x), trainer.ae


def schedule(i: int, steps: int) -> float:
    """The rate of a step, the same for every way."""
    return RATE * min(1.0, (i + 1) / max(1.0, steps / 50)) * min(1.0, (steps - i) / (0.2 * steps))


def on_gpu(args: argparse.Namespace) -> int:
    """Forward and backward passes of this workbench's form and of a dense one, in turn."""
    from workbench.coders.catalogue import make_coder
    from workbench.coders.coder import Progress

    dtype, device = getattr(torch, args.dtype), torch.device("cuda")
    x = torch.randn(args.batch, args.width, device=device, dtype=dtype)
    coder = make_coder("topk", args.width, args.features, k=args.k).to(device, dtype)
    now = Progress(0, 1, torch.zeros(args.features, dtype=torch.int64, device=device), 10)

    def sparse() -> None:
        coder.zero_grad()
        coder.objective(x, x, now).loss.backward()

    def dense() -> None:
        coder.zero_grad()
        top = coder.pre(x).topk(args.k, dim=1)
        code = x.new_zeros(len(x), args.features).scatter(1, top.indices, top.values.relu())
        (coder.decode(code) - x).pow(2).sum(1).mean().backward()

    found: dict[str, list[float]] = {"workbench": [], "dense": []}
    for round_ in range(args.rounds + 1):
        for name, call in (("workbench", sparse), ("dense", dense)):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            for _ in range(5):
                call()
            torch.cuda.synchronize()
            if round_:
                found[name].append((time.perf_counter() - begun) / 5)
    medians = {name: statistics.median(times) for name, times in found.items()}
    row = {"device": torch.cuda.get_device_name(), **medians, "speedup": medians["dense"] / medians["workbench"]}
    print(json.dumps(row) if args.json else row)
    return 0


MAKERS: dict[str, Callable[[argparse.Namespace, Tensor], Ways]] = {
    "workbench": ours,
    "plain torch": plain,
    "dictionary_learning": dictionary,
    "sae-lens": lambda args, first: lens(args, first, False),
    "sae-lens, sparse": lambda args, first: lens(args, first, True),
}


if __name__ == "__main__":
    sys.exit(main())
