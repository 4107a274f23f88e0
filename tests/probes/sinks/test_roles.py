"""What sinks are for: drained values, inactive heads, tags, and evicting the sink, on planted runs and models."""

import math

import pytest
import torch

import workbench as wb
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.maps import AttentionMap
from workbench.models.native import NativeModel
from workbench.models.native_net import NativeConfig, NativeNet
from workbench.models.protocol import Tokens
from workbench.probes.examples import random_rows
from workbench.probes.sinks.drain import value_drain
from workbench.probes.sinks.eviction import eviction
from workbench.probes.sinks.inactive import inactive_heads, zeroable
from workbench.probes.sinks.tagging import tagging, untag
from workbench.run import Activations, Maps, Run
from workbench.sites import Site

B, T, H, E, D = 3, 20, 4, 6, 10


def noise(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sunk(share, seed=0, batch=B):
    """Random causal rows of which the first token takes ``share`` ``[H]``."""
    rows = random_rows(batch, len(share), T, seed=seed)
    share = torch.tensor(share, dtype=torch.float64)[None, :, None, None]
    rows = rows * (1 - share)
    rows[..., :1] += share
    rows[:, :, 0] = 0
    rows[:, :, 0, 0] = 1
    return AttentionMap.from_dense(rows)


def run_of(maps, acts, mask=None, batch=B):
    ids = torch.zeros(batch, T, dtype=torch.long)
    mask = torch.ones(batch, T, dtype=torch.bool) if mask is None else mask
    return Run(Tokens(ids, mask), acts=Activations({Site.parse(k): v for k, v in acts.items()}), maps=Maps(maps))


def drained_run():
    """Two layers of 4 heads on 2 groups; in layer 1 the value of the first token in group 1 is a tenth, its stream tenfold."""
    v, x = noise(2, B, T, 2, E), noise(2, B, T, D, seed=1)
    v = v / v.norm(dim=-1, keepdim=True)
    x = x / x.norm(dim=-1, keepdim=True)
    v[1, :, 0, 1] *= 0.1
    x[1, :, 0] *= 10
    acts = {f"blocks.{i}.attn.hook_v": v[i] for i in range(2)} | {f"blocks.{i}.hook_resid_pre": x[i] for i in range(2)}
    return run_of({0: sunk([0.9, 0, 0.9, 0]), 1: sunk([0.9, 0, 0.9, 0], seed=1)}, acts)


def test_dormant_heads_are_those_with_a_drained_sink_alone():
    found = value_drain(drained_run())
    table = found.frame()
    assert table["dormant"].tolist() == [0, 0, 0, 0, 0, 0, 1, 0]  # 1.2 alone: mass and a drained value
    mean = (T - 1 + 0.1) / T
    assert table["r_v"].tolist() == pytest.approx([1] * 4 + [1 / ((T - 1 + 1) / T)] * 2 + [0.1 / mean] * 2)
    assert table["r_x"].tolist() == pytest.approx([1] * 4 + [10 / ((T - 1 + 10) / T)] * 4)
    assert table["r_v_null"].tolist() == pytest.approx([1] * 6 + [1 / mean] * 2)
    assert float(table["r_x_high"][5]) == pytest.approx(float(table["r_x"][5]))


def test_drain_counts_from_the_first_real_token():
    run = drained_run()
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[:, :2] = False
    maps = {}
    for layer, amap in run.maps.items():
        rows = amap.dense().clone()
        rows[..., :2] = 0
        rows[:, :, :2] = 0
        maps[layer] = AttentionMap.from_dense(rows / rows.sum(-1, keepdim=True).clamp(min=1e-9))
    padded = run_of(maps, {str(k): v for k, v in run.acts.items()}, mask)
    assert value_drain(padded).frame()["r_v"].tolist() == pytest.approx([1.0] * 8)  # token 2 is like all others


def test_what_was_not_read_is_asked_for():
    run = run_of({0: sunk([0.5] * H)}, {})
    with pytest.raises(WorkbenchError, match=r"read=\['blocks.0.attn.hook_v'"):
        value_drain(run)
    with pytest.raises(WorkbenchError, match=r"read=\['blocks.0.attn.hook_z'"):
        inactive_heads(run)
    with pytest.raises(WorkbenchError, match="capture two or more"):
        tagging(run)
    with pytest.raises(WorkbenchError, match="captured no attention"):
        value_drain(run_of({}, {}))


def test_a_planted_inactive_head_has_the_smallest_relative_norm():
    z = noise(B, T, H, E)
    z = z / z.norm(dim=-1, keepdim=True)
    z[:, :, 2] *= 0.05
    found = inactive_heads(run_of({0: sunk([0.9, 0, 0, 0])}, {"blocks.0.attn.hook_z": z}), share=0.25)
    table = found.frame()
    assert table["inactive"].tolist() == [0, 0, 1, 0]  # not head 0, which looks at the sink: a sink is not inactivity
    mean = 3.05 / 4
    assert table["relative_norm"].tolist() == pytest.approx([1 / mean, 1 / mean, 0.05 / mean, 1 / mean])
    assert table["norm"].tolist() == pytest.approx([1, 1, 0.05, 1])
    assert int(table["first_token"].argmax()) == 0


def test_heads_without_effect_can_all_be_set_to_zero():
    torch.manual_seed(0)
    net = NativeNet(NativeConfig(layers=2, heads=4, width=16, head_width=4, vocab=12, mlp_width=16)).eval()
    with torch.no_grad():
        for block in net.blocks:
            block.attn.W_V[1:] *= 1e-4  # three of four heads write next to nothing
            block.attn.W_V[0] *= 30
    model = NativeModel(net, name="quiet")
    inputs = torch.randint(12, (4, 16), generator=torch.Generator().manual_seed(1))
    found = zeroable(model, inputs, within=1e-4, random=4)
    assert found.removable >= 6
    assert found.removable_random < 6
    assert found.frame()["removed"].tolist() == list(range(1, 8))
    with pytest.raises(UnknownName, match="relative_norm"):
        zeroable(model, inputs, score="size")


def tagged_run(written=1.0):
    """Head 0 of layer 0 gives the first token .9 of the attention of every other token, whose output is its value; the last
    layer's stream carries ``written`` times W_O v in the caught tokens."""
    rows = random_rows(B, 2, T, seed=3)
    caught = (torch.arange(T) % 2 == 0) & (torch.arange(T) > 0)
    rows[:, 0, caught] *= 0.1
    rows[:, 0, caught, 0] += 0.9
    rows[:, 0, ~caught] *= 0.3
    rows[:, 0, ~caught] += torch.eye(T, dtype=torch.float64)[~caught] * 0.7
    rows[:, :, 0] = torch.eye(T, dtype=torch.float64)[0]
    v, z, later = noise(B, T, 2, E), noise(B, T, 2, E, seed=5) * 0.05, noise(B, T, D, seed=6) * 0.1
    weight = noise(2, E, D, seed=7)
    z[:, caught, 0] += v[:, :1, 0]
    z[:, 0] = v[:, 0]
    result = torch.einsum("bthe,hed->bthd", z, weight)
    later[:, caught] += written * (v[:, 0, 0] @ weight[0])[:, None]
    acts = {
        "blocks.0.attn.hook_z": z, "blocks.0.attn.hook_v": v, "blocks.0.attn.hook_result": result,
        "blocks.1.hook_resid_pre": later,
    }  # fmt: skip
    return run_of({0: AttentionMap.from_dense(rows), 1: AttentionMap.from_dense(random_rows(B, 2, T))}, acts), caught


def test_a_planted_tag_is_caught_shared_and_readable():
    run, caught = tagged_run()
    found = tagging(run)
    table = found.frame()
    assert table["caught"][0] == pytest.approx(float(caught.sum()) / (T - 1))
    assert table["tag_share"][0] > 0.9
    assert table["tag_share_null"][0] < 0.4
    assert table["readable"][0] == 1.0
    assert table["readable_null"][0] < 0.95
    assert math.isnan(table["tag_share"][1]) == ("0.1" in found.undefined)


def test_a_tag_that_no_later_stream_carries_is_not_readable():
    run, _ = tagged_run(written=0.0)
    assert tagging(run).frame()["readable"][0] < 0.8


def test_heads_that_catch_nothing_have_no_tag():
    run, _ = tagged_run()
    found = tagging(run, more=0.99)
    assert found.frame()["tag_share"].isna().all()
    assert found.frame()["caught"].tolist() == [0, 0]
    assert "three of each needed" in found.undefined["0.0"]
    with pytest.raises(Refused, match="catches no token"):
        untag(wb.load("tiny-softmax"), ["Mary and John went to the store"], (0, 4), more=0.999)


def sink_model():
    """One layer whose queries all look at token 0, which has no value; every other token has a large random one."""
    torch.manual_seed(0)
    config = NativeConfig(
        layers=1, heads=1, width=16, head_width=8, vocab=12, mlp_width=0, positions="none", norm="none"
    )
    net = NativeNet(config).eval()
    attn = net.blocks[0].attn
    with torch.no_grad():
        for weight in net.parameters():
            weight.zero_()
        net.W_E[0, 0] = 1.0
        net.W_E[1:, 1:12] = torch.eye(11)
        net.W_E[:, 15] = 1.0
        attn.W_K[0, 0, 0] = 40.0
        attn.W_Q[0, 15, 0] = 3.0
        attn.W_V[0, 1:12] = 5 * torch.randn(11, 8)
        attn.W_O[0] = torch.randn(8, 16)
        net.W_U[:] = torch.randn(16, 12)
    return NativeModel(net, name="sink")


def test_evicting_a_sink_that_the_model_leans_on_ruins_it():
    model = sink_model()
    ids = torch.randint(1, 12, (3, 24), generator=torch.Generator().manual_seed(2))
    ids[:, 0] = 0
    found = eviction(model, ids, window=8, sinks=(0, 1, 4), random=3).frame()
    assert found["loss"][1] == pytest.approx(found["base"][1], abs=1e-3)
    assert found["loss"][2] == pytest.approx(found["base"][2], abs=1e-3)
    assert found["loss"][0] > found["base"][0] + 1
    assert found["null"][1] > found["base"][1] + 1  # another early token in its place does not help
    assert math.isnan(found["null"][0])


def test_evicting_is_softmax_over_the_keys_that_stay():
    """Against a loop over rows of the model's own scores."""
    model, window, count = wb.load("tiny-softmax"), 6, 2
    text = "Mary and John went to the store . John gave a book to Mary"
    got = []
    with torch.no_grad():
        run = model.run(text, read=["blocks.0.attn.hook_attn_scores", "blocks.0.attn.hook_v"])
        scores = run.acts["blocks.0.attn.hook_attn_scores"][0].double()
        for q in range(scores.shape[1]):
            seen = [k for k in range(q + 1) if k < count or q - k < window - count]
            got.append(
                torch.softmax(scores[:, q, seen], -1)
                @ run.acts["blocks.0.attn.hook_v"][0, seen].double().transpose(0, 1)
            )
        want = torch.stack([g.diagonal(dim1=0, dim2=1).T if g.ndim == 3 else g for g in got])
        edited = model.run(
            text, read=["blocks.0.attn.hook_z"], edit={"blocks.0.attn.hook_z": lambda z: want[None].to(z.dtype)}
        )
        late = torch.arange(scores.shape[1] - 1) >= window
        logp = edited.logits[0, :-1].double().log_softmax(-1)
        loss = -logp.gather(-1, run.tokens.ids[0, 1:, None])[:, 0][late].mean()
    found = eviction(model, text, window=window, sinks=(count,), layers=(0,), random=1)
    assert float(found.loss[0, 0]) == pytest.approx(float(loss), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"window": 4, "sinks": (4,)}, "fewer than the window"),
        ({"window": 50}, "evicts nothing from a text of"),
        ({"window": 4, "sinks": ()}, "numbers of tokens from 0 on"),
    ],
)
def test_wrong_windows_are_refused(options, said):
    with pytest.raises(WorkbenchError, match=said):
        eviction(wb.load("tiny-softmax"), "Mary and John went to the store", **options)
