"""What analyses share: opening maps, refusing what has no shares, reading sites, real tokens, tables of means."""

import pytest
import torch
from builders import hugging_face, native

from workbench.errors import Refused, WorkbenchError
from workbench.maps import AttentionMap, GatedMap
from workbench.probes.bootstrap import interval
from workbench.probes.examples import bundled_run, random_maps, random_rows
from workbench.probes.sources import (
    inner,
    need_shares,
    read_site,
    real_mean,
    real_tokens,
    site_at,
    sites_read,
    tokens_of,
    ungated,
)
from workbench.probes.tables import HeadTable, LayerTable
from workbench.probes.visibility import layer_visibility, visibility
from workbench.sites import Site


def gated():
    plain = AttentionMap.from_dense(random_rows(1, 2, 5))
    return plain, GatedMap(plain, torch.full((1, 2, 5), 0.5, dtype=torch.float64))


def test_a_gate_is_opened_if_it_can_be():
    plain, map_ = gated()
    assert ungated(map_) is plain
    assert ungated(plain) is plain
    assert inner(0, map_, True) is plain
    assert inner(0, map_, False) is map_
    assert inner(0, plain, True) is plain
    closed = AttentionMap.from_dense(random_rows(1, 2, 5) / 2, row_sum="gate")
    assert inner(0, closed, False) is closed
    with pytest.raises(Refused, match="layer 3: .* does not hold the attention inside its gate"):
        inner(3, closed, True)


def test_signed_and_channel_maps_have_no_shares():
    rows = random_rows(1, 2, 5)
    need_shares(0, AttentionMap.from_dense(rows), "do nothing")
    with pytest.raises(Refused, match="layer 'encoder.1': weights of a signed token map do not add up"):
        need_shares("encoder.1", AttentionMap.from_dense(-rows, sign="signed"), "do not add up")
    with pytest.raises(Refused, match="nonnegative channel map do not add up"):
        need_shares(0, AttentionMap.from_dense(rows, domain="channel"), "do not add up")


def test_sites_are_named_as_maps_and_tables_name_layers():
    assert site_at("z", 3, 1) == Site("z", 3, 1)
    assert site_at("v", "encoder.12") == Site("v", 12, None, "encoder")


def test_what_a_run_read_is_found_by_layer():
    run = bundled_run(read=("blocks.0.attn.hook_z", "blocks.1.attn.hook_result", "blocks.0.attn.hook_result"))
    found = sites_read(run, "z", "result")
    assert list(found) == [0, 1]
    assert found[0].shape == run.acts["blocks.0.attn.hook_z"].shape  # the first kind that a layer has
    assert found[1].shape == run.acts["blocks.1.attn.hook_result"].shape
    assert torch.equal(read_site(run, "z", 0), run.acts["blocks.0.attn.hook_z"])
    with pytest.raises(WorkbenchError, match=r"did not read blocks.1.attn.hook_z; run it again with read="):
        read_site(run, "z", 1)
    with pytest.raises(WorkbenchError, match=r"read no hook_resid_post; .*blocks.\{l\}.hook_resid_post"):
        sites_read(run, "resid_post")


def test_layers_of_stacks_are_named_by_their_stack():
    t5 = hugging_face("t5")
    with torch.no_grad():
        run = t5.model.run(t5.inputs, read=[Site("z", 1, None, "encoder"), Site("z", 0, None, "decoder")])
    assert list(sites_read(run, "z")) == ["decoder.0", "encoder.1"]
    assert torch.equal(read_site(run, "z", "encoder.1"), run.acts[Site("z", 1, None, "encoder")])


def test_padding_is_not_real():
    model = native().model
    with torch.no_grad():
        run = model.run({"input_ids": torch.ones(2, 4).long(), "attention_mask": torch.tensor([[0, 0, 1, 1], [1] * 4])})
    assert real_tokens(run, torch.zeros(2, 4, 8)).tolist() == [[False, False, True, True], [True] * 4]
    assert real_tokens(run, torch.zeros(2, 7, 8)).all()  # other tokens than the run's
    assert tokens_of(run) is run.tokens
    assert tokens_of(random_maps()) is None
    values = torch.tensor([[[9.0, float("nan"), 1.0, 3.0]], [[1.0, 2.0, 3.0, 6.0]]])
    assert real_mean(values, run.tokens.mask).tolist() == [[2.0], [3.0]]
    assert real_mean(values, torch.zeros(1, 4, dtype=torch.bool)).isnan().all()
    amap = AttentionMap.from_dense(random_rows(2, 1, 4))
    mine, wanted = layer_visibility(0, amap, run.tokens), visibility(amap, real=run.tokens.mask, keys=run.tokens.mask)
    assert torch.equal(mine.tile(0, 4), wanted.tile(0, 4))


def test_tables_of_means_have_intervals_and_the_order_of_their_units():
    each = {"a": {0: torch.tensor([[1.0, float("nan")], [3.0, float("nan")]]).double()}}
    null = {"a": {0: torch.tensor([[0.0, 1.0], [1.0, 3.0]]).double()}, "b": {0: torch.tensor([7.0, 8.0])}}
    single = {"b": {0: torch.tensor([5.0, 6.0])}}
    found = HeadTable.averaged("t", each, {"b": "", "a": ""}, null=null, single=single, undefined={"a": "why"})
    assert list(found.values) == ["b", "a"]
    assert found.values["a"][0][0] == 2
    assert found.values["a"][0][1].isnan()
    low, high = interval(each["a"][0])
    torch.testing.assert_close(found.low["a"][0], low, equal_nan=True)
    torch.testing.assert_close(found.high["a"][0], high, equal_nan=True)
    assert found.null["a"][0].tolist() == [0.5, 2.0]
    assert found.null["b"][0].tolist() == [7.0, 8.0]
    assert "b" not in found.low
    assert found.undefined == {"a": "why"}
    with pytest.raises(WorkbenchError, match="measure 'a' of 't' has no unit"):
        HeadTable.averaged("t", each, {"b": ""}, single=single)


def test_layers_of_unequal_numbers_of_sequences_are_averaged():
    each = {"a": {"x": torch.tensor([1.0, 3.0]).double(), "y": torch.tensor([4.0, 5.0, float("nan")]).double()}}
    found = LayerTable.averaged("t", each, {"a": ""}, null={"a": {"x": torch.tensor([0.0, 1.0]), "y": torch.zeros(1)}})
    assert found.layers == ("x", "y")
    assert found.values["a"].tolist() == [2.0, 4.5]
    assert found.null["a"].tolist() == [0.5, 0.0]
    assert float(found.low["a"][0]) <= 2 <= float(found.high["a"][0])
