from dataclasses import replace

import pytest
import torch
from natives import CONFIG, make

import workbench as wb
from workbench.errors import Refused, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap, GatedMap
from workbench.models.protocol import Tokens
from workbench.patterns.softmax import SoftmaxMap
from workbench.probes.examples import random_rows
from workbench.probes.heads.positional import correlation, moved_tokens, positional_share, random_texts
from workbench.run import Maps, Provenance, Run


def planted(sequences=24, length=32):
    """Heads: previous token; earlier copies of the token (else even); half and half; even."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(16, (sequences, length), generator=generator)
    previous = torch.zeros(length, length, dtype=torch.float64)
    previous[0, 0] = 1
    previous[torch.arange(1, length), torch.arange(length - 1)] = 1
    even = torch.ones(length, length, dtype=torch.float64).tril()
    even = even / even.sum(-1, keepdim=True)
    same = (ids[:, :, None] == ids[:, None, :]).double().tril(-1)
    same = torch.where(same.any(-1, keepdim=True), same / same.sum(-1, keepdim=True).clamp(min=1), even)
    previous, even = (x.expand(sequences, -1, -1) for x in (previous, even))
    return torch.stack([previous, same, (previous + same) / 2, even], 1)


def test_a_previous_token_head_is_positional_and_a_duplicate_token_head_is_not():
    found = positional_share(AttentionMap.from_dense(planted()))
    share = found.values["positional"][0]
    assert share[0] == pytest.approx(1)
    assert abs(float(share[1])) < 0.15
    assert 0.3 < float(share[2]) < 0.9
    assert share[3].isnan()
    assert "evenly" in found.undefined["layer 0"]
    assert found.null["positional"][0][:3].abs().max() < 0.05
    assert found.low["positional"][0][0] == found.high["positional"][0][0] == pytest.approx(1)
    torch.testing.assert_close(found.values["content"][0], 1 - share, equal_nan=True)


def test_a_literal_loop_gives_the_same_share():
    rows = random_rows(5, 2, 6, seed=1)
    found = positional_share([AttentionMap.from_dense(rows)])
    for h in range(2):
        each = []
        for b in range(5):
            left = whole = 0.0
            for q in range(6):
                for k in range(q + 1):
                    mean = float(rows[:, h, q, k].mean())
                    left += (float(rows[b, h, q, k]) - mean) ** 2 * 5 / 4
                    whole += (float(rows[b, h, q, k]) - 1 / (q + 1)) ** 2
            each.append(1 - left / whole)
        assert float(found.values["positional"][0][h]) == pytest.approx(sum(each) / 5)


def test_a_profile_over_distances_explains_a_distance_and_a_sink_but_no_single_cell():
    length = 24
    far = torch.zeros(length, length, dtype=torch.float64)
    far[:3, 0] = 1
    far[torch.arange(3, length), torch.arange(length - 3)] = 1
    sink = torch.zeros(length, length, dtype=torch.float64)
    sink[:, 0] = 1
    cells = random_rows(1, 1, length)[0, 0]
    rows = torch.stack([far, sink, cells]).expand(4, -1, -1, -1)
    by_cell, by_distance = (positional_share(AttentionMap.from_dense(rows), by=by) for by in ("cell", "distance"))
    assert by_cell.values["positional"][0].tolist() == pytest.approx([1, 1, 1])
    assert float(by_distance.values["positional"][0][1]) == pytest.approx(1)
    assert float(by_distance.values["positional"][0][0]) > 0.8
    assert float(by_distance.values["positional"][0][2]) < 0.5


def test_a_literal_profile_gives_the_same_share_by_distance():
    rows = random_rows(3, 1, 5, seed=4)
    found = positional_share([AttentionMap.from_dense(rows)], by="distance")
    cells = [(b, q, k) for b in range(3) for q in range(5) for k in range(q + 1)]

    def kind(q, k):
        return "first" if k == 0 else q - k

    mean = {}
    for b, q, k in cells:
        mean.setdefault(kind(q, k), []).append(float(rows[b, 0, q, k]))
    mean = {name: sum(values) / len(values) for name, values in mean.items()}
    each = []
    for b in range(3):
        own = [(float(rows[b, 0, q, k]), mean[kind(q, k)], 1 / (q + 1)) for a, q, k in cells if a == b]
        each.append(1 - sum((w - m) ** 2 for w, m, _ in own) / sum((w - u) ** 2 for w, _, u in own))
    assert float(found.values["positional"][0][0]) == pytest.approx(sum(each) / 3)


def test_block_maps_tell_the_same_two_heads_apart():
    found = positional_share(AttentionMap.from_dense(planted()), by=4)
    share = found.values["positional"][0]
    assert share[0] == pytest.approx(1)
    assert abs(float(share[1])) < 0.3
    assert share[3].isnan()
    assert found.null == {}
    one = positional_share(AttentionMap.from_dense(planted()), by=1)
    torch.testing.assert_close(
        one.values["positional"],
        positional_share(AttentionMap.from_dense(planted())).values["positional"],
        equal_nan=True,
    )


@pytest.mark.parametrize("by", ["cell", "distance"])
def test_chunks_kernels_gates_and_padding_change_nothing(by, monkeypatch):
    q = torch.randn(4, 2, 9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    amap = SoftmaxMap(q, q, mask=Mask(causal=True))
    wanted = positional_share(amap, by=by).values["positional"][0]
    gated = GatedMap(amap, torch.full((4, 2, 9), 0.5, dtype=torch.float64))
    torch.testing.assert_close(positional_share(gated, by=by).values["positional"][0], wanted)
    torch.testing.assert_close(positional_share(gated, by=by, raw=True).values["positional"][0], wanted)
    monkeypatch.setattr("workbench.probes.heads.positional._CHUNK", 150)
    torch.testing.assert_close(
        positional_share(AttentionMap.from_dense(amap.dense()), by=by).values["positional"][0], wanted
    )
    real = torch.arange(12) < 9
    longer = torch.cat([q, q[:, :, :3]], 2)
    padded = SoftmaxMap(longer, longer, mask=Mask(causal=True, keys=real.expand(4, -1)))
    ids = torch.arange(48).view(4, 12)
    run = Run(Tokens(ids, real.expand(4, -1)), maps=Maps({0: padded}), provenance=Provenance("by hand"))
    torch.testing.assert_close(positional_share(run, by=by).values["positional"][0], wanted)


def test_what_cannot_be_told_is_refused():
    rows = random_rows(2, 1, 6)
    with pytest.raises(WorkbenchError, match="two or more"):
        positional_share(AttentionMap.from_dense(rows[:1]))
    with pytest.raises(Refused, match="signed"):
        positional_share(AttentionMap.from_dense(torch.randn(2, 1, 6, 6).tril()))
    for by in ("head", 0, True):
        with pytest.raises(WorkbenchError, match="size of blocks"):
            positional_share(AttentionMap.from_dense(rows), by=by)
    left = Tokens(torch.arange(12).view(2, 6), torch.arange(6).expand(2, -1) > 0)
    with pytest.raises(WorkbenchError, match="pad on the right"):
        positional_share(Run(left, maps=Maps({0: AttentionMap.from_dense(rows)}), provenance=Provenance("x")))
    with pytest.raises(WorkbenchError, match="length at least queries"):
        moved_tokens(make(), length=8)
    with pytest.raises(Refused, match="no room"):
        moved_tokens(make(), length=64 + 8, words=range(23))


def test_weights_that_depend_on_the_token_follow_it():
    """Without positions, the first layer's weights are a function of the query's and the key's token."""
    model = make(replace(CONFIG, positions="none", layers=1))
    found = moved_tokens(model, sequences=6, words=range(3, 20))
    assert found.values["follows"][0].tolist() == pytest.approx([1] * 4)
    assert found.values["stays"][0].abs().max() < 0.3
    assert found.null["follows"][0].abs().max() < 0.3


def test_a_head_that_looks_at_positions_stays():
    found = moved_tokens(wb.load("compiled-induction"), sequences=4)
    assert float(found.values["stays"][0][1]) == pytest.approx(1, abs=1e-3)
    assert abs(float(found.values["follows"][0][1])) < 0.2
    assert found.values["follows"][0][0].isnan()
    assert "same weight" in found.undefined["stays"]


def test_the_compiled_heads_are_split_as_they_were_built():
    model = wb.load("compiled-induction")
    run = model.run(random_texts(model, 12, 40, None, torch.Generator().manual_seed(0)), maps=wb.capture())
    found = positional_share(run).values["positional"]
    assert float(found[0][1]) == pytest.approx(1, abs=1e-3)
    assert abs(float(found[1][2])) < 0.1


def test_correlation():
    x = torch.tensor([[1.0, 2, 4], [3, 3, 3]])
    assert correlation(x, 2 * x + 1)[0] == pytest.approx(1)
    assert correlation(x, -x)[0] == pytest.approx(-1)
    assert correlation(x, x)[1].isnan()
