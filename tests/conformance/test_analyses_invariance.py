"""What every analysis of maps must do whatever describes the map, however many sequences there are, and however long they are."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from analysis_calls import (
    BY_MAPS,
    ENDS,
    IMAGES,
    LENGTHS,
    RECORDS,
    Maps,
    N,
    alike,
    answer,
    ask,
    askable,
    dense,
    gated,
    layers,
    marked,
    native,
    numbers,
    padded_runs,
    same,
    softmax_maps,
    table,
    texts,
)
from builders import BUILDERS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import workbench as wb
from workbench.captures import STATS, capture
from workbench.errors import Refused, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap
from workbench.models.protocol import Tokens
from workbench.patterns.softmax import SoftmaxMap
from workbench.probes.examples import random_rows
from workbench.probes.similarity import rank
from workbench.probes.structure import map_frequencies
from workbench.probes.tables import HeadTable, LayerTable
from workbench.run import Maps as RunMaps
from workbench.run import Run

NAMES = [name for name in BY_MAPS if askable(name)]
BY_RUN = (
    "value-drain", "inactive-heads", "head-cascade", "stream-collapse", "output-redundancy", "sink-alignment", "sink-levels",
    "massive-activations",
)  # fmt: skip
"""Analyses of a run that say something of every model, without words for its tokens."""


MASKS = {
    "causal": (Mask(causal=True), N, N),
    "window": (Mask(causal=True, window=4), N, N),
    "both ways": (Mask(), N, N),
    "behind a cache": (Mask(causal=True, offset=7), 6, N),
}


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("mask", MASKS)
def test_a_map_has_one_answer_in_every_form(name: str, mask: str, batch: int) -> None:
    who, queries, keys = MASKS[mask]
    sizes = {"batch": batch, "queries": queries, "keys": keys}
    exact, single = softmax_maps(who, **sizes), softmax_maps(who, torch.float32, **sizes)
    wanted = answer(name, exact)
    for form in (single, dense(exact), dense(exact, torch.float32)):
        same(answer(name, form), wanted)
    same(answer(name, gated(dense(exact))), answer(name, gated(exact)))


@cache
def captured(model: str) -> tuple[Run, Run]:
    """A run of two texts, and the same with its maps as numbers."""
    with torch.no_grad():
        asked = native() if model == "native" else BUILDERS[model]().model
        run = asked.run(texts(N, N)[0], maps=capture(stats=("received", "entropy")), logits=None)
    return run, dataclasses.replace(run, maps=RunMaps(dict(zip(run.maps, dense(layers(run)), strict=True))))


@pytest.mark.parametrize("model", ["native", "hf-gemma2"])
def test_captured_runs_answer_as_their_numbers_do(name: str, model: str) -> None:
    """A native model, and one of Hugging Face with windows and a cap on its scores, both with grouped heads."""
    run, told = captured(model)
    same(answer(name, told), answer(name, run), 2e-5)


ONE = {"token-importance": "of one sequence", "positional-share": "compares sequences with each other"}
"""What is not asked of a batch, or not of a single sequence."""


@pytest.mark.parametrize("mask", ["causal", "both ways"])
def test_a_batch_says_what_its_sequences_say_alone(name: str, mask: str) -> None:
    who = MASKS[mask][0]
    batch = softmax_maps(who, batch=3)
    alone = [
        [SoftmaxMap(m.scores.q[b, None], m.scores.k[b, None], mask=who, scale=0.7) for m in batch] for b in range(3)
    ]
    if (name, mask) == ("rhythm", "both ways"):
        pytest.skip("which heads are local is decided over the batch, and hangs on it")
    if name in ONE:
        assert isinstance(answer(name, batch), WorkbenchError) or isinstance(answer(name, alone[0]), WorkbenchError)
    else:
        alike(name, ask(name, batch), [ask(name, maps) for maps in alone])


UNPADDED = {
    "selection-curves": "blocks begin where the array begins",
    **dict.fromkeys(IMAGES, "images have no padding"),
}
PLACED = {("receiver-heads", "left"): ("kurtosis_null",)}
"""Nulls that shuffle by place in the array."""


@pytest.mark.parametrize("form", ["softmax", "numbers", "gated"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_never_counts(name: str, side: str, form: str) -> None:
    by_map = "amap" in inspect.signature(RECORDS[name].function).parameters
    if name in ONE or name in UNPADDED or (by_map and form != "softmax"):
        pytest.skip(ONE.get(name) or UNPADDED.get(name) or "numbers of a single map do not tell what is padding")
    batch, alone, real = padded_runs(side, form)
    whole = ask(name, batch, **marked(name, real))
    parts = [ask(name, run, **marked(name, run.tokens.mask)) for run in alone]
    if not isinstance(whole, Tensor) or N not in whole.shape:
        alike(name, whole, parts, skip=PLACED.get((name, side), ()), starts=real.int().argmax(1).tolist())
        return
    for found, part, on in zip(whole, parts, real, strict=True):
        square = found.shape[0] == N  # a row per token as well
        inside = found[on][:, on] if square else found[:, on]
        torch.testing.assert_close(inside, part[0], atol=1e-9, rtol=1e-9, equal_nan=True)
        assert bool((found[~on] if square else found[:, ~on]).isnan().all())


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", BY_RUN)
def test_a_padded_batch_of_a_model_says_what_its_texts_say_alone(name: str, side: str) -> None:
    model, (together, alone) = native(), texts(*LENGTHS, side=side)
    reads = [site.format(l=layer) for site in RECORDS[name].reads for layer in range(model.shape.layers)]
    with torch.no_grad():
        whole, *parts = (
            RECORDS[name](model.run(text, read=reads, maps=capture(), logits=None)) for text in (together, *alone)
        )
    alike(name, whole, parts, starts=together.mask.int().argmax(1).tolist())


CHUNKS = ("_CHUNK", "CHUNK", "_ROWS")


def small_chunks(monkeypatch: pytest.MonkeyPatch, numbers: int, rows: int) -> None:
    """Every walk over a map takes so many numbers, or rows, at a time."""
    for name, module in list(sys.modules.items()):
        for constant in CHUNKS:
            if name.startswith("workbench.") and isinstance(getattr(module, constant, None), int):
                monkeypatch.setattr(module, constant, rows if constant == "_ROWS" else numbers)


def test_how_a_map_is_cut_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def answers() -> list[Any]:
        exact = softmax_maps(Mask(causal=True))
        return [answer(name, maps) for maps in (exact, dense(exact), gated(exact))]

    whole = answers()
    small_chunks(monkeypatch, 60, 3)
    for got, wanted in zip(answers(), whole, strict=True):
        same(got, wanted, 1e-7)


class Largest(TorchDispatchMode):
    """The number of numbers in the largest tensor that is made."""

    most, made = 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.numel() > self.most:
                self.most, self.made = tensor.numel(), f"{func} {list(tensor.shape)}"
        return out


LONG = 28**2 + 1
OPTIONS = {"selection-curves": {"size": 32}, "rollout": {"queries": [-1]}}
REFUSED = {
    "flow": "use rollout",
    "effective-rank": r"take rank_bounds\(map\)",
    "rank-collapse": "size= for block maps",
    "map-frequencies": "take size= for block maps",
    "dependency-tree": "pass candidates=16",
}
"""What is refused for a long text, and what the refusal names instead."""


def test_nothing_of_queries_times_keys_is_made(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four heads; a walk may hold 2^15 numbers of the map and some copies of them."""
    small_chunks(monkeypatch, 2**15, 32)
    for module in (rank, map_frequencies):
        monkeypatch.setattr(module, "EXACT", LONG - 1)
    sizes = {
        "batch": 2 if name == "positional-share" else 1,
        "queries": LONG,
        "keys": LONG,
        "layers": 6 if name == "flow" else 2,
    }
    maps = softmax_maps(Mask(causal=True), torch.float32, **sizes)
    with Largest() as seen:
        if name in REFUSED:
            with pytest.raises(Refused, match=REFUSED[name]):
                ask(name, maps)
        else:
            ask(name, maps, **OPTIONS.get(name, {}))
    assert seen.most < LONG**2 / 4, f"{seen.made}"


FROM_STATISTICS = ("received", "sinks", "waad", "head-spans", "selection-curves", "oracle-recall", "hiprune")
STATISTICS = capture(stats=STATS, topk=N, window=4, blocks=4, keep=False)


@pytest.mark.parametrize("form", ["softmax", "gated"])
def test_statistics_alone_answer_or_say_what_to_capture(name: str, form: str) -> None:
    def maps() -> Maps:
        found = softmax_maps(Mask(causal=True))
        return gated(found) if form == "gated" else found

    got = answer(name, [amap.precompute(STATISTICS) for amap in maps()])
    if isinstance(got, WorkbenchError):
        assert name not in FROM_STATISTICS
        assert "keep=True" in str(got) or name in ONE
    else:
        same(got, ask(name, maps()))


def test_statistics_without_a_mask_ask_for_one() -> None:
    maps = softmax_maps(Mask(causal=True))[:1]
    numbered = AttentionMap.from_dense(maps[0].dense()).precompute(STATISTICS)
    with pytest.raises(Refused, match=r"give mask=Mask\(...\) where the analysis takes one"):
        ask("sinks", [numbered])
    same(ask("sinks", [numbered], mask=Mask(causal=True)), ask("sinks", maps))


VARIANTS = (
    "multi-head-attention", "dilated-window-attention", "streaming-llm-attention", "neighborhood-attention",
    "tcpa-prompt-attention", "flashblock-attention", "headwise-gated-attention", "elementwise-gated-attention",
    "sigmoid-attention", "histogram-bin-attention", "histogram-self-attention", "urpe-attention", "rcmha", "reversed-attention",
    "native-sparse-attention", "block-probe", "linear-attention", "rwkv-4", "mamba", "deltanet", "titans-memory-as-context",
    "efficient-channel-attention", "triple-attention", "agent-attention", "recursive-gated-convolution", "ffnified-attention",
    "transform-once", "gated-class-attention", "cascade-token-and-head-pruning", "selective-channel-attention",
)  # fmt: skip
"""Every family, domain, sign, row sum, order 3, weights per channel, rectangles, offsets, heads without weight."""
PLACELESS = (
    "overfocus", "attention-diversity", "head-sharing", "head-patterns", "effective-rank", "rank-collapse", "head-redundancy",
    "layer-sharing", "map-stability", "row-stability", "temporal-bands", "temporal-disparity", "map-frequencies",
    "selection-curves",
)  # fmt: skip
"""What asks for no place in a text: rows and columns may be blocks, channels or frequencies."""
TOLD_IN_FIELDS = ("sinks",)
"""Results whose fields say where they are NaN: their ``undefined`` names layers that do not count."""


NULLS = ("low", "high", "error", "uniform", "even", "null")


def honest(name: str, result: Any) -> None:
    """Finite, or NaN with a reason."""
    frame = table(result)
    assert len(frame), name
    for column in numbers(frame):
        assert not np.isinf(frame[column]).any(), f"{name} {column}"
        told = column in NULLS or column.endswith((*ENDS, "_null")) or name in TOLD_IN_FIELDS
        if not told and frame[column].isna().any() and hasattr(result, "undefined"):
            assert result.undefined, f"{name}: {column} is NaN, and nothing says why"


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_answered_or_refused(variant: str) -> None:
    record = wb.variants()[variant]
    maps = [record(**record.example(seed, 12, torch.float64))[1] for seed in range(3)]
    for name in NAMES:
        result = answer(name, maps)
        if not isinstance(result, WorkbenchError):
            assert maps[0].domain == "token" or name in PLACELESS, f"{name} takes {maps[0].domain}s for tokens"
            honest(name, result)


def causal_rows(n: int = 12) -> Tensor:
    return random_rows(2, 3, n, seed=4)


def without(index: Any) -> Tensor:
    rows = causal_rows()
    rows[index] = 0.0
    return rows


DEGENERATE = {
    "no weight": torch.zeros(2, 3, 12, 12),
    "even": torch.full((2, 3, 12, 12), 1 / 12),
    "itself": torch.eye(12).expand(2, 3, 12, 12),
    "the first token": torch.eye(12)[:1].expand(2, 3, 12, 12),
    "a head without weight": without((slice(None), 1)),
    "a query without weight": without((slice(None), slice(None), 5)),
    "a key without weight": without((..., 0)),
    "a sequence without weight": without(1),
    "one head": causal_rows()[:, :1],
    **{f"{n} tokens": causal_rows(n) for n in (1, 2, 3)},
}
MASSES = {
    "overfocus": ("focused",), "received": ("received", "most", "mass"), "sinks": ("share",),
    "sink-use": ("first", "itself", "rest", "sum"), "block-rank": ("across",), "head-kv": ("importance",),
    "query-heads": ("score",), "waad": ("value",), "fai": ("value",), "rollout": ("value",), "flow": ("flow", "rollout"),
    "head-patterns": ("mass",), "temporal-disparity": ("disparity",), "map-frequencies": ("variance",),
    "pointer-fidelity": ("fidelity",), "distance-spectra": ("weight",), "class-maps": ("mass", "largest"),
    "attention-distance": ("distance",), "attention-hops": ("strength",), "hiprune": ("object_mass", "deep_mass"),
    "attention-flow-heat": ("heat",), "patch-importance": ("importance", "relevance"),
    "outlier-attention": ("to_outliers", "to_others"),
}  # fmt: skip
"""Sums of weights and what is scaled from 0 on: 0 for maps without weight. Everything else is then unknown."""


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", DEGENERATE)
def test_what_is_unknown_is_never_a_number(name: str, case: str) -> None:
    weights = DEGENERATE[case].double()
    result = answer(name, [AttentionMap.from_dense(part, offset=0) for part in (weights, weights.flip(1), weights)])
    if isinstance(result, WorkbenchError):
        return
    honest(name, result)
    frame = table(result)
    measured = [c for c in numbers(frame) if c not in NULLS and not c.endswith((*ENDS, "_null"))]
    for column in measured if case == "no weight" else ():
        assert column in MASSES.get(name, ()) or not (frame[column] == 0).any(), f"{column} is 0, not unknown"


def test_a_sequence_of_padding_alone_changes_nothing(name: str) -> None:
    """Means over sequences are those of the one with tokens."""
    if name in UNPADDED or name in ONE or marked(name, torch.ones(1, N, dtype=torch.bool)):
        pytest.skip("images have no padding, batches may be refused, and a needle stands in tokens")
    batch, alone, _ = padded_runs("right", "softmax")
    real = torch.stack([torch.zeros(N, dtype=torch.bool), torch.ones(N, dtype=torch.bool)])
    hidden = Mask(causal=True, keys=real)
    maps = {i: SoftmaxMap(m.scores.q, m.scores.k, mask=hidden, scale=0.7) for i, m in enumerate(layers(batch))}
    result = answer(name, Run(Tokens(batch.tokens.ids, real), maps=RunMaps(maps)))
    if isinstance(result, HeadTable | LayerTable):
        alike(name, result, [ask(name, alone[1])])


def test_every_analysis_is_asked() -> None:
    assert NAMES == BY_MAPS, f"tell ask() in analysis_calls.py what {set(BY_MAPS) - set(NAMES)} take beside maps"
