"""Cascade pruning on planted maps: dead tokens go first, survivors are nested, recall is the mass that stays."""

import math

import pytest
import torch

import workbench as wb
from workbench.errors import Refused, WorkbenchError
from workbench.maps import AttentionMap
from workbench.models.protocol import Tokens
from workbench.probes.importance.token_importance import token_importance
from workbench.run import Run


def run_of(*weights: torch.Tensor) -> Run:
    ids = torch.zeros(1, weights[0].shape[-1], dtype=torch.int64)
    return Run(Tokens.of(ids), maps={i: AttentionMap.from_dense(w) for i, w in enumerate(weights)})


def random_maps(layers: int = 3, n: int = 10) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 4, n, n, generator=generator, dtype=torch.float64).mul(2).softmax(-1) for _ in range(layers)]


def test_importance_is_the_mass_received_so_far() -> None:
    maps = random_maps()
    found = token_importance(run_of(*maps))
    total = torch.zeros(10, dtype=torch.float64)
    for layer, weights in enumerate(maps):
        total = total + weights[0].sum((0, 1))
        torch.testing.assert_close(found.importance[layer], total)
    assert found.survives.all()
    torch.testing.assert_close(found.recall, torch.ones(3, dtype=torch.float64))


def test_dead_tokens_go_first_and_never_come_back() -> None:
    maps = random_maps()
    dead = [2, 5, 7]
    for weights in maps:
        weights[..., dead] = 0
        weights /= weights.sum(-1, keepdim=True)
    found = token_importance(run_of(*maps), keep=0.7)
    assert (~found.survives[0]).nonzero()[:, 0].tolist() == dead
    alive = 10
    for layer in range(3):
        alive = math.ceil(alive * 0.7)
        assert int(found.survives[layer].sum()) == alive
        if layer:
            assert not (found.survives[layer] & ~found.survives[layer - 1]).any()
    before = found.survives[0]
    votes = maps[1][0][:, before]
    assert float(found.recall[1]) == pytest.approx(float(votes[..., before].sum() / votes.sum()))


def test_a_sink_is_kept_and_flagged() -> None:
    maps = random_maps()
    for weights in maps:
        weights *= 0.3
        weights[..., 4] += 0.7
    found = token_importance(run_of(*maps), keep=0.2)
    assert found.survives[-1].nonzero()[:, 0].tolist() == [4]
    assert found.sink.nonzero()[:, 0].tolist() == [0, 4]


def test_on_a_model_with_the_output_of_its_heads(tmp_path) -> None:
    model = wb.load("tiny-softmax")
    sites = [f"blocks.{layer}.attn.hook_z" for layer in range(model.shape.layers)]
    run = model.run("Mary and John went to the store .", read=sites, maps=wb.capture())
    found = token_importance(run, keep=0.5)
    assert found.heads[0].shape == (model.shape.heads,)
    assert len(found.tokens) == found.importance.shape[1]
    assert found.plot().get_xlabel() == "token"
    assert (found.save(tmp_path / "importance") / "table.parquet").is_file()


def test_what_has_no_importance_is_refused() -> None:
    maps = random_maps()
    with pytest.raises(WorkbenchError, match=r"a share of the tokens, in \(0, 1\]"):
        token_importance(run_of(*maps), keep=0)
    with pytest.raises(Refused, match="receive no mass in a signed token map"):
        token_importance(run_of(-maps[0]))
    with pytest.raises(Refused, match="one set of tokens"):
        token_importance(run_of(maps[0][:, :, :4]))
    batch = Run(
        Tokens.of(torch.zeros(2, 10, dtype=torch.int64)),
        maps={0: AttentionMap.from_dense(maps[0].expand(2, -1, -1, -1))},
    )
    with pytest.raises(Refused, match="a batch of 2"):
        token_importance(batch)
