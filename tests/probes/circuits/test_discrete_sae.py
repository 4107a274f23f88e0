import pytest
import torch

from workbench.circuits import Circuit
from workbench.errors import UnknownName, WorkbenchError
from workbench.probes.circuits.codes import against, permuted, unique_codes
from workbench.probes.circuits.components import Setting
from workbench.probes.circuits.methods.discrete_sae import Coder, encode, head_vectors, train
from workbench.probes.circuits.find import find_circuit
from workbench.probes.circuits.judgement.labels import auroc
from workbench.sites import Site

QUICK = {"features": 16, "epochs": 20, "trials": 1, "examples": 4}


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


def test_planted_codes_are_found():
    codes, positive = planted()
    truth = Circuit.of("node", [f"a0.h{i}" for i in range(24)], [f"a0.h{i}" for i in range(6)])
    scores = unique_codes(codes, positive)
    assert auroc(as_circuit(scores), truth) >= 0.95
    null = against(scores, unique_codes(codes, permuted(positive, 200, 0)))
    assert null.p[:6].max() <= 0.05


def test_shuffled_labels_fall_into_the_null():
    codes, positive = planted(codes=30)
    null = unique_codes(codes, permuted(positive, 400, seed=1))
    low, high = null.quantile(0.005, 0), null.quantile(0.995, 0)
    for seed in (2, 3, 4):
        shuffled = permuted(positive, 1, seed)[0]
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


def test_permutations_keep_the_number_of_positives():
    labels = permuted(torch.arange(10) < 3, 50, seed=0)
    assert labels.sum(1).tolist() == [3] * 50
    assert torch.equal(labels, permuted(torch.arange(10) < 3, 50, seed=0))
    assert len(labels.unique(dim=0)) > 20


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


@pytest.mark.parametrize("pooling", ["mean", "last", "concat"])
def test_head_vectors_pool_the_residual_outputs(make, make_pairs, pooling):
    model, pairs = make(), make_pairs()
    names, vectors = head_vectors(Setting.of(model, pairs, None, "counterfactual", 2), pooling)
    assert names == [f"a{layer}.h{head}" for layer in range(2) for head in range(4)]
    with torch.no_grad():
        result = model.run(pairs.corrupt, read=[Site("result", 1)]).acts[Site("result", 1)].float()[:, :, 2]
    expected = {"mean": result.mean(1), "last": result[:, -1], "concat": result.flatten(1)}[pooling]
    torch.testing.assert_close(vectors[len(pairs) :, 6], expected)


def test_on_the_compiled_model_the_induction_head_beats_its_null(hard):
    from workbench.datasets.catalogue import task

    pairs = task("induction", length=12).build(seed=0, tokenizer=hard.tokenizer, n=32)
    circuit = find_circuit(hard, pairs, "discrete-sae", pooling="last", trials=1, epochs=200)
    table = circuit.frame().set_index("node")
    assert table.z.idxmax() == "a1.h2" or table.p["a1.h2"] <= 0.05
    assert table.score["a0.h0"] == 0
    assert table.z.isna()["a0.h0"], "a head with one code has no null"


def test_the_circuit_carries_null_and_baselines(make, make_pairs):
    model, pairs = make(), make_pairs(n=8)
    circuit = find_circuit(model, pairs, "discrete-sae", **QUICK)
    assert list(circuit.frame().columns[3:]) == ["null_mean", "null_sd", "z", "p", "mean_difference", "probe"]
    assert circuit.level == "node"
    assert len(circuit.names) == 8
    probe = circuit.columns["probe"]
    assert ((probe >= 0) & (probe <= 1)).all()
    again = find_circuit(model, pairs, "discrete-sae", **QUICK)
    assert circuit.frame().equals(again.frame())
    assert circuit.provenance["options"]["permutations"] == 200
    raw = find_circuit(model, pairs, "discrete-sae", normalise=False, **QUICK)
    ratio = circuit.columns["mean_difference"] / raw.columns["mean_difference"]
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
    assert not torch.allclose(ratio, torch.ones(8))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pooling": "max"}, UnknownName, "mean, last, concat"),
        ({"permutations": 10}, WorkbenchError, "at least 200"),
        ({"trials": 0}, WorkbenchError, "trials is at least 1"),
    ],
)
def test_bad_options_are_refused(make, make_pairs, options, error, message):
    with pytest.raises(error, match=message):
        find_circuit(make(), make_pairs(), "discrete-sae", **options)


def test_too_few_pairs_are_refused(make, make_pairs):
    with pytest.raises(WorkbenchError, match="at least 4 pairs"):
        find_circuit(make(), make_pairs(n=3), "discrete-sae")


def test_codes_and_labels_are_checked():
    with pytest.raises(WorkbenchError, match="integers"):
        unique_codes(torch.zeros(4, 2), torch.ones(4, dtype=torch.bool))
    with pytest.raises(WorkbenchError, match=r"bool \[4\]"):
        unique_codes(torch.zeros(4, 2, dtype=torch.long), torch.ones(3, dtype=torch.bool))
