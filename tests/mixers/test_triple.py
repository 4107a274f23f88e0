"""Triple attention: softmax attention over products of keys, its marginals and pairs."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from workbench.attention_map import AttentionMap
from workbench.catalogue import example_tensors
from workbench.errors import Refused, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.mixers.triple import triple_attention
from workbench.patterns.triple import TripleMap

Operator = Callable[..., tuple[Tensor, AttentionMap]]
N = 5


def drawn(tokens: int = N) -> dict[str, Tensor]:
    keys, values = (2, 2, tokens, 4), (2, 2, tokens, 3)
    return example_tensors(4, torch.float64, q=(2, 4, tokens, 4), k1=keys, k2=keys, v1=values, v2=values)


def products(one: Tensor, other: Tensor) -> Tensor:
    """Row-wise products of all pairs, ``[B, 4, N * N, E]``, pair (j, l) at j N + l."""
    pairs = [one[:, :, j] * other[:, :, l] for j in range(one.shape[2]) for l in range(other.shape[2])]
    return torch.stack(pairs, 2).repeat_interleave(2, 1)


def softmax_attention_over_products(op: Operator) -> None:
    """Output and map of torch's own attention over the N^2 products of keys and of values, scaled by 1 / E."""
    given = drawn()
    keys, values = products(given["k1"], given["k2"]), products(given["v1"], given["v2"])
    out, found = op(**given)
    torch.testing.assert_close(out, scaled_dot_product_attention(given["q"], keys, values, scale=0.25))
    weights = (given["q"] @ keys.transpose(-1, -2) / 4).softmax(-1).view(2, 4, N, N, N)
    torch.testing.assert_close(found.native(), weights)
    mean = torch.einsum("bhijl,bhl->bhij", weights, given["v2"].mean(-1).repeat_interleave(2, 1))
    torch.testing.assert_close(found.dense(), mean)


IDENTITIES: dict[str, Callable[[Operator], None]] = {"triple-attention": softmax_attention_over_products}


def test_marginals_are_what_values_of_one_leave() -> None:
    """With all second values 1 the map is the first marginal; with all first values 1 the output is the second's."""
    given = drawn()
    one = torch.ones_like(given["v2"])
    _, found = triple_attention(**{**given, "v2": one})
    assert isinstance(found, TripleMap)
    torch.testing.assert_close(found.dense(), found.marginal(1).dense())
    out, found = triple_attention(**{**given, "v1": one})
    torch.testing.assert_close(found.marginal(2).matvec(given["v2"]), out)
    for place in (1, 2):
        assert found.marginal(place).row_sum == "1"
    with pytest.raises(WorkbenchError, match="place 1 or 2"):
        found.marginal(0)


def test_pairs_are_the_largest_weights() -> None:
    _, found = triple_attention(**drawn())
    top = found.pairs(3)
    weights = found.native()
    wanted = weights.flatten(3).sort(-1, descending=True).values[..., :3]
    torch.testing.assert_close(top.values, wanted)
    b, h, i = torch.meshgrid(torch.arange(2), torch.arange(4), torch.arange(N), indexing="ij")
    for rank in range(3):
        torch.testing.assert_close(weights[b, h, i, top.first[..., rank], top.second[..., rank]], wanted[..., rank])
    with pytest.raises(WorkbenchError, match="1 <= k <= 25"):
        found.pairs(26)


def test_a_causal_mask_shows_pairs_of_earlier_keys() -> None:
    given = drawn()
    out, found = triple_attention(**given, mask=Mask(causal=True))
    weights = found.native()
    assert bool((weights[:, :, 1, 2:] == 0).all())
    assert bool((weights[:, :, 1, :, 2:] == 0).all())
    torch.testing.assert_close(weights.sum((-1, -2)), torch.ones(2, 4, N, dtype=torch.float64))
    torch.testing.assert_close(found.matvec(given["v1"]), out)
    assert found.pairs(2).first[0, 0, 0].tolist() == [0, -1]


def test_channels_one_by_one() -> None:
    given = drawn()
    out, found = triple_attention(**given)
    for c in range(3):
        values = given["v1"][..., c : c + 1]
        torch.testing.assert_close(found.channel(c).matvec(values), out[..., c : c + 1])
    torch.testing.assert_close(found.heads([3, 1]).channel(0).dense(), found.channel(0).dense()[:, [3, 1]])
    with pytest.raises(WorkbenchError, match="channel 3 of 3"):
        found.channel(3)
    with pytest.raises(WorkbenchError, match="3 channels"):
        found.matvec(given["v1"][..., :2])
    with pytest.raises(Refused, match=r"marginal\(1\)"):
        found.entropy()


def test_long_inputs_are_refused_before_anything_is_built() -> None:
    with pytest.raises(Refused, match="pairs of 65 and 65 keys are 4,225 weights per query; at most 64"):
        triple_attention(**drawn(65))
    triple_attention(**drawn(64))


def test_wrong_arguments_are_named() -> None:
    given = drawn()
    with pytest.raises(WorkbenchError, match="k2 is floating point"):
        triple_attention(**{**given, "k2": given["k2"][:, :, 1:]})
    with pytest.raises(WorkbenchError, match="weights are floating point"):
        TripleMap(torch.zeros(2, 3, 4, 5), given["v2"])
    with pytest.raises(WorkbenchError, match="second values"):
        TripleMap(torch.zeros(2, 4, 5, 5, 6), given["v2"])
