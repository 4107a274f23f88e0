"""What circuit methods share: a model's components, their outputs, what replaces them, and gradients at sites.

Node level works on the outputs ``hook_z`` of heads and ``hook_mlp_out`` of MLPs, which every model serves. Edge
level works on the residual stream: writers are ``hook_resid_pre`` of layer 0 (``input``), ``hook_result`` and
``hook_mlp_out``; readers are ``hook_q_input``, ``hook_k_input``, ``hook_v_input``, ``hook_mlp_in`` and the last
``hook_resid_post`` (``logits``), before norms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.graph import Graph, circuit_graph
from workbench.models.protocol import Edit, Model
from workbench.pairs import Pairs, logit_difference
from workbench.probes.circuits.places import Places
from workbench.run import versions
from workbench.sites import Site

ABLATIONS = ("counterfactual", "zero", "mean", "optimal")
INPUT = Site("resid_pre", 0)
_NUMBERS = 2**25
_EDGE_KINDS = ("resid_pre", "result", "q_input", "k_input", "v_input", "resid_post")

Metric = Callable[[Tensor, Pairs], Tensor]
Acts = dict[Site, Tensor]
Edits = dict[Site | str, Edit | Tensor]


@dataclass(frozen=True)
class Component:
    """A node with an output of its own: ``a3.h5`` at ``blocks.3.attn.hook_z[5]``, ``m3`` at
    ``blocks.3.hook_mlp_out``."""

    name: str
    site: Site


@dataclass(frozen=True)
class Setting:
    """A checked request: the model, the pairs, the metric ``(logits, pairs) -> [B]``, the ablation, prompts per
    batch, and the places that parts are told apart by."""

    model: Model
    pairs: Pairs
    metric: Metric
    ablation: str
    batch: int
    places: Places

    @classmethod
    def of(
        cls,
        model: Model,
        pairs: Pairs,
        metric: Metric | None = None,
        ablation: str = "counterfactual",
        batch: int = 16,
        positions: str = "all",
    ) -> Setting:
        if ablation not in ABLATIONS:
            raise UnknownName("ablation", ablation, ABLATIONS)
        if batch < 1:
            raise WorkbenchError(f"batch is a number of prompts, at least 1; got {batch}")
        if len(pairs) == 0:
            raise WorkbenchError("there are no pairs; build some with task.build(seed, tokenizer, n)")
        if pairs.clean.shape != pairs.corrupt.shape:
            raise WorkbenchError(
                f"clean and corrupted prompts must have one length; got {list(pairs.clean.shape)} and "
                f"{list(pairs.corrupt.shape)}"
            )
        for name, value in vars(model).items():
            if isinstance(value, nn.Module) and value.training:
                raise Refused(
                    f"{model.name} is in training mode, where dropout would enter the scores; call .{name}.eval()"
                )
        chosen = metric or getattr(pairs, "metric", None) or logit_difference
        return cls(model, pairs, chosen, ablation, batch, Places.of(positions, pairs))

    def chunks(self) -> Iterator[Pairs]:
        for start in range(0, len(self.pairs), self.batch):
            yield self.pairs[start : start + self.batch]

    def measure(self, logits: Tensor | None, pairs: Pairs) -> Tensor:
        """The metric per example, ``[B]``, from logits in at least float32."""
        if logits is None:
            raise Refused(f"{self.model.name} gives no logits; pass metric= for a model that has a head")
        values = self.metric(logits if logits.dtype == torch.float64 else logits.float(), pairs)
        if values.shape != (len(pairs),):
            raise WorkbenchError(f"a metric returns one number per example, [{len(pairs)}]; got {list(values.shape)}")
        return values

    @property
    def at_once(self) -> int:
        """How many variations of one batch go through the model together, so that no tensor outgrows 2^25 numbers."""
        shape = self.model.shape
        widest = max(shape.vocab or 0, shape.width * shape.heads)
        rows = min(self.batch, len(self.pairs)) * self.pairs.clean.shape[1]
        return max(1, _NUMBERS // (rows * widest))

    def provenance(self, method: str, level: str, options: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "method": method,
            "level": level,
            "ablation": self.ablation,
            "positions": self.places.kind,
            "metric": getattr(self.metric, "__qualname__", type(self.metric).__name__),
            "model": self.model.name,
            "width": self.model.shape.width,
            "revision": getattr(self.model, "revision", ""),
            "examples": len(self.pairs),
            "options": dict(options),
            "versions": versions(),
        }


def served(model: Model) -> set[Site]:
    """The sites that a model can read and edit, as its manifest lists them."""
    return {Site.parse(text) for text in model.manifest().sites}


def components(model: Model) -> list[Component]:
    """Heads and MLPs of a model with one stack, in the order of computation."""
    sites = served(model)
    found = []
    for layer in range(model.shape.layers):
        if Site("z", layer) in sites:
            found += [Component(f"a{layer}.h{head}", Site("z", layer, head)) for head in range(model.shape.heads)]
        if Site("mlp_out", layer) in sites:
            found.append(Component(f"m{layer}", Site("mlp_out", layer)))
    if not found:
        raise Refused(
            f"{model.name} serves no hook_z and no hook_mlp_out; it serves: {', '.join(sorted(map(str, sites)))}"
        )
    return found


def edge_graph(model: Model) -> Graph:
    """The edge graph of a model that serves split inputs; others are refused."""
    sites = served(model)
    missing = [kind for kind in _EDGE_KINDS if Site(kind, 0) not in sites]
    if missing:
        names = ", ".join(Site(kind, 0).hook.replace("blocks.0.", "") for kind in missing)
        raise Refused(
            f"edges need an input of its own for every head, and {model.name} does not serve {names}; "
            "use level='node', a native model, or a TransformerLens bridge: "
            "wb.load(TransformerBridge.boot_transformers(name, hf_model=model))"
        )
    shape = model.shape
    return circuit_graph(shape.layers, shape.heads, shape.kv_heads, mlp=Site("mlp_out", 0) in sites)


def writer_sites(graph: Graph) -> list[Site]:
    """Sites of all writers, in the order of ``graph.writers``."""
    sites = [INPUT]
    for layer in range(graph.layers):
        sites += [Site("result", layer)] + [Site("mlp_out", layer)] * graph.mlp
    return sites


def reader_sites(graph: Graph) -> dict[Site, slice]:
    """Sites of all inputs and the range of ``graph.slots`` that each holds, in the order of computation."""
    found: dict[Site, slice] = {}
    at = 0
    for layer in range(graph.layers):
        widths = [("q_input", graph.heads), ("k_input", graph.kv_heads), ("v_input", graph.kv_heads)]
        for kind, width in [*widths, *([("mlp_in", 1)] if graph.mlp else [])]:
            found[Site(kind, layer)] = slice(at, at + width)
            at += width
    found[Site("resid_post", graph.layers - 1)] = slice(at, at + 1)
    return found


def heads_first(value: Tensor) -> Tensor:
    """``[B, T, N, D]`` as ``[N, B, T, D]``, and ``[B, T, D]`` as ``[1, B, T, D]``."""
    return value.permute(2, 0, 1, 3) if value.ndim == 4 else value[None]


def stacked(acts: Mapping[Site, Tensor], sites: Sequence[Site]) -> Tensor:
    """Outputs of all writers, ``[writers, B, T, D]``."""
    return torch.cat([heads_first(acts[site]) for site in sites])


@torch.no_grad()
def gather(model: Model, ids: Tensor, sites: Sequence[Site], logits: str | None = "all") -> tuple[Acts, Tensor | None]:
    """The tensors of ``sites`` on prompts ``ids``, and the logits, which ``logits=None`` spares."""
    run = model.run(ids, read=sites, logits=logits)
    return {site: run.acts[site].detach() for site in sites}, run.logits


def gradients(setting: Setting, pairs: Pairs, sites: Sequence[Site], start: Tensor | None = None) -> Acts:
    """Gradient of the summed metric at ``sites`` on the clean prompts; ``start`` replaces the embeddings ``[B, T,
    D]``."""
    leaves: Acts = {}

    def at(site: Site) -> Callable[[Tensor], Tensor]:
        def edit(value: Tensor) -> Tensor:
            if start is not None and site == INPUT:
                value = start.to(value)
            leaves[site] = torch.zeros_like(value, memory_format=torch.contiguous_format).requires_grad_()
            return value + leaves[site]

        return edit

    edits: Edits = {site: at(site) for site in dict.fromkeys((INPUT, *sites))}
    with torch.enable_grad():
        run = setting.model.run(pairs.clean, edit=edits)
        total = setting.measure(run.logits, pairs).sum()
        if not total.requires_grad:
            raise Refused(f"the metric of {setting.model.name} has no gradient; use method='patching'")
        found = torch.autograd.grad(total, [leaves[site] for site in sites], allow_unused=True)
    return {
        site: torch.zeros_like(leaves[site]) if grad is None else grad for site, grad in zip(sites, found, strict=True)
    }
