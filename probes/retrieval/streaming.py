"""What is lost if some key-value heads see only the first tokens and the last ones?

A streaming head attends to ``sink`` first tokens and to the ``recent`` last ones (its own included). DuoAttention and
RazorAttention give most heads such a cache, RazorAttention with one more key that stands for all dropped ones: for a query with
n dropped keys, the compensation token has their mean key and mean value and counts n times,

    weight of the compensation token  ~  n * exp(scale * q . mean of k),    its value = mean of v.

The model runs with the output ``hook_z`` of the chosen heads computed that way from its own q, k and v (rows in chunks, linear
memory), which is what a cache with this policy would give at every token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.captures import capture
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.kernels.scores import working_dtype
from workbench.maps import GatedMap
from workbench.models.protocol import Edit, Model
from workbench.pairs import Pairs
from workbench.patterns.softmax import SoftmaxMap
from workbench.probes.ablation import matched, named_metric
from workbench.probes.bootstrap import interval
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import bundled, needles
from workbench.probes.sources import ungated
from workbench.results import Result, axis
from workbench.run import Provenance, Run
from workbench.sites import Site

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

KVHead = tuple[int, int]
"""``(layer, key-value head)``."""
Mix = Callable[[Tensor, Tensor], Tensor]
"""The outputs ``[B, T, H, E]`` of full and of streaming attention -> the output used."""
_ROWS = 256
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}


@dataclass(frozen=True)
class Streaming:
    """Which keys a streaming head sees: ``sink`` first ones and ``recent`` last ones; ``compensate`` adds the token that stands
    for the dropped keys."""

    sink: int = 128
    recent: int = 256
    compensate: bool = False

    def __post_init__(self) -> None:
        if self.sink < 0 or self.recent < 1:
            raise WorkbenchError(
                f"a streaming head sees sink >= 0 first and recent >= 1 last tokens; got {self.sink}, {self.recent}"
            )


@dataclass(frozen=True)
class LayerScores:
    """How a layer makes its scores: ``kinds`` of the sites that hold q and k, and the constants of ``kernels/scores.py``."""

    kinds: tuple[str, str]
    scale: float
    softcap: float | None
    sink: Tensor | None
    gated: bool


def streaming_output(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Streaming,
    scale: float,
    softcap: float | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """Causal streaming attention of ``q`` ``[B, H, T, E]``, ``k`` and ``v`` ``[B, G, T, E]``: ``[B, H, T, E]``, differentiable.

    ``sink`` ``[H]``: learned sink logits. Rows are walked in chunks of which each sees ``sink + recent + rows`` keys.
    """
    b, h, length, _ = q.shape
    groups, dtype = k.shape[1], q.dtype
    q, k, v = (part.to(working_dtype(dtype)) for part in (q, k, v))
    q = q.unflatten(1, (groups, h // groups)) * scale
    firsts = min(policy.sink, length)
    sums = [torch.nn.functional.pad(part.cumsum(2), (0, 0, 1, 0)) for part in (k, v)] if policy.compensate else []
    out = []
    for lo in range(0, length, _ROWS):
        hi = min(length, lo + _ROWS)
        start = max(0, lo - policy.recent + 1)
        early = min(firsts, start)
        keys, values = (torch.cat([part[:, :, :early], part[:, :, start:hi]], 2) for part in (k, v))
        rows = torch.arange(lo, hi, device=q.device)
        columns = torch.cat([torch.arange(early, device=q.device), torch.arange(start, hi, device=q.device)])
        away = rows[:, None] - columns
        allowed = (away >= 0) & ((columns < firsts) | (away < policy.recent))
        own = q[:, :, :, lo:hi]
        scores = [_capped(own @ keys[:, :, None].transpose(-1, -2), softcap).masked_fill(~allowed, float("-inf"))]
        extra = None
        if policy.compensate:
            until = (rows - policy.recent + 1).clamp(min=firsts)
            count = (until - firsts).to(q.dtype)
            mean_k, extra = (
                (part[:, :, until] - part[:, :, firsts, None]) / count.clamp(min=1)[:, None] for part in sums
            )
            logit = _capped((own * mean_k[:, :, None]).sum(-1), softcap) + count.clamp(min=1).log()
            scores.append(logit.masked_fill(count == 0, float("-inf"))[..., None])
        if sink is not None:
            logit = sink.to(q).unflatten(0, (groups, -1))[None, :, :, None, None]
            scores.append(logit.expand(b, -1, -1, hi - lo, 1))
        weights = torch.cat(scores, -1).softmax(-1)
        z = weights[..., : len(columns)] @ values[:, :, None]
        if extra is not None:
            z = z + weights[..., len(columns), None] * extra[:, :, None]
        out.append(z.flatten(1, 2))
    return torch.cat(out, 2).to(dtype)


def layer_scores(model: Model, ids: Tensor) -> tuple[dict[int, LayerScores], dict[int, str]]:
    """The layers whose heads can be made streaming on prompts ``ids`` ``[B, T]``, and why others cannot.

    From one run on the first prompt; a window that no prompt of this length leaves is none."""
    length = ids.shape[1]
    sites = set(model.manifest().sites)
    kinds = {layer: _kinds(layer, sites) for layer in range(model.shape.layers)}
    missing = {layer: [kind for kind in own if str(Site(kind, layer)) not in sites] for layer, own in kinds.items()}
    gates = [Site("gate", layer) for layer in kinds if str(Site("gate", layer)) in sites]
    reads = [Site(kind, layer) for layer, own in kinds.items() if not missing[layer] for kind in own]
    with torch.no_grad():
        run = model.run(ids[:1], read=[*reads, *gates], maps=capture(keep=True), logits=None)
    found, refused = {}, {}
    for layer, own in kinds.items():
        amap = run.maps[layer]
        inner = ungated(amap)
        if not isinstance(inner, SoftmaxMap):
            refused[layer] = f"its map is a {type(inner).__name__}, not softmax attention"
        elif missing[layer]:
            refused[layer] = f"the model does not serve {', '.join(missing[layer])}"
        elif (inner.mask.window or length) < length or not inner.mask.causal or inner.mask.prefix:
            refused[layer] = "its mask is not plainly causal, or has a window"
        elif inner.scores.bias is not None:
            refused[layer] = "its scores have a bias by position"
        elif isinstance(amap, GatedMap) and Site("gate", layer) not in gates:
            refused[layer] = "its gate cannot be read"
        else:
            made = [LayerScores((own[0], own[1]), *scale, isinstance(amap, GatedMap)) for scale in _constants(inner)]
            same = [how for how in made if _reproduces(run, layer, how)]
            if same:
                found[layer] = same[0]
            else:
                refused[layer] = "its output is not softmax attention of the q, k and v that it serves"
    return found, refused


def _kinds(layer: int, sites: set[str]) -> tuple[str, str, str, str]:
    rotary = str(Site("rot_q", layer)) in sites
    return ("rot_q", "rot_k", "v", "z") if rotary else ("q", "k", "v", "z")


def _constants(amap: SoftmaxMap) -> list[tuple[float, float | None, Tensor | None]]:
    """Scale, softcap and sink logits: the map's, and those of a layer that scales q itself after the site has served it."""
    scores = amap.scores
    assert scores.scale is not None
    scales = dict.fromkeys((scores.scale, scores.scale * scores.q.shape[-1] ** -0.5))
    return [(scale, scores.softcap, scores.sink) for scale in scales]


def _reproduces(run: Run, layer: int, how: LayerScores) -> bool:
    """Whether attention recomputed from the sites is the layer's output, on the first tokens."""
    q, k, v, z = (run.acts[Site(kind, layer)][:, :_ROWS].transpose(1, 2).detach() for kind in (*how.kinds, "v", "z"))
    full = streaming_output(q, k, v, Streaming(0, _ROWS), how.scale, how.softcap, how.sink)
    if how.gated:
        full = full * run.acts[Site("gate", layer)][:, :_ROWS].transpose(1, 2)[..., None]
    size = float(z.double().norm())
    return float((full - z).double().norm()) <= _TOLERANCE.get(z.dtype, 3e-2) * size + 1e-12


def streaming_edits(
    layers: Mapping[int, LayerScores], policy: Streaming, mix: Mapping[int, Mix]
) -> dict[Site | str, Edit | Tensor]:
    """Edits for one run: the output of every layer in ``mix`` becomes ``mix(full, streaming)``, gradients included."""
    edits: dict[Site | str, Edit | Tensor] = {}
    for layer, combine in mix.items():
        how = layers[layer]
        held: dict[str, Tensor] = {}

        def keep(name: str, held: dict[str, Tensor] = held) -> Edit:
            def look(value: Tensor) -> Tensor:
                held[name] = value
                return value

            return look

        def replace(
            full: Tensor, how: LayerScores = how, held: dict[str, Tensor] = held, combine: Mix = combine
        ) -> Tensor:
            q, k, v = (held[name].transpose(1, 2) for name in "qkv")
            near = streaming_output(q, k, v, policy, how.scale, how.softcap, how.sink).transpose(1, 2)
            return combine(full, near * held["gate"][..., None] if how.gated else near)

        for kind, name in zip((*how.kinds, "v"), "qkv", strict=True):
            edits[Site(kind, layer)] = keep(name)
        if how.gated:
            edits[Site("gate", layer)] = keep("gate")
        edits[Site("z", layer)] = replace
    return edits


@dataclass(frozen=True)
class StreamingEffect(Result):
    """``conditions[i]`` made ``heads[i]`` streaming; ``drawn[i]`` tells whether they were random ones. ``metrics`` name ->
    ``[C, N]`` over N examples; the first condition is the model as it is."""

    conditions: tuple[str, ...]
    drawn: tuple[bool, ...]
    heads: tuple[tuple[KVHead, ...], ...]
    metrics: Mapping[str, Tensor]
    policy: Streaming
    provenance: Provenance = field(default_factory=lambda: Provenance("unknown"))

    def frame(self) -> pd.DataFrame:
        """One row per condition: ``condition, random, heads``, then each metric's mean with ``_low _high``: 95% bootstrap
        interval over examples (over draws and examples for random heads)."""
        import pandas as pd

        rows = []
        for name, drawn in dict.fromkeys(zip(self.conditions, self.drawn, strict=True)):
            at = [i for i in range(len(self.conditions)) if (self.conditions[i], self.drawn[i]) == (name, drawn)]
            row: dict[str, object] = {"condition": name, "random": drawn, "heads": len(self.heads[at[0]])}
            for metric, values in self.metrics.items():
                low, high = interval(values[at].mean(0) if not drawn else values[at].flatten())
                row |= {metric: float(values[at].mean()), f"{metric}_low": float(low), f"{metric}_high": float(high)}
            rows.append(row)
        return pd.DataFrame(rows)

    def plot(self, ax: Axes | None = None) -> Axes:
        """The first metric under every condition."""
        table = self.frame()
        metric = next(iter(self.metrics))
        ax = axis(ax, 5.5, 3.4)
        rows = range(len(table))
        names = [
            f"random, as many as {row.condition}" if row.random else str(row.condition) for row in table.itertuples()
        ]
        ax.barh(rows, table[metric], color=["0.6" if drawn else "tab:blue" for drawn in table["random"]])
        ax.set_yticks(rows, names)
        ax.invert_yaxis()
        ax.set(xlabel=metric, title=f"Heads made streaming\n{self.provenance.model}")
        return ax


@torch.no_grad()
def streaming_effect(
    model: Model,
    pairs: Pairs,
    heads: Mapping[str, Iterable[KVHead]],
    policy: Streaming | None = None,
    *,
    metrics: Sequence[str] = ("accuracy", "probability", "kl"),
    random: int = 8,
    seed: int = 0,
) -> StreamingEffect:
    """Metrics of the answer with sets of key-value heads made streaming, each set beside ``random`` sets of as many random
    key-value heads, of the same layers where the layer has others.

    ``heads``: name -> ``(layer, kv head)`` pairs. ``policy`` by default 128 sinks and 256 recent tokens. ``metrics`` as in
    ``ablation_curve``. Layers of other attention are refused (see ``layer_scores``).
    """
    policy = policy or Streaming()
    sets = {name: tuple((int(layer), int(group)) for layer, group in given) for name, given in heads.items()}
    shape = model.shape
    everything = [(layer, group) for layer in range(shape.layers) for group in range(shape.kv_heads)]
    for name, given in sets.items():
        for head in given:
            if head not in everything:
                raise UnknownName(f"key-value head of {name!r}", head, [f"{la}.{g}" for la, g in everything])
    if random < 0:
        raise WorkbenchError(f"random counts sets of random heads; got {random}")
    layers, refused = layer_scores(model, pairs.clean)
    for name, given in sets.items():
        for layer, _ in given:
            if layer in refused:
                raise Refused(f"heads of layer {layer} of {model.name} ({name}) cannot be streaming: {refused[layer]}")
    pool = [Site("v", layer, group) for layer, group in everything if layer in layers]
    generator = torch.Generator().manual_seed(seed)
    conditions: list[tuple[str, bool, tuple[KVHead, ...]]] = [("none", False, ())]
    for name, given in sets.items():
        conditions.append((name, False, given))
        chosen = [Site("v", layer, group) for layer, group in given]
        for _ in range(random if chosen else 0):
            drawn = matched(chosen, pool, generator)
            conditions.append((name, True, tuple((int(site.layer or 0), int(site.head or 0)) for site in drawn)))
    plain = model.run(pairs.clean)
    measures = [named_metric(metric, pairs) for metric in metrics]
    found: dict[str, list[Tensor]] = {name: [] for name, _ in measures}
    for _, _, made in conditions:
        run = model.run(pairs.clean, edit=streaming_edits(layers, policy, _switched(made, shape.heads, shape.kv_heads)))
        for name, measure in measures:
            found[name].append(measure(run, plain).double())
    return StreamingEffect(
        tuple(name for name, _, _ in conditions),
        tuple(drawn for _, drawn, _ in conditions),
        tuple(made for _, _, made in conditions),
        {name: torch.stack(values) for name, values in found.items()},
        policy,
        plain.provenance,
    )


def _switched(heads: Iterable[KVHead], query_heads: int, kv_heads: int) -> dict[int, Mix]:
    """Streaming outputs for all query heads of the chosen key-value heads."""
    chosen: dict[int, Tensor] = {}
    for layer, group in heads:
        flags = chosen.setdefault(layer, torch.zeros(kv_heads, dtype=torch.bool))
        flags[group] = True

    def switch(flags: Tensor) -> Mix:
        each = flags.repeat_interleave(query_heads // kv_heads)[:, None]
        return lambda full, near: torch.where(each.to(full.device), near, full)

    return {layer: switch(flags) for layer, flags in chosen.items()}


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else softcap * (scores / softcap).tanh()


ANALYSES = (
    Analysis(
        name="streaming-effect",
        question="What is lost if some key-value heads see only the first tokens and the last ones?",
        function=streaming_effect,
        example=lambda: {
            "model": bundled("compiled-needle"),
            "pairs": needles(bundled("compiled-needle")),
            "heads": {"copying head": [(1, 1)], "others": [(0, 0), (0, 2)]},
            "policy": Streaming(2, 8),
            "random": 2,
        },
        paper="DuoAttention 2024 (arXiv 2410.10819); RazorAttention 2024 (arXiv 2407.15891)",
        source="model",
        null="as many random key-value heads of the same layers",
        cause="streaming_effect",
        definition="every token sees what a cache with this policy would hold when it is decoded",
    ),
)
