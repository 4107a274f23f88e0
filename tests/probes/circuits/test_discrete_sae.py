import pytest
import torch

from workbench.circuits import Circuit
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.graph import edge_parts
from workbench.probes.circuits.codes import against, code_mass, pair_codes, pair_counts, swapped, unique_codes
from workbench.probes.circuits.components import Setting
from workbench.probes.circuits.discrete_coder import Coder, codes_of, encode, train
from workbench.probes.circuits.find import find_circuit
from workbench.probes.circuits.head_vectors import head_names, head_vectors, placed_vectors, principal
from workbench.probes.circuits.judgement.labels import auroc
from workbench.sites import Site

QUICK = {
    "features": 16,
    "epochs": 20,
    "trials": 1,
    "examples": 4,
    "pooling": "mean",
    "centre": False,
    "silent": 0.0,
    "dimensions": 0,
}


def planted(prompts=40, heads=24, true=6, codes=8, seed=0):
    """Codes drawn alike for all heads; true heads use two extra codes on half of the positive prompts."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(codes, (2 * prompts, heads), generator=generator)
    extra = codes + torch.randint(2, (prompts, true), generator=generator)
    found[:prompts, :true] = torch.where(
        torch.rand(prompts, true, generator=generator) < 0.5, extra, found[:prompts, :true]
    )
    return found, torch.arange(2 * prompts) < prompts


def as_circuit(scores):
    names = tuple(f"a0.h{i}" for i in range(len(scores)))
    return Circuit("node", names, scores, torch.ones(len(names), dtype=torch.bool))


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_code_score_equals_a_double_loop(relative, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(7, (10, 5), generator=generator) * 3
    positive = torch.rand(10, generator=generator) < 0.5
    expected = []
    for head in range(5):
        inside, outside = set(), set()
        for prompt in range(10):
            (inside if positive[prompt] else outside).add(int(codes[prompt, head]))
        expected.append(len(inside - outside) / (len(inside | outside) if relative else 1))
    assert unique_codes(codes, positive, relative).tolist() == pytest.approx(expected)
    labels = torch.stack([positive, ~positive])
    both = unique_codes(codes, labels, relative)
    assert both[0].tolist() == pytest.approx(expected)
    assert torch.equal(both[1], unique_codes(codes, ~positive, relative))


@pytest.mark.parametrize("seed", range(3))
def test_mass_of_codes_equals_a_double_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(5, (12, 4), generator=generator)
    positive = torch.arange(12) < 5
    expected = []
    for head in range(4):
        gap = 0.0
        column = codes[:, head].tolist()
        for code in set(column):
            gap += abs(column[:5].count(code) / 5 - column[5:].count(code) / 7)
        expected.append(gap / 2)
    assert code_mass(codes, positive).tolist() == pytest.approx(expected)
    assert code_mass(codes, torch.stack([positive, ~positive]))[1].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(3))
def test_pairs_of_codes_equal_a_double_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(4, (14, 5), generator=generator)
    positive = torch.rand(14, generator=generator) < 0.5
    found = pair_codes(codes, positive)
    for a in range(5):
        for b in range(5):
            inside = {(int(row[a]), int(row[b])) for row, yes in zip(codes, positive, strict=True) if yes}
            outside = {(int(row[a]), int(row[b])) for row, yes in zip(codes, positive, strict=True) if not yes}
            assert found[a, b] == len(inside - outside)
    assert torch.equal(found, found.T)
    assert torch.equal(found.diagonal(), unique_codes(codes, positive))


def test_heads_of_the_better_half_of_pairs_are_counted():
    pairs = torch.tensor([[0.0, 5.0, 1.0], [5.0, 0.0, 2.0], [1.0, 2.0, 0.0]])
    # Pairs by score: (0,1) 5, (1,0) 5, (1,2) 2, ...; 9 // 2 = 4 entries of the list of their heads: 0 1 1 0.
    assert pair_counts(pairs).tolist() == [2.0, 2.0, 0.0]


def planted_diverse(prompts, seed, true=6, heads=24):
    """As ``planted``, with heads that differ in how many codes they use: 2 to 40."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(2, 41, (heads,), generator=generator)
    found = (torch.rand(2 * prompts, heads, generator=generator) * sizes).long()
    extra = 100 + torch.randint(2, (prompts, true), generator=generator)
    found[:prompts, :true] = torch.where(
        torch.rand(prompts, true, generator=generator) < 0.3, extra, found[:prompts, :true]
    )
    return found, torch.arange(2 * prompts) < prompts


@pytest.mark.parametrize("statistic", [unique_codes, code_mass])
def test_shuffled_labels_are_at_chance_after_correction_and_planted_ones_found(statistic):
    """Diverse heads collect codes of their own by chance: the plain count finds them with shuffled labels too."""
    truth = Circuit.of("node", [f"a0.h{i}" for i in range(24)], [f"a0.h{i}" for i in range(6)])
    right, shuffled, plain = [], [], []
    for seed in range(10):
        codes, positive = planted_diverse(120, seed)
        null = statistic(codes, swapped(120, 200, seed)).mean(0)
        right.append(auroc(as_circuit(statistic(codes, positive) - null), truth, signed=True))
        other = swapped(120, 1, 1000 + seed)[0]
        shuffled.append(auroc(as_circuit(statistic(codes, other) - null), truth, signed=True))
        plain.append(auroc(as_circuit(statistic(codes, other)), truth))
    assert torch.tensor(right).mean() >= 0.95
    assert torch.tensor(shuffled).mean() == pytest.approx(0.5, abs=0.1)
    assert torch.tensor(plain).mean() > 0.55


def test_planted_codes_are_found():
    codes, positive = planted()
    truth = Circuit.of("node", [f"a0.h{i}" for i in range(24)], [f"a0.h{i}" for i in range(6)])
    scores = unique_codes(codes, positive)
    assert auroc(as_circuit(scores), truth) >= 0.95
    null = against(scores, unique_codes(codes, swapped(40, 200, 0)))
    assert null.p[:6].max() <= 0.05


def test_shuffled_labels_fall_into_the_null():
    codes, _ = planted(codes=30)
    null = unique_codes(codes, swapped(40, 400, seed=1))
    low, high = null.quantile(0.005, 0), null.quantile(0.995, 0)
    for seed in (2, 3, 4):
        shuffled = swapped(40, 1, seed)[0]
        scores = unique_codes(codes, shuffled)
        assert ((low <= scores) & (scores <= high)).double().mean() >= 0.9
        assert against(scores, null).z.nanmean().abs() < 1


def test_null_statistics_are_the_plain_ones():
    null = torch.tensor([[1.0, 2.0], [3.0, 2.0], [2.0, 2.0]], dtype=torch.float64)
    found = against(torch.tensor([3.0, 2.0]), null)
    assert found.mean.tolist() == [2.0, 2.0]
    assert found.z[0] == pytest.approx(1.0)
    assert found.z[1].isnan(), "a constant null has no z-score"
    assert found.p.tolist() == [0.5, 1.0]


@pytest.mark.parametrize("terms", [(1.0, 0.0, 0.0), (1 / 3, 1 / 3, 1 / 3), (1 / 6, 1 / 3, 1 / 2)])
def test_equal_means_of_several_trials_are_ties_whatever_the_order_of_their_sum(terms):
    """Null scores equal to the score count against it, and a constant null has no z-score."""
    a, b, c = (torch.tensor([term * 5 / 3], dtype=torch.float64) for term in terms)
    found = against(a + b + c, torch.stack([b + c + a, c + a + b, c + b + a] * 67))
    assert found.p.tolist() == [1.0]
    assert found.z.isnan().all()


def test_labels_are_swapped_within_pairs():
    labels = swapped(10, 50, seed=0)
    assert torch.equal(labels[:, :10], ~labels[:, 10:])
    assert torch.equal(labels, swapped(10, 50, seed=0))
    assert len(labels.unique(dim=0)) > 20


def test_a_head_that_answers_alike_on_both_prompts_of_a_pair_has_no_score_and_no_null():
    codes = torch.arange(20)[:, None].repeat(2, 3) % 7
    null = code_mass(codes, swapped(20, 200, 0))
    assert not code_mass(codes, torch.arange(40) < 20).any()
    assert not null.any()
    assert against(null[0], null).z.isnan().all()


def test_training_lowers_the_loss_and_keeps_unit_rows():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=generator)

    def loss(coder):
        f = encode(coder, x)
        return float((f @ coder.W_d + coder.b - x).pow(2).mean() + 0.02 * f.abs().mean())

    before = loss(Coder(6, 32, torch.Generator().manual_seed(1)))
    coder = train(x, 32, 0.02, 300, 1e-2, torch.Generator().manual_seed(1))
    assert loss(coder) < 0.3 * before
    assert coder.W_d.norm(dim=1).tolist() == pytest.approx([1.0] * 32, abs=1e-5)
    assert (encode(coder, x) >= 0).all()


def test_small_vectors_share_the_code_of_silence():
    coder = Coder(4, 6, torch.Generator().manual_seed(0))
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(1))
    strongest = encode(coder, x).max(-1)
    limit = float(strongest.values.median()) / 2
    codes = codes_of(coder, x, limit)
    quiet = strongest.values < 2 * limit
    assert (codes[quiet] == 6).all()
    assert torch.equal(codes[~quiet], strongest.indices[~quiet])
    assert torch.equal(codes_of(coder, x), strongest.indices)
    assert quiet.any()
    assert not quiet.all()


def test_principal_directions_hold_the_largest_squares():
    vectors = torch.randn(30, 4, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([9.0, 1, 5, 0.1, 1, 0.1])
    kept = principal(vectors, 3)
    squares = torch.linalg.svdvals(vectors.flatten(0, 1).double()).square()
    assert kept.shape == (30, 4, 3)
    assert float(kept.double().square().sum()) == pytest.approx(float(squares[:3].sum()), rel=1e-6)
    torch.testing.assert_close(principal(vectors, 6).norm(dim=-1), vectors.norm(dim=-1))


@pytest.mark.parametrize("pooling", ["mean", "last", "concat"])
def test_head_vectors_pool_the_residual_outputs(make, make_pairs, pooling):
    model, pairs = make(), make_pairs()
    setting = Setting.of(model, pairs, batch=2)
    assert head_names(setting) == [f"a{layer}.h{head}" for layer in range(2) for head in range(4)]
    with torch.no_grad():
        result = model.run(pairs.corrupt, read=[Site("result", 1)]).acts[Site("result", 1)].float()[:, :, 2]
    expected = {"mean": result.mean(1), "last": result[:, -1], "concat": result.flatten(1)}[pooling]
    torch.testing.assert_close(head_vectors(setting, pooling)[len(pairs) :, 6], expected)


def test_head_vectors_pool_over_the_named_places(hard, induction):
    setting = Setting.of(hard, induction, batch=4)
    vectors = head_vectors(setting, "spans")
    site = Site("result", 1)
    with torch.no_grad():
        result = hard.run(induction.clean, read=[site]).acts[site].float()[:, :, 2]
    width = hard.shape.width
    for i in range(len(induction)):
        taken = []
        for number, span in enumerate(("MATCH", "SOURCE", "END")):
            start, stop = induction.spans[span][i].tolist()
            taken += range(start, stop)
            part = vectors[i, 6, number * width : (number + 1) * width]
            torch.testing.assert_close(part, result[i, start:stop].mean(0))
        rest = [t for t in range(result.shape[1]) if t not in taken]
        torch.testing.assert_close(vectors[i, 6, 3 * width :], result[i, rest].mean(0))
    placed = placed_vectors(Setting.of(hard, induction, batch=4, positions="spans"))
    torch.testing.assert_close(placed.unflatten(1, (8, 4)).flatten(2), vectors)


def contrasted(model, n=32):
    from workbench.datasets.catalogue import task

    return task("induction", length=12).contrast().build(seed=0, tokenizer=model.tokenizer, n=n)


def test_on_the_compiled_model_the_induction_head_beats_its_null(hard):
    circuit = find_circuit(
        hard,
        contrasted(hard),
        "discrete-sae",
        pooling="mean",
        centre=False,
        silent=0.0,
        dimensions=0,
        statistic="unique",
        trials=1,
        epochs=200,
        rate=1e-3,
    )
    table = circuit.frame().set_index("node")
    assert table.p["a1.h2"] <= 0.05
    assert table.raw["a0.h0"] == 0
    assert table.z.isna()["a0.h0"], "a head with one code has no null"


def test_parts_at_places(hard):
    circuit = find_circuit(hard, contrasted(hard, 16), "discrete-sae", positions="spans", trials=1, epochs=50)
    assert circuit.names[:4] == ("a0.h0@MATCH", "a0.h0@SOURCE", "a0.h0@END", "a0.h0@rest")
    assert len(circuit.names) == 32


def test_the_circuit_carries_null_and_baselines(make, make_pairs):
    model, pairs = make(), make_pairs(n=8)
    node = find_circuit(model, pairs, "discrete-sae", level="node", **QUICK)
    assert list(node.columns) == ["raw", "null_mean", "null_sd", "z", "p", "mean_difference", "probe"]
    assert len(node.names) == 8
    torch.testing.assert_close(node.scores, (node.columns["raw"] - node.columns["null_mean"]).clamp(min=0))
    probe = node.columns["probe"]
    assert ((probe >= 0) & (probe <= 1)).all()
    again = find_circuit(model, pairs, "discrete-sae", level="node", **QUICK)
    assert node.frame().equals(again.frame())
    assert node.provenance["options"]["permutations"] == 200
    raw = find_circuit(model, pairs, "discrete-sae", level="node", normalise=False, **QUICK)
    ratio = node.columns["mean_difference"] / raw.columns["mean_difference"]
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-5, atol=0)
    assert not torch.allclose(ratio, torch.ones(8, dtype=ratio.dtype))
    by_z = find_circuit(model, pairs, "discrete-sae", level="node", score="z", **QUICK)
    assert torch.equal(by_z.scores, by_z.columns["z"].nan_to_num(0.0).clamp(min=0))


def test_edges_have_the_score_of_their_heads(make, make_pairs):
    model, pairs = make(), make_pairs(n=8)
    setting = Setting.of(model, pairs)
    edges = find_circuit(model, pairs, "discrete-sae", level="edge", **{**QUICK, "trials": 1})
    assert all(edge_parts(name)[0].startswith("a0.h") for name in edges.names)
    channels = [edge_parts(name)[2] for name in edges.names]
    assert channels.count("q") == 16
    assert channels.count("k") == channels.count("v") == 8
    vectors = head_vectors(setting, "mean")
    vectors = vectors * (12**0.5 / vectors.norm(dim=-1).mean())
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(16, generator=generator)[:4]
    coder = train(vectors[chosen].flatten(0, 1), 16, 0.02, 20, 3e-3, generator)
    codes = encode(coder, vectors).argmax(-1)
    pairs_ = pair_codes(codes, torch.arange(16) < 8)
    table = dict(zip(edges.names, edges.scores.tolist(), strict=True))
    assert table["a0.h1->a1.h2<q>"] == pairs_[1, 6]
    assert table["a0.h3->a1.g1<k>"] == max(pairs_[3, 6], pairs_[3, 7])
    with pytest.raises(Refused, match="level='node'"):
        find_circuit(model, pairs, "discrete-sae", level="edge", positions="each", **QUICK)


def test_the_published_form_is_the_plain_count(make, make_pairs):
    model, pairs = make(), make_pairs(n=8)
    published = find_circuit(model, pairs, "discrete-sae-published", level="node")
    spelled = find_circuit(
        model,
        pairs,
        "discrete-sae",
        level="node",
        pooling="mean",
        centre=False,
        normalise=False,
        silent=0.0,
        dimensions=0,
        epochs=500,
        rate=1e-3,
        trials=10,
        statistic="unique",
        score="raw",
    )
    assert torch.equal(published.scores, spelled.scores)
    assert published.columns["pairs"].sum() == 8 * 8 // 2
    with pytest.raises(Refused, match="positions"):
        find_circuit(model, pairs, "discrete-sae-published", positions="each")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pooling": "max"}, UnknownName, "mean, last, concat, spans"),
        ({"pooling": "spans"}, WorkbenchError, "name no spans"),
        ({"pooling": "mean", "statistic": "js"}, UnknownName, "unique, mass"),
        ({"pooling": "mean", "score": "p"}, UnknownName, "raw, excess, z"),
        ({"pooling": "mean", "permutations": 10}, WorkbenchError, "at least 200"),
        ({"pooling": "mean", "dimensions": -1}, WorkbenchError, "0 for all"),
        ({"pooling": "mean", "silent": 1.0}, WorkbenchError, "below 1"),
        ({"pooling": "mean", "trials": 0}, WorkbenchError, "trials is at least 1"),
    ],
)
def test_bad_options_are_refused(make, make_pairs, options, error, message):
    with pytest.raises(error, match=message):
        find_circuit(make(), make_pairs(), "discrete-sae", **options)


def test_too_few_pairs_are_refused(make, make_pairs):
    with pytest.raises(WorkbenchError, match="at least 4 pairs"):
        find_circuit(make(), make_pairs(n=3), "discrete-sae", pooling="mean")


def test_codes_and_labels_are_checked():
    with pytest.raises(WorkbenchError, match="integers"):
        unique_codes(torch.zeros(4, 2), torch.ones(4, dtype=torch.bool))
    with pytest.raises(WorkbenchError, match=r"bool \[4\]"):
        unique_codes(torch.zeros(4, 2, dtype=torch.long), torch.ones(3, dtype=torch.bool))
    with pytest.raises(WorkbenchError, match="both kinds"):
        code_mass(torch.zeros(4, 2, dtype=torch.long), torch.ones(4, dtype=torch.bool))
