import math

import pytest
import torch

import workbench as wb
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap, GatedMap
from workbench.models.protocol import Manifest, Shape, Tokens
from workbench.patterns.softmax import SoftmaxMap
from workbench.probes.heads.kinds import head_scores
from workbench.probes.heads.repeats import repeats
from workbench.results import load_result
from workbench.run import EMPTY, Maps, Provenance, Run


def planted(ids, wanted, strength=0.75):
    """Rows that put ``strength`` on the keys ``wanted(b, q)`` (the rest, or everything, on the first key)."""
    rows = torch.zeros(*ids.shape, ids.shape[1], dtype=torch.float64)
    for b in range(len(ids)):
        for q in range(ids.shape[1]):
            keys = wanted(b, q)
            rows[b, q, 0] += 1 - strength * bool(keys)
            for k in keys:
                rows[b, q, k] += strength / len(keys)
    return rows


def heads_of(ids, distance):
    """Layer 0: previous, duplicate. Layer 1: induction, a fixed distance, uniform causal."""
    t = ids.tolist()

    def earlier(b, q):
        return [k for k in range(q) if t[b][k] == t[b][q]]

    uniform = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.float64).tril()
    uniform = (uniform / uniform.sum(-1, keepdim=True)).expand(len(ids), -1, -1)
    return {
        0: torch.stack([planted(ids, lambda b, q: [q - 1] if q else []), planted(ids, earlier)], 1),
        1: torch.stack(
            [
                planted(ids, lambda b, q: [k + 1 for k in earlier(b, q)]),
                planted(ids, lambda b, q: [q - distance] if q >= distance else []),
                uniform,
            ],
            1,
        ),
    }


class Tokenizer:
    bos_token_id = 0
    all_special_ids = (0, 3)

    def __len__(self):
        return 40


class Planted:
    """A model whose heads are known."""

    name = "planted"
    tokenizer = Tokenizer()

    def __init__(self, distance=4, vocab=60, context=64, wrap=AttentionMap.from_dense):
        self.shape = Shape(2, 3, 3, 8, 4, vocab, context)
        self.distance, self.wrap, self.seen = distance, wrap, []

    def tokens(self, texts):
        raise NotImplementedError

    def manifest(self):
        return Manifest(self.name, ())

    def run(self, tokens, read=(), edit=EMPTY, maps=None, *, logits="all", cache=None):
        self.seen.append(tokens)
        found = {
            k: self.wrap(v) for k, v in heads_of(tokens, self.distance).items() if not maps.layers or k in maps.layers
        }
        return Run(Tokens.of(tokens), maps=Maps(found), provenance=Provenance(self.name))


def row(result, layer, head, kind):
    table = result.frame()
    return table[(table["layer"] == layer) & (table["head"] == head) & (table["kind"] == kind)].iloc[0]


def test_planted_heads_get_their_strength_and_their_nulls():
    result = wb.head_scores(Planted(), batches=2, sequences=3, period=(5, 5))
    assert result.frame().columns[:7].tolist() == ["layer", "head", "kind", "value", "null", "low", "high"]
    assert result.sequences == 6
    assert result.undefined == {}
    for layer, head, kind in ((0, 0, "previous"), (0, 1, "duplicate"), (1, 0, "induction")):
        found = row(result, layer, head, kind)
        assert found["value"] == pytest.approx(0.75, abs=0.07)
        assert found["null"] < 0.35
        assert found["z"] > 3
        assert result.top(kind, 1)[0][:2] == (layer, head)
    assert row(result, 0, 1, "induction")["value"] < 0.1
    assert row(result, 1, 0, "duplicate")["value"] < 0.1
    exact = row(result, 0, 1, "duplicate")
    assert (exact["low"], exact["value"], exact["high"]) == pytest.approx((0.75, 0.75, 0.75))
    assert exact["null"] == 0.0
    assert exact["z"] == math.inf


def test_a_head_that_only_likes_a_distance_keeps_its_score_in_the_null():
    found = row(head_scores(Planted(distance=4), batches=1, sequences=4, period=(5, 5)), 1, 1, "induction")
    assert found["value"] == pytest.approx(found["null"]) == pytest.approx(0.75)
    assert found["z"] == 0.0


def test_uniform_attention_scores_what_uniform_says():
    result = head_scores(Planted(), batches=1, sequences=2, period=(5, 5))
    # after the start token the copies are the queries 6 .. 10, each with one earlier copy among q + 1 visible keys
    expected = sum(1 / (q + 1) for q in range(6, 11)) / 5
    for kind in ("duplicate", "induction"):
        found = row(result, 1, 2, kind)
        assert found["uniform"] == pytest.approx(expected)
        assert found["value"] == pytest.approx(expected)
    previous = row(result, 1, 2, "previous")
    assert previous["uniform"] == pytest.approx(sum(1 / (q + 1) for q in range(1, 11)) / 10)
    assert previous["null"] == pytest.approx(previous["value"])


def test_repeats_and_their_controls_are_what_they_say():
    model = Planted(vocab=50)
    pairs = list(repeats(model, 3, 4, (4, 9), torch.Generator().manual_seed(0)))
    assert len({normal.shape[1] for normal, _ in pairs}) > 1
    for normal, control in pairs:
        period = (normal.shape[1] - 1) // 2
        assert 4 <= period <= 9
        for line, other in zip(normal.tolist(), control.tolist(), strict=True):
            assert line[0] == other[0] == 0
            assert line[1 : 1 + period] == line[1 + period :] == other[1 : 1 + period]
            assert len(set(other)) == len(other)
            assert not {0, 3} & {*line[1:], *other[1:]}
            assert max(other) < 40
    assert not pairs[0][0][0].equal(pairs[0][0][1])


def test_seeds_decide_the_tokens():
    def seen(seed):
        model = Planted()
        result = head_scores(model, batches=1, sequences=2, period=(4, 6), seed=seed)
        return model.seen[0], result.frame()

    (a, first), (b, again), (c, _) = seen(0), seen(0), seen(1)
    assert a.equal(b)
    assert first.equals(again)
    assert not (a.shape == c.shape and a.equal(c))


def test_periods_are_cut_to_context_and_vocabulary():
    model = Planted(context=20)
    head_scores(model, batches=1, sequences=1, period=(16, 48))
    assert model.seen[0].shape == (1, 19)
    small = Planted(vocab=14)
    head_scores(small, batches=1, sequences=1, period=(16, 48))
    assert small.seen[0].shape == (1, 13)
    plain = Planted(vocab=12)
    plain.tokenizer = None
    head_scores(plain, batches=1, sequences=1, period=(16, 48))
    assert plain.seen[0].shape == (1, 12)
    with pytest.raises(Refused, match="no room"):
        head_scores(Planted(vocab=9))


TEXT = torch.tensor([[1, 2, 3, 2, 4, 3, 5, 2]])


def run_of(maps, ids=TEXT, mask=None):
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    return Run(Tokens(ids, mask), maps=Maps(maps), provenance=Provenance("toy"))


def test_a_given_text_is_scored_at_its_own_repeats():
    weights = torch.rand(1, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tril()
    weights = weights / weights.sum(-1, keepdim=True)
    result = head_scores(run_of({0: AttentionMap.from_dense(weights)}))
    w = weights[0, 0]
    expected = {
        "previous": sum(w[q, q - 1] for q in range(1, 8)) / 7,
        "duplicate": (w[3, 1] + w[5, 2] + w[7, 1] + w[7, 3]) / 3,
        "induction": (w[3, 2] + w[5, 3] + w[7, 2] + w[7, 4]) / 3,
    }
    for kind, value in expected.items():
        assert row(result, 0, 0, kind)["value"] == pytest.approx(float(value))
        assert math.isnan(row(result, 0, 0, kind)["low"])
    even = {"duplicate": (1 / 4 + 1 / 6 + 2 / 8) / 3, "previous": sum(1 / (q + 1) for q in range(1, 8)) / 7}
    for kind, value in even.items():
        assert row(result, 0, 1, kind)["uniform"] == pytest.approx(value)
    assert result.source == "text"


def test_shuffled_tokens_are_the_null_of_a_text():
    heads = heads_of(TEXT, 2)
    result = head_scores(run_of({k: AttentionMap.from_dense(v) for k, v in heads.items()}), shuffles=40)
    duplicate, induction = row(result, 0, 1, "duplicate"), row(result, 1, 0, "induction")
    for found in (duplicate, induction):
        assert found["value"] == pytest.approx(0.75, abs=0.05)
        assert found["null"] < 0.5
        assert found["z"] > 1.5


@pytest.mark.parametrize("shuffles", [3, 7, 10])
def test_a_text_of_one_word_is_its_own_null(shuffles):
    weights = torch.rand(1, 8, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).tril()
    amap = AttentionMap.from_dense(weights / weights.sum(-1, keepdim=True))
    result = head_scores(run_of({0: amap}, torch.zeros(1, 9, dtype=torch.long)), shuffles=shuffles)
    assert result.z[0][1:].unique().tolist() == [0]


def test_text_without_repeats_has_no_score():
    ids = torch.arange(6)[None]
    result = head_scores(run_of({0: AttentionMap.from_dense(torch.eye(6).expand(1, 2, 6, 6))}, ids))
    table = result.frame()
    assert table[table["kind"] != "previous"]["value"].isna().all()
    assert table[table["kind"] == "previous"]["value"].tolist() == [0, 0]
    assert set(result.undefined) == {"duplicate", "induction"}
    assert result.top("induction") == []
    result.plot()


def test_padding_is_left_out():
    weights = heads_of(TEXT, 2)[0]
    padded = torch.full((1, 2, 11, 11), 1 / 11, dtype=torch.float64)
    padded[:, :, 3:] = 0
    padded[:, :, 3:, 3:] = weights
    ids = torch.cat([torch.zeros(1, 3, dtype=torch.long), TEXT], 1)
    plain = head_scores(run_of({0: AttentionMap.from_dense(weights)}))
    left = head_scores(run_of({0: AttentionMap.from_dense(padded)}, ids, ids > 0))
    torch.testing.assert_close(left.value[0], plain.value[0])


def test_a_padding_token_that_also_stands_in_the_text_is_no_earlier_copy():
    weights = torch.eye(7).expand(1, 1, 7, 7)
    plain = head_scores(run_of({0: AttentionMap.from_dense(weights[..., 3:, 3:])}, torch.tensor([[9, 1, 2, 1]])))
    ids = torch.tensor([[9, 9, 9, 9, 1, 2, 1]])
    left = head_scores(run_of({0: AttentionMap.from_dense(weights)}, ids, torch.arange(7)[None] >= 3))
    torch.testing.assert_close(left.value[0], plain.value[0])
    torch.testing.assert_close(left.uniform[0], plain.uniform[0])


def test_what_padding_rows_hold_does_not_matter():
    ids = torch.tensor([[1, 2, 1, 2, 0, 0, 0]])
    q = torch.randn(1, 2, 7, 4, generator=torch.Generator().manual_seed(0))
    mask = Mask(causal=True, keys=ids > 0)
    poisoned = q.masked_fill((ids == 0)[:, None, :, None], math.nan)
    expected, got = (head_scores(run_of({0: SoftmaxMap(x, x, mask=mask)}, ids, ids > 0)) for x in (q, poisoned))
    assert expected.value[0].isfinite().all()
    torch.testing.assert_close(got.value[0], expected.value[0])


def test_padding_tokens_are_not_shuffled_into_the_text():
    ids = torch.tensor([[0, 0, 0, 1, 2, 3, 4]])
    weights = torch.eye(7).expand(1, 1, 7, 7)
    result = head_scores(run_of({0: AttentionMap.from_dense(weights)}, ids, ids > 0))
    assert result.null[0][1:].isnan().all()
    assert set(result.undefined) == {"duplicate", "induction"}


def test_rows_may_come_in_any_chunks(monkeypatch):
    heads = {k: AttentionMap.from_dense(v) for k, v in heads_of(TEXT.repeat(2, 1), 2).items()}
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, 6:] = False
    whole = head_scores(run_of(heads, TEXT.repeat(2, 1), mask)).frame()
    for module in ("masses", "visibility"):
        monkeypatch.setattr(f"workbench.probes.{module}._CHUNK", 3 * 2 * 3 * 8)
    chunked = head_scores(run_of(heads, TEXT.repeat(2, 1), mask)).frame()
    for column in ("value", "null", "uniform"):
        assert chunked[column].tolist() == pytest.approx(whole[column].tolist(), nan_ok=True)


def test_streaming_and_dense_maps_agree():
    from workbench.patterns.softmax import SoftmaxMap

    q, k = (torch.randn(1, h, 8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(h)) for h in (4, 2))
    amap = SoftmaxMap(q, k, mask=Mask(causal=True, window=4))
    streaming = head_scores(run_of({0: amap}))
    dense = head_scores(run_of({0: AttentionMap.from_dense(amap.dense())}))
    torch.testing.assert_close(streaming.value[0][0], dense.value[0][0])
    # the window hides the copy of token 2 that stands six back, so that only the near one is a key to look at
    w = amap.dense()[0, 0]
    assert float(streaming.value[0][1, 0]) == pytest.approx(float(w[3, 1] + w[5, 2]) / 2)


def test_gated_maps_are_scaled_unless_raw():
    def gated(weights):
        return GatedMap(AttentionMap.from_dense(weights), torch.full(weights.shape[:3], 0.5, dtype=torch.float64))

    options = {"batches": 1, "sequences": 2, "period": (5, 5)}
    plain = head_scores(Planted(), **options)
    acting, inside = head_scores(Planted(wrap=gated), **options), head_scores(Planted(wrap=gated), raw=True, **options)
    for name in ("value", "null", "uniform"):
        torch.testing.assert_close(getattr(acting, name)[0], getattr(plain, name)[0] / 2)
        torch.testing.assert_close(getattr(inside, name)[0], getattr(plain, name)[0])


def test_layers_that_are_no_self_attention_are_named():
    maps = {
        0: AttentionMap.from_dense(heads_of(TEXT, 2)[0]),
        "cross.0": AttentionMap.from_dense(torch.ones(1, 1, 8, 3)),
        "vision.0": AttentionMap.from_dense(torch.ones(1, 1, 8, 8)),
    }
    result = head_scores(run_of(maps))
    assert list(result.value) == [0]
    assert result.skipped == ("cross.0", "vision.0")
    with pytest.raises(Refused, match=r"captured: cross\.0"):
        head_scores(run_of({"cross.0": maps["cross.0"]}))
    with pytest.raises(Refused, match="continues a cache"):
        head_scores(run_of({0: AttentionMap.from_dense(torch.ones(1, 1, 8, 12) / 12)}))


def test_what_is_unknown_is_refused():
    with pytest.raises(UnknownName, match="previous, duplicate, induction"):
        head_scores(Planted(), kinds=("inductoin",))
    with pytest.raises(WorkbenchError, match="no score"):
        head_scores(Planted(), kinds=())
    with pytest.raises(WorkbenchError, match="batches is at least 1"):
        head_scores(Planted(), batches=0)
    with pytest.raises(WorkbenchError, match="period"):
        head_scores(Planted(), period=(9, 5))
    with pytest.raises(WorkbenchError, match="a model or a run"):
        head_scores("gpt2")
    with pytest.raises(UnknownName, match="known: previous"):
        head_scores(Planted(), kinds="previous", batches=1, sequences=1).top("induction")


def test_result_is_drawn_shown_and_saved(tmp_path):
    result = head_scores(Planted(), kinds=("previous", "induction"), batches=1, sequences=2, period=(5, 5), layers=(1,))
    assert list(result.value) == [1]
    assert result.plot().get_title() == "Induction score of each head\nplanted"
    assert result.plot(kind="previous").get_title().startswith("Previous")
    assert "<table" in result._repr_html_()
    saved = load_result(result.save(tmp_path / "heads"))
    assert saved.tensors["value.1"].equal(result.value[1])
    assert saved.labels["kinds"] == ["previous", "induction"]
