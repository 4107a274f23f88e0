import dataclasses

import pytest
import torch

import workbench as wb
from workbench.run import Activations, Maps, versions


def example() -> wb.Run:
    site = wb.Site("z", 0)
    amap = wb.AttentionMap.from_dense(torch.full((1, 2, 3, 3), 1 / 3))
    return wb.Run(wb.Tokens.of(torch.arange(3)), acts={site: torch.arange(24.0).view(1, 3, 2, 4)}, maps={0: amap})


def test_activations_by_site_text_and_head() -> None:
    run = example()
    assert isinstance(run.acts, Activations)
    assert isinstance(run.maps, Maps)
    assert torch.equal(run.acts["blocks.0.attn.hook_z"], run.acts[wb.Site("z", 0)])
    assert torch.equal(run.acts["blocks.0.attn.hook_z[1]"], run.acts["blocks.0.attn.hook_z"][:, :, 1])


def test_missing_entries_list_what_was_kept() -> None:
    run = example()
    with pytest.raises(wb.WorkbenchError, match=r"no activation 'blocks.1.attn.hook_z'; known: blocks.0.attn.hook_z"):
        run.acts["blocks.1.attn.hook_z"]
    with pytest.raises(wb.WorkbenchError, match="no captured layer '4'; known: 0"):
        run.maps[4]


def test_run_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        example().logits = torch.zeros(1)
    with pytest.raises(TypeError):
        example().maps[0] = None


def test_versions_name_what_can_change_a_number() -> None:
    assert {"python", "torch", "transformers", "transformer-lens", "attention-workbench"} <= set(versions())


def test_tokens_refuse_wrong_shapes() -> None:
    with pytest.raises(wb.WorkbenchError, match=r"integers of shape \[B, T\]; got torch.float32"):
        wb.Tokens(torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(wb.WorkbenchError, match="token mask is bool"):
        wb.Tokens(torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 2, dtype=torch.bool))


def test_asking_whether_something_is_there_is_no_error() -> None:
    run = example()
    assert "blocks.0.attn.hook_z" in run.acts
    assert "blocks.1.attn.hook_z" not in run.acts
    assert "blocks.0.attn.hook_nothing" not in run.acts
    assert run.acts.get("blocks.1.attn.hook_z") is None
    assert 0 in run.maps
    assert 4 not in run.maps
