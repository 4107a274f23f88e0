"""Polarized self-attention against its formulas, one image at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import variants
from workbench.errors import WorkbenchError

Operator = Callable[..., tuple[Tensor, AttentionMap]]


def given(name: str, tokens: int = 7, **changes: Any) -> dict[str, Any]:
    return {**variants()[name].example(3, tokens, torch.float64), **changes}


def channels(image: Tensor, p: dict[str, Any]) -> Tensor:
    """The channel gate ``[C]`` of one image ``[C, N]``."""
    scores = [sum(float(p["query"][c] * image[c, i]) for c in range(len(image))) for i in range(image.shape[1])]
    share = torch.tensor(scores, dtype=torch.float64).exp()
    share = share / share.sum()
    summary = p["mix"] @ (p["value"] @ image @ share)
    centred = summary - summary.mean()
    normal = centred / (centred.square().mean() + 1e-5).sqrt()
    return 1 / (1 + (-(normal * p["weight"] + p["bias"])).exp())


def places(image: Tensor, p: dict[str, Any]) -> Tensor:
    """The spatial gate ``[N]`` of one image ``[C, N]``."""
    share = (p["spatial_query"] @ (image.sum(1) / image.shape[1])).exp()
    share = share / share.sum()
    scores = [
        sum(float(share[o] * p["spatial_value"][o] @ image[:, i]) for o in range(3)) for i in range(image.shape[1])
    ]
    return 1 / (1 + (-torch.tensor(scores, dtype=torch.float64)).exp())


def gates_channels(op: Operator) -> None:
    p = given("polarized-channel-attention")
    gate = torch.stack([channels(image, p) for image in p["x"].reshape(2, 6, 7)]).view(2, 2, 3)
    out, found = op(**p)
    torch.testing.assert_close(out, gate[..., None] * p["v"])
    torch.testing.assert_close(found.native(), gate)
    assert found.domain == "channel"
    shut, _ = op(**{**p, "weight": torch.zeros(6).double(), "bias": torch.full((6,), 1e3).double()})
    torch.testing.assert_close(shut, p["v"])


def gates_places(op: Operator) -> None:
    p = given("polarized-spatial-attention")
    images = [x.transpose(1, 2).reshape(6, 7) for x in p["x"]]
    gate = torch.stack([places(image, p) for image in images])
    out, found = op(**p)
    torch.testing.assert_close(out, gate[:, None, :, None] * p["v"])
    torch.testing.assert_close(found.dense(), torch.diag_embed(gate)[:, None].expand(2, 2, 7, 7))


def adds_both_gates(op: Operator) -> None:
    p = given("polarized-parallel-attention")
    gate = torch.stack([channels(x, p)[:, None] + places(x, p) for x in p["x"][..., 0]])
    out, found = op(**p)
    torch.testing.assert_close(out, gate[..., None] * p["v"])
    torch.testing.assert_close(found.dense(), torch.diag_embed(gate))


def gates_places_of_gated_channels(op: Operator) -> None:
    p = given("polarized-sequential-attention")
    wanted = []
    for x in p["x"][..., 0]:
        across = channels(x, p)[:, None]
        wanted.append(across * places(across * x, p))
    gate = torch.stack(wanted)
    out, found = op(**p)
    torch.testing.assert_close(out, gate[..., None] * p["v"])
    torch.testing.assert_close(found.dense(), torch.diag_embed(gate))


IDENTITIES: dict[str, Callable[[Operator], None]] = {
    "polarized-channel-attention": gates_channels,
    "polarized-spatial-attention": gates_places,
    "polarized-parallel-attention": adds_both_gates,
    "polarized-sequential-attention": gates_places_of_gated_channels,
}


def test_refusals() -> None:
    p = given("polarized-parallel-attention")
    for name, message in (("mix", r"mix is floating point \[6, 3\]"), ("query", r"query is floating point \[6\]")):
        with pytest.raises(WorkbenchError, match=message):
            variants()["polarized-parallel-attention"](**{**p, name: p[name][:2]})
    with pytest.raises(WorkbenchError, match=r"spatial_query is floating point \[3, 6\]"):
        variants()["polarized-spatial-attention"](
            **given("polarized-spatial-attention", spatial_query=p["spatial_query"][:2])
        )
