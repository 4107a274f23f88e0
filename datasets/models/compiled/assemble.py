"""From a plan to a model: blocks become weights, optionally rotated, behind a norm, or with grouped heads."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.circuits import Circuit, circuit_graph, edge_name
from workbench.datasets.models.compiled.layout import rotation
from workbench.datasets.models.compiled.parts import Edge, Head, Plan
from workbench.datasets.tokenizer import word_tokenizer
from workbench.errors import WorkbenchError
from workbench.models.native import NativeModel
from workbench.models.native_net import NativeConfig, NativeNet

LARGE = 512.0
"""The constant coordinate behind a norm. The norm divides every position by the same number up to |x|^2 / 5e5, and float32
still resolves the other coordinates."""


def assemble(plan: Plan, rotate: int | None = None, norm: str = "none", kv_heads: int | None = None) -> NativeModel:
    """The model of a plan.

    ``rotate``: seed of an orthogonal matrix that multiplies the residual stream and is absorbed in all weights. ``norm``:
    with ``"rms"`` the stream gets one more coordinate, large and constant, and the norms' gain undoes the division, so that
    logits stay within 0.2% of the largest. ``kv_heads``: fewer key-value heads; the heads of a group keep their own maps side
    by side in a wider head, so that the function is the same, and the truth is told for the key-value heads.
    """
    d = plan.blocks.width + (norm == "rms")
    turn = torch.eye(d) if rotate is None else rotation(d, rotate)
    share = _share(plan.width, kv_heads)
    size = max(max(head.query.shape[1], head.value.shape[1]) for head in plan.heads.values())
    hidden = max((len(mlp.bias) for mlp in plan.mlps.values()), default=0)
    net = NativeNet(
        NativeConfig(
            layers=plan.layers,
            heads=plan.width,
            width=d,
            head_width=size * share,
            vocab=len(plan.embed),
            kv_heads=kv_heads,
            mlp_width=hidden,
            activation="relu" if hidden else "gelu",
            positions="learned",
            norm=norm,
            context=len(plan.table),
            causal=plan.causal,
            scale=1.0,
        )
    )
    state = {key: torch.zeros_like(value) for key, value in net.state_dict().items()}
    embed = _wide(plan.embed, d)
    if norm == "rms":
        embed[:, -1] = LARGE
        for key in state:
            if key.endswith(".w"):
                state[key] += LARGE / d**0.5
    state["W_E"] = embed @ turn
    state["W_pos"] = _wide(plan.table, d) @ turn
    state["W_U"] = turn.T @ _tall(plan.unembed, d)
    for (layer, index), head in plan.heads.items():
        _place(state, f"blocks.{layer}.attn.", index, head, turn, share, size)
    for layer, mlp in plan.mlps.items():
        prefix, count = f"blocks.{layer}.mlp.", len(mlp.bias)
        state[prefix + "W_in"][:, :count] = turn.T @ _tall(mlp.read, d)
        state[prefix + "b_in"][:count] = mlp.bias
        state[prefix + "W_out"][:count] = _wide(mlp.write, d) @ turn
    net.load_state_dict(state)
    truth = ground_truth(plan, kv_heads)
    return NativeModel(
        net.eval().requires_grad_(False), word_tokenizer(plan.vocabulary), name=plan.name, ground_truth=truth
    )


def _share(heads: int, kv_heads: int | None) -> int:
    if kv_heads is not None and (kv_heads < 1 or heads % kv_heads):
        raise WorkbenchError(f"kv_heads divides the {heads} heads; got {kv_heads}")
    return 1 if kv_heads is None else heads // kv_heads


def _wide(rows: Tensor, width: int) -> Tensor:
    """``[N, D]`` with zeros up to ``width``."""
    return torch.cat([rows, rows.new_zeros(len(rows), width - rows.shape[1])], 1)


def _tall(columns: Tensor, width: int) -> Tensor:
    """``[D, N]`` with zeros down to ``width``."""
    return torch.cat([columns, columns.new_zeros(width - len(columns), columns.shape[1])])


def _place(state: dict[str, Tensor], prefix: str, index: int, head: Head, turn: Tensor, share: int, size: int) -> None:
    at, group, d = index % share * size, index // share, len(turn)
    for weight, value, row in (("W_Q", head.query, index), ("W_K", head.key, group), ("W_V", head.value, group)):
        state[prefix + weight][row, :, at : at + value.shape[1]] = turn.T @ _tall(value, d)
    state[prefix + "W_O"][index, at : at + len(head.out)] = _wide(head.out, d) @ turn


def ground_truth(plan: Plan, kv_heads: int | None = None) -> Circuit:
    """The truth over all edges of the graph, relative to the first task's default corruption.

    ``kept`` (score 1): edges whose single patch has an effect. The column ``needed`` marks every edge that the
    computation uses, also those that carry what clean and corrupted prompts share, which no patching can see.
    """
    graph = circuit_graph(plan.layers, plan.width, kv_heads, mlp=bool(plan.mlps))
    share = _share(plan.width, kv_heads)

    def names(found: list[Edge]) -> set[str]:
        return {edge_name(*_grouped(edge, share)) for edge in found}

    circuit = Circuit.of(
        "edge", graph.edges, names(list(plan.active)), method="compiled", model=plan.name, **_solves(plan)
    )
    marks = {name: names(list(found)) for name, found in {"needed": plan.needed, **plan.marks}.items()}
    for name, wanted in marks.items():
        Circuit.of("edge", graph.edges, wanted, column=name)  # every edge exists
    columns = {name: torch.tensor([edge in wanted for edge in graph.edges]) for name, wanted in marks.items()}
    return Circuit("edge", circuit.names, circuit.scores, circuit.kept, circuit.provenance, columns)


def _grouped(edge: Edge, share: int) -> Edge:
    source, target, channel = edge
    if share == 1 or channel not in ("k", "v"):
        return edge
    layer, head = target.split(".h")
    return source, f"{layer}.g{int(head) // share}", channel


def _solves(plan: Plan) -> dict[str, object]:
    name, options = plan.tasks[0]
    return {"task": name, "options": dict(options)}
