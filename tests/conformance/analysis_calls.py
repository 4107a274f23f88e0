"""How to ask an analysis of maps about any maps, maps in many forms, and when two answers are the same."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap, GatedMap
from workbench.models.native import NativeModel
from workbench.models.native_net import NativeConfig, NativeNet
from workbench.models.protocol import Tokens
from workbench.patterns.softmax import SoftmaxMap
from workbench.probes.catalogue import analyses
from workbench.probes.retrieval.documents import Documents
from workbench.probes.retrieval.streaming import Streaming
from workbench.probes.vision.grid import Grid
from workbench.probes.vision.registers import OutlierTokens
from workbench.run import Maps as RunMaps
from workbench.run import Run

RECORDS = analyses()
BY_MAPS = [name for name, record in RECORDS.items() if record.source == "maps"]

Maps = list[AttentionMap]
"""A map per layer, all of one shape."""


def ask(name: str, source: Maps | Run, **options: Any) -> Any:
    """The answer of an analysis to maps, or to a run's. ``options`` replace what it is given beside them."""
    record = RECORDS[name]
    first = next(iter(inspect.signature(record.function).parameters))
    given: dict[str, Any] = {first: layers(source)[0] if first == "amap" else source}
    if name in _BESIDE:
        given |= _BESIDE[name](layers(source))
    if name in _TWICE:
        given[_TWICE[name]] = turned(source)
    return record(**{**given, **options})


def layers(source: Maps | Run) -> Maps:
    return list(source.maps.values()) if isinstance(source, Run) else source


def turned(source: Maps | Run) -> Maps | Run:
    """The same maps in the other order of layers."""
    if isinstance(source, Run):
        return replace(source, maps=RunMaps(dict(zip(source.maps, layers(source)[::-1], strict=True))))
    return source[::-1]


def askable(name: str) -> bool:
    """Whether ``ask`` knows what the analysis takes."""
    wanted = list(inspect.signature(RECORDS[name].function).parameters.values())[1:]
    return name in _BESIDE or all(parameter.default is not inspect.Parameter.empty for parameter in wanted)


def _documents(maps: Maps) -> Documents:
    b, _, _, n = maps[0].shape
    third = max(1, n // 4)
    ranges = torch.tensor([[[0, third], [third, 2 * third]]] * b)
    gold = torch.zeros(b, 2, dtype=torch.bool)
    gold[:, 1] = True
    query = torch.tensor([[max(2 * third, n - 3), n]] * b)
    ids = torch.zeros(b, n, dtype=torch.long)
    return Documents(ids, ranges, gold, query, ids, query)


def _spans(maps: Maps) -> Tensor:
    n = maps[0].shape[3]
    return torch.tensor([[n // 4, n // 4 + 2]] * maps[0].shape[0])


def grid(maps: Maps) -> Grid:
    """A class token and the most even rows of patches that fill the rest."""
    n = maps[0].shape[3] - 1
    if n < 1:
        raise WorkbenchError("no token is left for a patch beside the class token")
    rows = max(r for r in range(1, int(n**0.5) + 1) if n % r == 0)
    return Grid(rows, n // rows, (4, 4), start=1, cls=0, tokens=n + 1)


def _outliers(maps: Maps) -> OutlierTokens:
    own = grid(maps)
    norm = torch.ones(maps[0].shape[0], own.patches, dtype=torch.float64)
    norm[:, 0] = 10.0
    return OutlierTokens(norm, norm > 5, norm.new_ones(len(norm), 1), 5.0, 1.0, "tokens", own)


def _images(maps: Maps) -> Tensor:
    """The same for every sequence, so that one of a batch is as alone."""
    noise = torch.rand(1, 3, *grid(maps).size, generator=torch.Generator().manual_seed(0))
    return noise.expand(maps[0].shape[0], -1, -1, -1)


_SQUARE = AttentionMap.from_dense(torch.full((1, 1, 10, 10), 0.1))
_BESIDE: dict[str, Callable[[Maps], dict[str, Any]]] = {
    "block-rank": lambda maps: {"prompts": _documents(maps)},
    "head-kv": lambda maps: {"spans": _spans(maps), "window": min(4, maps[0].shape[2])},
    "query-heads": lambda maps: {"prompts": _documents(maps)},
    "razor-recall": lambda maps: {"kept": [(0, 1)], "policy": Streaming(1, 4)},
    "map-stability": lambda maps: {},
    "temporal-disparity": lambda maps: {"reference": 0},
    "selection-curves": lambda maps: {"scores": {}, "size": 4},
    "pointer-fidelity": lambda maps: {"targets": torch.arange(maps[0].shape[2]) - 1 + maps[0].offset},
    "receiver-heads": lambda maps: {"near": 1, "least": 2},
    "rhythm": lambda maps: {"window": 4, "clip": (2, 6), "share": 0.25},
    "fai": lambda maps: {"clip": (2, 6)},
    "waad": lambda maps: {"window": 4},
    "class-maps": lambda maps: {"grid": grid(maps)},
    "dependency-tree": lambda maps: {"grid": grid(maps), "draws": 2},
    "attention-distance": lambda maps: {"grid": grid(maps)},
    "attention-hops": lambda maps: {"grid": grid(maps)},
    "outlier-attention": lambda maps: {"found": _outliers(maps)},
    "attention-flow-heat": lambda maps: {"grid": grid(maps)},
    "patch-importance": lambda maps: {"grid": grid(maps), "images": _images(maps)},
    "hiprune": lambda maps: {"grid": grid(maps), "keep": max(1, grid(maps).patches // 2), "draws": 4},
}
_TWICE = {"query-heads": "null", "map-stability": "after"}
"""What takes a second run."""
IMAGES = tuple(name for name, beside in _BESIDE.items() if {"grid", "found"} & set(beside([_SQUARE])))
"""Analyses of patches, which know no padding."""

HEADS, GROUPS, WIDTH, N, LAYERS = 4, 2, 6, 13, 3
SLOPES = (-3.0, -0.2, 0.1, 3.0)
"""Scores change by so much per token of distance: a head in four is local and one in four global in every sequence."""
ENDS = ("_low", "_high")
"""Ends of the names of columns that hold intervals."""


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax_maps(
    mask: Mask,
    dtype: torch.dtype = torch.float64,
    *,
    batch: int = 2,
    queries: int = N,
    keys: int = N,
    layers: int = LAYERS,
) -> list[SoftmaxMap]:
    """Grouped heads. In float32 also the denominators are told, as a kernel leaves them."""
    found = []
    for layer in range(layers):
        q, k = rand(layer, batch, HEADS, queries, WIDTH), rand(50 + layer, batch, GROUPS, keys, WIDTH)
        q[..., -1] = torch.tensor(SLOPES, dtype=torch.float64)[:, None]
        k[..., -1] = -torch.arange(keys, dtype=torch.float64)
        amap = SoftmaxMap(q.to(dtype), k.to(dtype), mask=mask, scale=0.7)
        lse = None if dtype == torch.float64 else amap.lse
        found.append(SoftmaxMap(q.to(dtype), k.to(dtype), lse, mask=mask, scale=0.7))
    return found


def dense(maps: Maps, dtype: torch.dtype = torch.float64) -> Maps:
    """The same as numbers, told who may see whom, which the nulls need to know."""
    return [
        AttentionMap.from_dense(
            m.dense().to(dtype), offset=m.offset, kv_heads=m.kv_heads, mask=getattr(m, "mask", None)
        )
        for m in maps
    ]


def gated(maps: Maps) -> Maps:
    return [GatedMap(amap, rand(70 + i, *amap.shape[:3]).sigmoid()) for i, amap in enumerate(maps)]


def answer(name: str, source: Any, **options: Any) -> Any:
    """What the analysis says, or the refusal."""
    try:
        return ask(name, source, **options)
    except WorkbenchError as error:
        return error


def table(result: Any) -> pd.DataFrame:
    return pd.DataFrame({"value": result.flatten()}) if isinstance(result, Tensor) else result.frame()


def numbers(frame: pd.DataFrame) -> list[str]:
    return [column for column in frame.columns if frame[column].dtype.kind == "f"]


def same(got: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    if isinstance(got, Exception) or isinstance(wanted, Exception):
        assert type(got) is type(wanted), f"{got!r} against {wanted!r}"
        return
    a, b = table(got), table(wanted)
    assert list(a.columns) == list(b.columns)
    for column in a.columns:
        if column in numbers(b):
            np.testing.assert_allclose(a[column], b[column], atol=tolerance, rtol=tolerance, err_msg=column)
        else:
            assert a[column].tolist() == b[column].tolist(), column


POOLED = {
    "head-sharing": {"nearest": "the head that is nearest on average over the batch", "partner": "which head that is"},
    "head-redundancy": {
        "nearest": "the head that is nearest on average over the batch",
        "partner": "which head that is",
    },
    "selection-curves": {"recall": "query blocks of all sequences count alike; random blocks are drawn for the batch"},
    "sinks": {"error": "the standard error over sequences", "queries": "sequences without the key count 0"},
    "inactive-heads": {"inactive": "the smallest of all heads on average over the batch"},
    "output-redundancy": {
        "nearest": "the head that is nearest on average over the batch",
        "partner": "which head that is",
    },
    "patch-importance": {"entropy_null": "pixels are shuffled for the batch"},
    "hiprune": {"object_mass_null": "patches are drawn for the batch"},
}
"""Columns that are no mean over sequences, and why."""


PLACES = (
    "layer",
    "other",
    "head",
    "sequence",
    "image",
    "position",
    "patch",
    "key",
    "near",
    "rule",
    "kept",
    "map",
    "place",
    "query",
)


def alike(
    name: str, whole: Any, parts: list[Any], *, skip: tuple[str, ...] = (), starts: list[int] | None = None
) -> None:
    """The batch says of each sequence what the sequence says alone: row by row where rows are of sequences, else on average.

    ``starts`` are the places at which sequences begin in the batch; where they do not reach, the batch has NaN.
    """
    if isinstance(whole, Tensor):
        torch.testing.assert_close(whole, torch.cat(parts), atol=1e-7, rtol=1e-7, equal_nan=True)
        return
    frame, pieces = whole.frame(), []
    for b, part in enumerate(parts):
        own = part.frame()
        own = own.assign(**{column: b for column in ("sequence", "image") if column in own})
        if starts is not None and "position" in own and name != "received":  # which counts from the first real token
            own["position"] += starts[b]
        pieces.append(own)
    keys = [column for column in PLACES if column in frame]
    skipped = {"low", "high", *skip, *POOLED.get(name, ())}
    measures = [c for c in numbers(frame) if c not in keys and not c.endswith(ENDS) and not {c, c[:-5]} & skipped]
    wanted = pd.concat(pieces).groupby(keys, sort=False)[measures].mean()
    got = frame.set_index(keys)[measures]
    for column in measures:
        np.testing.assert_allclose(
            got[column], wanted[column].reindex(got.index), atol=1e-7, rtol=1e-7, err_msg=f"{name} {column}"
        )


def native() -> NativeModel:
    """A native model with grouped heads."""
    sizes = {
        "layers": 3,
        "heads": HEADS,
        "kv_heads": GROUPS,
        "width": 16,
        "head_width": 4,
        "vocab": 20,
        "mlp_width": 16,
    }
    torch.manual_seed(0)
    return NativeModel(NativeNet(NativeConfig(**sizes)).double().eval())


def texts(*lengths: int, side: str = "right") -> tuple[Tokens, list[Tokens]]:
    """Random tokens in one batch, and each text alone."""
    width = max(lengths)
    ids = torch.randint(1, 20, (len(lengths), width), generator=torch.Generator().manual_seed(1))
    places = torch.arange(width)
    real = torch.stack([places < n if side == "right" else places >= width - n for n in lengths])
    alone = [row[on][None] for row, on in zip(ids, real, strict=True)]
    return Tokens(ids, real), [Tokens(row, torch.ones_like(row, dtype=torch.bool)) for row in alone]


LENGTHS = (9, N)
"""Tokens of two texts of which the shorter one is padded."""


def padded_runs(side: str, form: str) -> tuple[Run, list[Run], Tensor]:
    """Maps of two texts of different length in one batch, and of each alone."""
    tokens, alone = texts(*LENGTHS, side=side)
    plain = softmax_maps(Mask(causal=True))
    hidden = Mask(causal=True, keys=tokens.mask)
    batch: Maps = [SoftmaxMap(m.scores.q, m.scores.k, mask=hidden, scale=0.7) for m in plain]
    if form != "softmax":
        batch = [AttentionMap.from_dense(m.dense(), offset=0, kv_heads=GROUPS) for m in batch]
    singles: list[Maps] = []
    for b, on in enumerate(tokens.mask):
        q = [m.scores.q[b, None][:, :, on] for m in plain]
        k = [m.scores.k[b, None][:, :, on] for m in plain]
        singles.append([SoftmaxMap(x, y, mask=Mask(causal=True), scale=0.7) for x, y in zip(q, k, strict=True)])
    if form == "gated":
        gates = [rand(70 + i, 2, HEADS, N).sigmoid() for i in range(LAYERS)]
        batch = [GatedMap(m, gate) for m, gate in zip(batch, gates, strict=True)]
        singles = [
            [GatedMap(m, gate[b, None][:, :, tokens.mask[b]]) for m, gate in zip(maps, gates, strict=True)]
            for b, maps in enumerate(singles)
        ]
    runs = [Run(text, maps=RunMaps(dict(enumerate(maps)))) for text, maps in zip(alone, singles, strict=True)]
    return Run(tokens, maps=RunMaps(dict(enumerate(batch)))), runs, tokens.mask


def marked(name: str, mask: Tensor) -> dict[str, Any]:
    """Documents, question and needle at the same tokens of every text, wherever it begins."""
    at = mask.int().argmax(1)[:, None]
    if name == "head-kv":
        return {"spans": at + torch.tensor([[1, 3]]), "window": 3}
    if name in ("block-rank", "query-heads"):
        ranges = at[..., None] + torch.tensor([[[0, 3], [3, 5]]])
        gold, question = torch.tensor([[False, True]]).expand(len(mask), -1), at + torch.tensor([[6, 9]])
        ids = torch.zeros(mask.shape, dtype=torch.long)
        return {"prompts": Documents(ids, ranges, gold, question, ids, question)}
    return {"targets": lambda b, h, q, k: k == q - 1} if name == "pointer-fidelity" else {}
