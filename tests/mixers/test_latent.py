"""Latent attention: the expanded form against multi-head attention on explicit keys, the absorbed form against the expanded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from workbench.attention_map import AttentionMap
from workbench.catalogue import example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.mixers.latent import absorbed_latent_attention, expand_values, latent_attention

Operator = Callable[..., tuple[Tensor, AttentionMap]]
SHAPES: dict[str, tuple[int, ...]] = {
    "q": (2, 3, 6, 4), "q_rope": (2, 3, 6, 2), "latent": (2, 1, 6, 5), "k_rope": (2, 1, 6, 2), "up_key": (3, 4, 5),
}  # fmt: skip


def drawn() -> dict[str, Any]:
    return example_tensors(1, torch.float64, **SHAPES)


def keys_of_every_head(op: Operator) -> None:
    """Per head, keys [A c ; r] and values C c in torch's attention with scale (E + R)^-1/2."""
    given = drawn()
    up_value = example_tensors(2, torch.float64, up=(3, 7, 5))["up"]
    v = torch.stack([given["latent"][:, 0] @ up_value[h].T for h in range(3)], 1)
    out, found = op(**given, v=v, mask=Mask(causal=True))
    for h in range(3):
        k = torch.cat([given["latent"][:, 0] @ given["up_key"][h].T, given["k_rope"][:, 0]], -1)
        q = torch.cat([given["q"][:, h], given["q_rope"][:, h]], -1)
        torch.testing.assert_close(out[:, h], scaled_dot_product_attention(q, k, v[:, h], is_causal=True))
        weights = (q @ k.mT / 6**0.5).masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
        torch.testing.assert_close(found.dense()[:, h], weights)


IDENTITIES: dict[str, Callable[[Operator], None]] = {"multi-head-latent-attention": keys_of_every_head}


def test_the_absorbed_form_is_the_expanded_one() -> None:
    given = drawn()
    up_value = example_tensors(2, torch.float64, up=(3, 7, 5))["up"]
    expanded, full = latent_attention(**given, v=expand_values(given["latent"], up_value), mask=Mask(causal=True))
    context, small = absorbed_latent_attention(**given, v=given["latent"], mask=Mask(causal=True))
    torch.testing.assert_close(expand_values(context, up_value), expanded)
    torch.testing.assert_close(small.dense(), full.dense())
    assert small.kv_heads == 1
    assert small.value_space == "latent V"
    torch.testing.assert_close(small.matvec(given["latent"]), context)


@pytest.mark.parametrize("name", ["q_rope", "latent", "k_rope", "up_key"])
def test_a_wrong_shape_is_named(name: str) -> None:
    given = drawn() | {"v": torch.zeros(2, 3, 6, 7, dtype=torch.float64)}
    given[name] = given[name][1:]
    with pytest.raises(WorkbenchError, match=rf"^{name} is"):
        latent_attention(**given, mask=Mask())
