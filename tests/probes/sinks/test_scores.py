import itertools
import math

import pytest
import torch

import workbench as wb
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap, GatedMap
from workbench.models.protocol import Tokens
from workbench.probes.bootstrap import interval, standard_error
from workbench.probes.sinks.scores import sinks
from workbench.results import load_result
from workbench.run import Maps, Provenance, Run

T = 6


def softmax_rows(*shape, seed=0, causal=True):
    scores = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    if causal:
        scores = scores.masked_fill(torch.ones(shape[-2:]).triu(1 + shape[-1] - shape[-2]).bool(), float("-inf"))
    return scores.softmax(-1)


def uniform_causal(length=T):
    rows = torch.ones(length, length, dtype=torch.float64).tril()
    return (rows / rows.sum(-1, keepdim=True))[None, None]


def shares(result, layer=0, head=0):
    table = result.frame()
    return table[(table["layer"] == layer) & (table["head"] == head)].sort_values("key")["share"].to_numpy()


def run_of(maps, ids=None, mask=None, labels=(), **options):
    first = next(iter(maps.values()))
    ids = torch.arange(first.shape[0] * first.shape[2]).reshape(first.shape[0], -1) if ids is None else ids
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    return Run(Tokens(ids, mask, labels), maps=Maps(maps), provenance=Provenance("toy"), **options)


def test_uniform_causal_attention_in_closed_form():
    result = wb.sinks(AttentionMap.from_dense(uniform_causal()))
    expected = [sum(1 / (i + 1) for i in range(k, T)) / (T - k) for k in range(T)]
    torch.testing.assert_close(torch.tensor(shares(result)), torch.tensor(expected, dtype=torch.float64))
    table = result.frame()
    assert table.columns[:5].tolist() == ["layer", "head", "key", "token", "share"]
    torch.testing.assert_close(torch.tensor(table["uniform"].to_numpy()), torch.tensor(expected, dtype=torch.float64))
    assert table["queries"].tolist() == [6, 5, 4, 3, 2, 1]
    assert math.isclose(result.f_attn, expected[0])


def test_identity_attention_gives_every_key_its_own_query_only():
    result = sinks(AttentionMap.from_dense(torch.eye(T).expand(1, 2, T, T)))
    torch.testing.assert_close(torch.tensor(shares(result)), torch.tensor([1 / (T - k) for k in range(T)]).double())
    assert result.sink_score == 0.0


def test_bidirectional_shares_average_over_all_queries():
    weights = softmax_rows(2, 3, T, T, causal=False)
    result = sinks(AttentionMap.from_dense(weights))
    torch.testing.assert_close(result.share[0], weights.mean((0, 2)))
    torch.testing.assert_close(result.uniform[0], torch.full((3, T), 1 / T, dtype=torch.float64))


def test_a_planted_sink_is_found_where_it_was_put():
    weights = softmax_rows(1, 4, T, T).clone()
    weights[:, 2, 1:] = 0.1 * weights[:, 2, 1:]
    weights[:, 2, 1:, 1] += 0.9
    result = sinks(AttentionMap.from_dense(weights))
    best = result.strongest()[0]
    assert (best.layer, best.head, best.key) == (0, 2, 1)
    assert best.share > 0.9 > best.uniform
    assert best.share == pytest.approx(float(weights[0, 2, 1:, 1].mean()))


def test_the_strongest_sink_is_no_key_that_hardly_anybody_sees():
    found = sinks(AttentionMap.from_dense(torch.eye(T).expand(1, 1, T, T))).strongest()
    assert [(sink.key, sink.share) for sink in found] == [(3, pytest.approx(1 / 3))]


def test_sink_score_counts_heads_above_epsilon():
    weights = uniform_causal(40).expand(1, 4, 40, 40).clone()
    for head, mass in ((0, 0.2), (1, 0.35), (3, 0.8)):
        weights[:, head] *= 1 - mass
        weights[:, head, :, 0] += mass
    maps = [AttentionMap.from_dense(weights), AttentionMap.from_dense(uniform_causal(40).expand(1, 4, 40, 40))]
    alpha = weights.mean(2)[0, :, 0]
    assert alpha.gt(0.3).tolist() == [False, True, False, True]
    result = sinks(maps, epsilon=0.3)
    assert result.sink_score == pytest.approx(2 / 8)
    assert sinks(maps, epsilon=0.85).sink_score == 0.0
    assert result.layers()["sink_score"].tolist() == [0.5, 0.0]
    expected = (alpha.mean() + uniform_causal(40)[0, 0, :, 0].mean()) / 2
    assert result.f_attn == pytest.approx(float(expected))


def test_windowed_queries_that_cannot_see_the_first_token_count_for_f_attn_only():
    window = Mask(causal=True, window=2)
    rows = torch.eye(T, dtype=torch.float64) + torch.diag(torch.ones(T - 1, dtype=torch.float64), -1)
    weights = (rows / rows.sum(-1, keepdim=True))[None, None]
    result = sinks(AttentionMap.from_dense(weights), mask=window)
    assert shares(result)[0] == pytest.approx((1 + 0.5) / 2)
    assert result.f_attn == pytest.approx((1 + 0.5) / T)
    assert result.frame()["queries"].tolist() == [2, 2, 2, 2, 2, 1]
    assert result.sink_score == 1.0


def test_decoding_steps_see_the_cache():
    weights = softmax_rows(1, 1, 2, T)
    result = sinks(AttentionMap.from_dense(weights))
    assert result.frame()["queries"].tolist() == [2, 2, 2, 2, 2, 1]
    torch.testing.assert_close(result.share[0][0, :5], weights[0, 0, :, :5].mean(0))
    assert shares(result)[5] == pytest.approx(float(weights[0, 0, 1, 5]))
    run = run_of({0: AttentionMap.from_dense(weights)}, torch.tensor([[7, 8]]), labels=(("x", "y"),))
    assert sinks(run).tokens[0] == ("", "", "", "", "x", "y")


def test_a_single_token_has_no_sink_score():
    result = sinks(AttentionMap.from_dense(torch.ones(1, 2, 1, 1)))
    assert shares(result).tolist() == [1.0]
    assert math.isnan(result.sink_score)
    assert math.isnan(result.f_attn)
    assert "by necessity" in result.layers()["reason"][0]


def test_a_key_nobody_may_see_is_undefined():
    hidden = Mask(causal=True, keys=torch.tensor([[True, True, False, True, True, True]]))
    rows = torch.ones(T, T, dtype=torch.float64).tril() * hidden.keys
    result = sinks(AttentionMap.from_dense((rows / rows.sum(-1, keepdim=True))[None, None]), mask=hidden)
    assert [math.isnan(share) for share in shares(result)] == [False, False, True, False, False, False]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side, monkeypatch):
    monkeypatch.setattr("workbench.probes.sinks.shares._CHUNK", 2 * 2 * 2 * T)
    short, long = softmax_rows(1, 2, 4, 4, seed=1), softmax_rows(1, 2, T, T, seed=2)
    lo = 2 if side == "left" else 0
    padded = torch.full((1, 2, T, T), 1 / T, dtype=torch.float64)
    padded[:, :, lo : lo + 4] = 0
    padded[:, :, lo : lo + 4, lo : lo + 4] = short
    mask = torch.ones(2, T, dtype=torch.bool)
    mask[1] = False
    mask[1, lo : lo + 4] = True
    ids = torch.tensor([[1, 2, 3, 4, 5, 6], [0] * lo + [1, 2, 9, 4] + [0] * (2 - lo)])
    weights = torch.cat([long, padded])
    source = run_of(
        {0: AttentionMap.from_dense(weights)}, ids, mask, tuple(tuple(map(str, row)) for row in ids.tolist())
    )
    result = sinks(source, mask=Mask(causal=True))

    apart = [sinks(AttentionMap.from_dense(w)) for w in (long, short)]
    torch.testing.assert_close(result.share[0][:, :4], (apart[0].share[0][:, :4] + apart[1].share[0]) / 2)
    torch.testing.assert_close(result.share[0][:, 4:], apart[0].share[0][:, 4:])
    torch.testing.assert_close(result.uniform[0][:, :4], (apart[0].uniform[0][:, :4] + apart[1].uniform[0]) / 2)
    assert result.f_attn == pytest.approx((apart[0].f_attn + apart[1].f_attn) / 2)
    assert result.tokens[0] == ("1", "2", "", "4", "5", "6")
    assert result.queries[0].tolist() == [5, 4, 3, 2, 1, 0.5]


def test_a_batch_is_the_mean_of_its_sequences():
    weights = softmax_rows(3, 2, T, T)
    together = sinks(AttentionMap.from_dense(weights))
    apart = [sinks(AttentionMap.from_dense(w[None])) for w in weights]
    torch.testing.assert_close(together.share[0], torch.stack([r.share[0] for r in apart]).mean(0))
    assert together.f_attn == pytest.approx(sum(r.f_attn for r in apart) / 3)
    assert together.sink_score == pytest.approx(sum(r.sink_score for r in apart) / 3)
    low, high = together.interval("f_attn")
    ends = min(r.f_attn for r in apart), max(r.f_attn for r in apart)
    assert ends[0] - 1e-12 <= low <= together.f_attn <= high <= ends[1] + 1e-12
    assert low < high
    assert all(math.isnan(x) for x in apart[0].interval("f_attn"))
    assert apart[0].error[0].isnan().all()
    spread = torch.stack([r.share[0] for r in apart]).std(0) / 3**0.5
    torch.testing.assert_close(together.error[0], spread)


def test_gated_maps_count_as_they_act_unless_raw():
    weights = softmax_rows(2, 2, T, T)
    gate = torch.rand(2, 2, T, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    inner = AttentionMap.from_dense(weights)
    gated = GatedMap(inner, gate)
    torch.testing.assert_close(
        sinks(gated).share[0], sinks(AttentionMap.from_dense(weights * gate[..., None])).share[0]
    )
    torch.testing.assert_close(sinks(gated, raw=True).share[0], sinks(inner).share[0])
    torch.testing.assert_close(sinks(gated).gate[0], gate.mean((0, 2)))
    even = GatedMap(AttentionMap.from_dense(uniform_causal().expand(2, 2, T, T)), gate)
    result = sinks(even)
    torch.testing.assert_close(result.share[0], result.uniform[0])


def test_streaming_softmax_maps_agree_with_dense_ones():
    from workbench.patterns.softmax import SoftmaxMap

    generator = torch.Generator().manual_seed(5)
    q, k = (torch.randn(2, h, T, 4, dtype=torch.float64, generator=generator) for h in (4, 2))
    keys = torch.tensor([[True] * T, [False, False] + [True] * 4])
    for mask in (Mask(causal=True), Mask(), Mask(causal=True, window=3), Mask(causal=True, window=2, prefix=1)):
        streaming = sinks(SoftmaxMap(q, k, mask=mask))
        dense = sinks(AttentionMap.from_dense(SoftmaxMap(q, k, mask=mask).dense()), mask=mask)
        torch.testing.assert_close(streaming.share[0], dense.share[0])
        torch.testing.assert_close(streaming.uniform[0], dense.uniform[0])
        assert streaming.f_attn == pytest.approx(dense.f_attn)
    padded = SoftmaxMap(q, k, mask=Mask(causal=True, keys=keys))
    alone = SoftmaxMap(q[1:, :, 2:], k[1:, :, 2:], mask=Mask(causal=True))
    whole = SoftmaxMap(q[:1], k[:1], mask=Mask(causal=True))
    expected = (sinks(alone).f_attn + sinks(whole).f_attn) / 2
    assert sinks(padded).f_attn == pytest.approx(expected)


def test_only_column_sums_are_read(monkeypatch):
    amap = AttentionMap.from_dense(softmax_rows(1, 2, T, T))
    amap.received()
    monkeypatch.setattr(type(amap), "rows", lambda *args: pytest.fail("rows were built"))
    assert sinks(amap, mask=Mask(causal=True)).f_attn > 0


def test_rows_that_the_mask_empties_are_not_walked(monkeypatch):
    from workbench.patterns.softmax import SoftmaxMap

    q, k = (torch.randn(1, 2, T, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    real = torch.tensor([[False, False, True, True, True, True]])
    walked = SoftmaxMap(q, k, mask=Mask(causal=True, keys=real))
    emptied = SoftmaxMap(q, k, mask=Mask(causal=True, keys=real, queries=real))
    emptied.received()
    monkeypatch.setattr(emptied, "rows", lambda *args: pytest.fail("rows were built"))
    torch.testing.assert_close(sinks(emptied).share[0], sinks(walked).share[0], equal_nan=True)
    assert sinks(emptied).f_attn == pytest.approx(sinks(walked).f_attn)


def test_runs_mappings_lists_and_single_maps_agree():
    maps = {
        0: AttentionMap.from_dense(softmax_rows(1, 2, T, T)),
        1: AttentionMap.from_dense(softmax_rows(1, 2, T, T, seed=1)),
    }
    results = [sinks(source) for source in (run_of(maps), Maps(maps), maps, list(maps.values()))]
    for result in results:
        assert list(result.share) == [0, 1]
        torch.testing.assert_close(result.share[1], results[0].share[1])
    torch.testing.assert_close(sinks(maps[0]).share[0], results[0].share[0])


def test_tokens_name_the_keys():
    maps = {"encoder.0": AttentionMap.from_dense(softmax_rows(1, 1, 3, 3, causal=False))}
    named = sinks(run_of(maps, torch.tensor([[5, 6, 7]]), labels=(("<bos>", "a", "b"),)))
    assert named.frame()["token"].tolist() == ["<bos>", "a", "b"]
    assert sinks(run_of(maps, torch.tensor([[5, 6, 7]]))).frame()["token"].tolist() == ["#5", "#6", "#7"]
    assert sinks(maps).frame()["token"].tolist() == ["", "", ""]
    assert named.frame()["layer"].unique().tolist() == ["encoder.0"]


def test_two_stacks_take_padding_and_names_from_their_own_side():
    decoder = torch.tensor([[3, 4]])
    tokens = Tokens(
        torch.tensor([[5, 6, 0]]),
        torch.tensor([[True, True, False]]),
        (("a", "b", "<pad>"),),
        {"decoder_input_ids": decoder},
    )
    maps = {
        "encoder.0": AttentionMap.from_dense(softmax_rows(1, 1, 3, 3, causal=False)),
        "decoder.0": AttentionMap.from_dense(softmax_rows(1, 1, 2, 2)),
        "cross.0": AttentionMap.from_dense(softmax_rows(1, 1, 2, 3, causal=False), offset=0),
    }
    result = sinks(Run(tokens, maps=Maps(maps)), mask=Mask())
    assert result.tokens["encoder.0"] == ("a", "b", "")
    assert result.queries["encoder.0"].tolist() == [2, 2, 0]
    assert result.tokens["decoder.0"] == ("#3", "#4")
    assert result.tokens["cross.0"] == ("a", "b", "")
    assert result.queries["cross.0"].tolist() == [2, 2, 0]
    assert sinks(Run(tokens, maps=Maps({"vision.0": maps["encoder.0"]}))).tokens["vision.0"] == ("", "", "")


def test_keys_keeps_the_first_ones():
    amap = AttentionMap.from_dense(softmax_rows(1, 2, T, T))
    few, all_keys = sinks(amap, keys=2), sinks(amap)
    assert len(few.frame()) == 2 * 2
    torch.testing.assert_close(few.share[0], all_keys.share[0][:, :2])
    assert few.f_attn == all_keys.f_attn
    assert sinks(amap, keys=100).share[0].shape == (2, T)


def test_what_cannot_be_answered_is_refused():
    amap = AttentionMap.from_dense(softmax_rows(1, 1, T, T))
    for epsilon in (0, 1, -1):
        with pytest.raises(WorkbenchError, match="epsilon"):
            sinks(amap, epsilon=epsilon)
    for keys in (0, True, 1.5):
        with pytest.raises(WorkbenchError, match="keys is how many"):
            sinks(amap, keys=keys)
    with pytest.raises(WorkbenchError, match="captured no attention"):
        sinks(Run(Tokens.of(torch.ones(1, 3, dtype=torch.long))))
    with pytest.raises(WorkbenchError, match="from_dense"):
        sinks(torch.ones(1, 1, 2, 2))
    with pytest.raises(WorkbenchError, match="layer 1 is a Tensor"):
        sinks([amap, torch.ones(1)])
    with pytest.raises(WorkbenchError, match="no attention maps"):
        sinks({})
    with pytest.raises(Refused, match="channel map"):
        sinks(AttentionMap.from_dense(torch.eye(3).expand(1, 1, 3, 3), domain="channel"))
    with pytest.raises(Refused, match="inside its gate"):
        sinks(AttentionMap.from_dense(torch.eye(3).expand(1, 1, 3, 3), row_sum="gate"), raw=True)
    with pytest.raises(UnknownName, match="f_attn"):
        sinks(amap).per_sequence("f-attn")


def test_result_is_drawn_shown_and_saved(tmp_path):
    maps = [AttentionMap.from_dense(softmax_rows(2, h, T, T)) for h in (2, 3)]
    result = sinks(maps)
    ax = result.plot()
    assert ax.get_title().startswith("Strongest sink")
    assert ax.images[0].get_array().shape == (2, 3)
    assert "share" in result._repr_html_()
    saved = load_result(result.save(tmp_path / "sinks"))
    assert saved.tensors["share.1"].equal(result.share[1])
    assert len(saved.frame()) == len(result.frame()) == 5 * T


def test_bootstrap_interval_is_that_of_all_resamples():
    values = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 6.0]], dtype=torch.float64)
    means = sorted(sum(pick) / 3 for pick in itertools.product([1.0, 2.0, 6.0], repeat=3))
    low, high = interval(values, draws=20000)
    assert (low[0], high[0]) == (0.0, 0.0)
    assert float(low[1]) == pytest.approx(means[0])
    assert float(high[1]) == pytest.approx(means[-1])
    assert interval(values, seed=3)[0].equal(interval(values, seed=3)[0])
    broken = torch.tensor([[1.0], [float("nan")], [3.0]])
    assert interval(broken)[0].item() == pytest.approx(1.0)
    assert standard_error(broken).item() == pytest.approx(torch.tensor([1.0, 3.0]).std().item() / 2**0.5)
    assert interval(broken[:2])[0].isnan().all()


def test_the_sink_score_is_that_of_the_authors_at_every_position():
    """64 tokens and 100 sequences: column sums over T - k + 1, a threshold of .3, the mean over samples, layers and heads."""
    scores = torch.randn(2, 100, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    scores[..., 0] += 4.0
    scores[:, :, 1, :, 2] += 5.0
    weights = scores.masked_fill(torch.ones(64, 64).triu(1).bool(), float("-inf")).softmax(-1)
    ratios = torch.arange(64, 0, -1, dtype=torch.float64)
    strength = (weights / ratios).sum(-2)
    expected = (strength > 0.3).double().mean((0, 1, 2))
    maps = [AttentionMap.from_dense(layer) for layer in weights]
    found = [sinks(maps, epsilon=0.3, token=k, keys=1).sink_score for k in (0, 1, 2, 40)]
    assert found == pytest.approx(expected[[0, 1, 2, 40]].tolist())
    assert found[1] == found[3] == 0.0 < found[2] < 0.5 < found[0]
    second = sinks(maps, token=2)
    assert second.f_attn == pytest.approx(float(weights[..., 2].mean()))
    assert second.layers()["uniform"][0] == pytest.approx(sum(1 / (i + 1) for i in range(2, 64)) / 62)
    assert math.isnan(sinks(maps, token=2, keys=1).layers()["uniform"][0])


def test_a_sink_that_does_not_exist_is_refused():
    amap = AttentionMap.from_dense(softmax_rows(1, 1, T, T))
    with pytest.raises(WorkbenchError, match="no token 6"):
        sinks(amap, token=T)
    for token in (-1, True, 0.5):
        with pytest.raises(WorkbenchError, match="counted from 0"):
            sinks(amap, token=token)
    assert sinks(amap, token=T - 1).undefined == {}
    mask = torch.tensor([[False, True, True, True, True, True]])
    padded = run_of({0: AttentionMap.from_dense(softmax_rows(1, 1, T, T))}, torch.zeros(1, T, dtype=torch.long), mask)
    assert math.isnan(sinks(padded, token=T - 1).f_attn)
