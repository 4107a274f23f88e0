import pytest
import torch

from workbench.captures import capture
from workbench.errors import Refused, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap
from workbench.models.protocol import Tokens
from workbench.patterns.softmax import SoftmaxMap
from workbench.probes.atlas import atlas, tile
from workbench.run import Maps, Run


def run_of(maps, ids, labels=(), **inputs):
    tokens = Tokens(ids, torch.ones_like(ids, dtype=torch.bool), labels, inputs)
    return Run(tokens, maps=Maps({k: AttentionMap.from_dense(w, offset=o) for k, (w, o) in maps.items()}))


def test_tiles_of_a_decoding_step_name_what_is_known():
    """Five keys from a cache whose tokens the run does not hold, then its own two."""
    weights = torch.rand(1, 2, 2, 7)
    run = run_of({0: (weights, 5)}, torch.tensor([[8, 9]]), (("x", "y"),))
    found = tile(run, 0, 1, slice(1, 2), slice(3, 7))
    assert found.query_tokens == ("y",)
    assert found.key_tokens == ("3", "4", "x", "y")
    table = found.frame()
    assert table["query"].unique().tolist() == [6]
    assert table["weight"].tolist() == pytest.approx(weights[0, 1, 1, 3:].tolist())


def test_impossible_blocks_are_refused():
    run = run_of({0: (torch.eye(3).expand(1, 1, 3, 3), 0)}, torch.tensor([[5, 6, 7]]))
    for size in (0, -1):
        with pytest.raises(WorkbenchError, match=f"a block has at least one token; got size={size}"):
            atlas(run, size)


def test_statistics_that_were_let_go_are_refused_and_undefined_ones_are_nan():
    ids = torch.tensor([[5, 6, 7]])
    run = run_of({0: (torch.eye(3).expand(1, 2, 3, 3) * torch.tensor([1.0, -1.0])[:, None, None], 0)}, ids)
    found = atlas(run)
    assert found.entropy[0].isnan().all()
    assert found.distance[0].tolist() == [0, 0]
    plain = SoftmaxMap(torch.rand(1, 2, 3, 4), torch.rand(1, 2, 3, 4), mask=Mask(causal=True))
    kept = Maps({0: plain.precompute(capture(stats=("received",), keep=False))})
    with pytest.raises(Refused, match=r"answers only received\(\); name more in capture"):
        atlas(Run(run.tokens, maps=kept))


def test_tiles_of_two_stacks_carry_the_names_of_their_own_side():
    square, wide = torch.eye(2).expand(1, 1, 2, 2), torch.rand(1, 1, 2, 3)
    maps = {"encoder.0": (torch.eye(3).expand(1, 1, 3, 3), 0), "decoder.0": (square, 0), "cross.0": (wide, 0)}
    run = run_of(maps, torch.tensor([[5, 6, 7]]), (("a", "b", "c"),), decoder_input_ids=torch.tensor([[0, 4]]))
    tiles = {layer: tile(run, layer, 0, slice(0, 2), slice(0, 3)) for layer in run.maps}
    assert tiles["encoder.0"].query_tokens + tiles["encoder.0"].key_tokens == ("a", "b", "a", "b", "c")
    assert tiles["decoder.0"].query_tokens + tiles["decoder.0"].key_tokens == ("#0", "#4", "#0", "#4")
    assert tiles["cross.0"].query_tokens + tiles["cross.0"].key_tokens == ("0", "1", "a", "b", "c")
    for found in tiles.values():
        found.frame()
        found.plot()
