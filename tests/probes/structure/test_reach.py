"""Receptive fields against a breadth-first search over pairs written out."""

import math

import pytest
import torch

from workbench.errors import Refused, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap
from workbench.mixers.block_masks import power_blocks
from workbench.probes.structure.reach import reach


def searched(sees: torch.Tensor) -> torch.Tensor:
    """Layers until i has heard of j, by walking from every i."""
    n = len(sees)
    needed = torch.full((n, n), -1)
    for i in range(n):
        frontier, layer = {i}, 0
        while frontier:
            for j in frontier:
                needed[i, j] = layer
            frontier = {k for j in frontier for k in range(n) if sees[j, k] and needed[i, k] < 0}
            layer += 1
    return needed


@pytest.mark.parametrize("window", [1, 2, 5])
def test_a_window_reaches_its_width_per_layer(window: int) -> None:
    found = reach(Mask(causal=True, window=window), tokens=40, layers=6, size=1)
    assert found.farthest.tolist() == [min(39, m * (window - 1)) for m in range(1, 7)]
    sees = torch.tensor([[0 <= i - j < window for j in range(40)] for i in range(40)])
    wanted = searched(sees)
    assert torch.equal(found.needed, torch.where(wanted > 6, -1, wanted))
    assert float(found.edges[0]) == pytest.approx(int(sees.sum()) / (40 * 41 / 2))


def test_blocks_at_powers_of_two_reach_everything_in_about_log_layers() -> None:
    blocks = 64
    found = reach(power_blocks(blocks, 1, 0)[0], layers=8, size=128)
    assert found.layers is not None
    assert found.layers <= math.log2(blocks) + 1
    assert reach(Mask(causal=True, window=256), tokens=64 * 128, layers=8, size=128).layers is None
    assert found.farthest[-1] == 63 * 128
    assert found.frame()["share"].is_monotonic_increasing


def test_random_blocks_heads_and_lists_of_layers() -> None:
    generator = torch.Generator().manual_seed(0)
    heads = torch.rand(3, 12, 12, generator=generator) > 0.9
    found = reach(heads, layers=12, size=4)
    assert torch.equal(found.needed, searched(heads.any(0)))
    one, two = heads[0], heads[1]
    eye = torch.eye(12, dtype=torch.bool)
    both = reach([one, two], layers=2)
    twice = ((two | eye).float() @ (one | eye).float()) > 0
    assert torch.equal(both.needed >= 0, twice)


def test_maps_count_where_they_have_weight() -> None:
    weights = torch.zeros(1, 2, 6, 6)
    weights[0, 0].fill_diagonal_(0.9)
    weights[0, 1, 3, 0], weights[0, 0, 5, 3] = 0.1, -0.5
    amap = AttentionMap.from_dense(weights)
    found = reach(amap, layers=2, size=1)
    assert found.needed[3, 0] == 1
    assert found.needed[5, 0] == 2
    assert reach(amap, layers=2, size=1, threshold=0.2).needed[3, 0] == -1


def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(WorkbenchError, match=r"reach\(mask, tokens="):
        reach(Mask(causal=True))
    with pytest.raises(Refused, match="5,000 blocks are over the limit"):
        reach(Mask(causal=True), tokens=5000, size=1)
    with pytest.raises(WorkbenchError, match="same positions; got 3 x 4"):
        reach(AttentionMap.from_dense(torch.ones(1, 1, 3, 4) / 4))
    with pytest.raises(WorkbenchError, match="patterns of one size"):
        reach([torch.ones(3, 3, dtype=torch.bool), torch.ones(4, 4, dtype=torch.bool)])
    with pytest.raises(WorkbenchError, match="blocks are bool"):
        reach(torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(WorkbenchError, match="got layers=0"):
        reach(torch.ones(3, 3, dtype=torch.bool), layers=0)


def test_it_saves_and_draws(tmp_path) -> None:
    found = reach(Mask(causal=True, window=3), tokens=12, layers=2, size=1)
    assert found.plot().get_xlabel() == "key block of 1"
    assert (found.save(tmp_path / "reach") / "table.parquet").is_file()
