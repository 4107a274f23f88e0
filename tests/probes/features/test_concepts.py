"""Probes of labels on data whose dictionary is known: sparse probing, absorption, SCR and TPP."""

import math

import pytest
import torch
from planted_coders import coder_of, random_coder, tiny

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.protocol import Tokens
from workbench.probes.features.absorption import absorption
from workbench.probes.features.concepts import spurious_removal, targeted_perturbation
from workbench.probes.features.labels import Probe, concepts, probe
from workbench.probes.features.positions import activations_at
from workbench.probes.features.sparse_probing import sparse_probing

D = 24


def directions(seed=0):
    torch.manual_seed(seed)
    return torch.linalg.qr(torch.randn(D, D, dtype=torch.float64)).Q


def background(rows, axes, generator):
    """Sparse activity along ``axes`` ``[M, D]`` and a little noise."""
    on = torch.rand(rows, len(axes), generator=generator, dtype=torch.float64)
    strength = (on < 0.2) * (0.5 + torch.rand(rows, len(axes), generator=generator, dtype=torch.float64))
    return strength @ axes + 0.01 * torch.randn(rows, D, generator=generator, dtype=torch.float64)


def random_dictionary(seed=5, features=64):
    return random_coder(D, features, seed)


# ------------------------------------------------------------ sparse probing


def labelled(rows=600):
    """A concept along axis 0; axis 1 is active at random."""
    axes, generator = directions(), torch.Generator().manual_seed(1)
    label = torch.rand(rows, generator=generator) < 0.4
    return background(rows, axes[2:], generator) + label[:, None].double() * axes[0], label, axes


def test_one_feature_of_the_true_dictionary_tells_the_concept():
    x, label, axes = labelled()
    got = sparse_probing(coder_of(axes, bias=torch.full((D,), -0.1, dtype=torch.float64)), x, {"a": label})
    assert got.features[0, 0] == 0
    assert got.accuracy[0, 0] == 1
    assert got.f1[0, 0] == 1
    assert got.raw[0] > 0.97
    assert got.random[0, 0] < 0.8
    assert abs(got.shuffled[0, 0] - 0.5) < 0.15
    fewer = min(int(label.sum()), int((~label).sum()))
    assert got.rows.tolist() == [[2 * int(0.8 * fewer), 2 * (fewer - int(0.8 * fewer))]]
    assert got.mean()[1] == 1


def test_a_random_dictionary_needs_more_features():
    x, label, _ = labelled()
    got = sparse_probing(random_dictionary(), x, label, ks=(1, 2, 5, 32))
    assert got.accuracy[0, 0] < 0.95
    assert got.accuracy[0, -1] > got.accuracy[0, 0]


def test_the_probe_reads_rows_as_they_are():
    torch.manual_seed(0)
    x = torch.randn(200, 3, dtype=torch.float64) * torch.tensor([1.0, 100.0, 0.01]) + 5
    label = x[:, 2] > 5
    found = probe(x, label)
    assert isinstance(found, Probe)
    assert found.accuracy(x, label) > 0.97
    assert found.weight.abs().argmax() == 2
    assert torch.equal(found.says(x), x @ found.weight + found.bias > 0)


# ------------------------------------------------------------ absorption


def family(rows=3000, children=5, share=0.03):
    """A parent along axis 0; each child, along axes 1 ..., comes with the parent in ``share`` of its rows."""
    axes, generator = directions(), torch.Generator().manual_seed(2)
    parent = torch.rand(rows, generator=generator) < 0.5
    draw = torch.rand(rows, generator=generator)
    which = torch.where(parent & (draw < share * children), (draw / share).long(), torch.tensor(-1))
    x = background(rows, axes[children + 1 :], generator) + parent[:, None].double() * axes[0]
    for j in range(children):
        x += (which == j)[:, None].double() * axes[j + 1]
    return x, parent, which, axes


def absorbing(axes, children, count):
    """The true dictionary, but where the first ``count`` children are active the parent's feature is silent and they write it."""
    rows, encoder = axes.clone(), axes.T.clone()
    rows[1 : count + 1] += axes[0]
    encoder[:, 0] -= 2 * axes[1 : count + 1].sum(0)
    bias = torch.full((D,), -0.1, dtype=torch.float64)
    return coder_of(rows, encoder, bias)


def test_planted_absorption_is_found_where_it_was_planted():
    x, parent, which, axes = family()
    for count in (0, 2, 5):
        got = absorption(absorbing(axes, 5, count), x, {"parent": parent}, train=1000)
        assert got.main == ((0,),)
        expected = float((which < count).double()[parent & (which >= 0)].sum() / parent.sum()) if count else 0.0
        assert got.mean_full == pytest.approx(expected, abs=0.02)
        assert got.mean_fraction == pytest.approx(expected, abs=0.02)
        assert {feature for feature, _ in got.absorbers[0]} == set(range(1, count + 1))
        assert float(got.null_full[0]) < 0.5 * expected + 0.01
        assert got.splits == (1,)
        assert float(got.full_interval[0, 0]) <= got.mean_full <= float(got.full_interval[0, 1])


@pytest.mark.parametrize("main", ["against", "some"])
@pytest.mark.parametrize("limits", [(0.025, 0.1, 0.4, 3), (0.3, 0.3, 0.1, 2)])
def test_absorption_is_what_its_definition_says_row_by_row(limits, main):
    from workbench.probes.features.absorption import _Limits, absorbed

    x, parent, _, _ = family(rows=400)
    coder = random_coder(D, 40, 9).requires_grad_(False)
    with torch.no_grad():
        coder.b_enc -= 0.5
        coder.W_dec *= torch.linspace(0.5, 4, 40)[:, None]
    whole = probe(x, parent)
    w = whole.weight / whole.weight.norm()
    against = (coder.encode(x).mean(0) * (coder.W_dec @ w)).topk(2, largest=False).indices.tolist()
    main = against if main == "against" else [3, 7]
    full, fraction, _ = absorbed(coder, coder.W_dec, x, whole, main, _Limits(*limits))
    full_cosine, fraction_cosine, proportion, absorbers = limits
    codes = torch.relu((x - coder.b_dec) @ coder.W_enc + coder.b_enc).tolist()
    along, c = (coder.W_dec @ w).tolist(), torch.nn.functional.cosine_similarity(coder.W_dec, w, dim=1).tolist()
    seen = [0, 0]
    for i, (row, f) in enumerate(zip(x, codes, strict=True)):
        p = [f[j] * along[j] for j in range(40)]
        total, own = float(row @ w), sum(p[j] for j in main)
        best = max(range(40), key=lambda j: p[j])
        silent = all(f[j] == 0 for j in main)
        is_full = total > 0 and silent and c[best] >= full_cosine and p[best] >= proportion * total
        others = sorted(
            (p[j] for j in range(40) if j not in main and c[j] >= fraction_cosine and p[j] > 0), reverse=True
        )
        taken = sum(others[:absorbers])
        if total <= 0 or own >= total or taken < proportion * total:
            part = 0.0
        elif own <= 0:
            part = 1.0
        else:
            a = min(taken, total - own)
            part = a / (a + own)
        assert bool(full[i]) == is_full
        assert float(fraction[i]) == pytest.approx(part)
        seen[0] += is_full
        seen[1] += part == 1 and own < 0 if main != [3, 7] else 0 < part < 1
    assert min(seen) > 3


def test_two_features_that_share_a_concept_are_splitting_and_no_absorption():
    x, parent, _, axes = family(children=0)
    generator = torch.Generator().manual_seed(3)
    half = torch.where(torch.rand(len(x), generator=generator) < 0.5, 1.0, -1.0).double()
    x = x + half[:, None] * axes[D - 1] * parent[:, None]
    rows, encoder = axes.clone(), axes.T.clone()
    rows[0], rows[1] = axes[0] + axes[D - 1], axes[0] - axes[D - 1]
    encoder[:, 0], encoder[:, 1] = (axes[0] + axes[D - 1]) / 2, (axes[0] - axes[D - 1]) / 2
    encoder[:, D - 1] = 0
    got = absorption(coder_of(rows, encoder, torch.full((D,), -0.3, dtype=torch.float64)), x, {"parent": parent})
    assert got.splits == (2,)
    assert set(got.main[0]) == {0, 1}
    assert got.mean_full < 0.01


# ------------------------------------------------------------ SCR and TPP


def confounded(rows=3000):
    """Two independent concepts along axes 0 and 1, positive with and negative without; the second twice as strong."""
    axes, generator = directions(), torch.Generator().manual_seed(4)
    first, second = (torch.rand(rows, generator=generator) < 0.5 for _ in range(2))
    signs = [torch.where(label, 1.0, -1.0).double()[:, None] for label in (first, second)]
    return background(rows, axes[2:], generator) + signs[0] * axes[0] + 2 * signs[1] * axes[1], first, second, axes


def perfect(axes):
    """A feature for every axis, and for the absence of the concepts along axes 0 and 1 (features D and D + 1)."""
    rows = torch.cat([axes, -axes[:2]])
    return coder_of(rows, bias=torch.full((D + 2,), -0.1, dtype=torch.float64))


def test_a_perfect_dictionary_removes_the_spurious_concept_and_a_random_one_does_not():
    x, first, second, axes = confounded()
    got = spurious_removal(perfect(axes), x, first, second, counts=(1, 2))
    assert got.chosen == 0
    assert [set(pair) for pair in got.features.tolist()] == [{1, D + 1}, {0, D}]
    assert float(got.biased[0]) < 0.6
    assert float(got.clean[0]) > 0.97
    assert got.at(2) > 0.95
    assert abs(float(got.null[0, 1])) < 0.3
    random = spurious_removal(random_dictionary(), x, first, second, counts=(1, 2))
    assert abs(random.at(2)) < 0.2
    table = got.frame()
    assert table[table["chosen"]]["removed"].unique().tolist() == ["second"]


def test_scr_is_the_ratio_of_its_accuracies():
    x, first, second, _ = confounded(800)
    got = spurious_removal(random_dictionary(), x, first, second, counts=(2, 5, 20))
    for d in range(2):
        gap = float(got.clean[d] - got.biased[d])
        if gap > 0:
            assert torch.allclose(got.score[d], (got.ablated[d] - got.biased[d]) / gap)
        else:
            assert got.score[d].isnan().all()
    assert not got.score[got.chosen].isnan().any()


def classes(rows=2400):
    axes, generator = directions(), torch.Generator().manual_seed(6)
    label = torch.randint(0, 4, (rows,), generator=generator)
    return background(rows, axes[4:], generator) + 2 * axes[:4][label], label, axes


def test_a_perfect_dictionary_perturbs_its_target_alone():
    x, label, axes = classes()
    got = targeted_perturbation(perfect(axes), x, label, counts=(1, 2))
    assert got.features[:, 0].tolist() == [0, 1, 2, 3]
    assert float(got.normalised[0]) > 0.8
    assert got.at(1) > 0.4
    assert abs(float(got.null[0])) < 0.1
    random = targeted_perturbation(random_dictionary(), x, label, counts=(1, 2))
    assert abs(random.at(1)) < 0.1


def test_tpp_is_the_difference_of_intended_and_other_losses():
    x, label, _ = classes(600)
    got = targeted_perturbation(random_dictionary(), x, label, counts=(2, 20))
    for i in range(2):
        total = 0.0
        for c in range(4):
            others = [float(got.accuracy[j] - got.ablated[i, c, j]) for j in range(4) if j != c]
            total += float(got.accuracy[c] - got.ablated[i, c, c]) - sum(others) / 3
        assert float(got.score[i]) == pytest.approx(total / 4)
    assert got.frame()["score"].mean() == pytest.approx(float(got.score.mean()))


def test_ablating_is_setting_features_to_nothing_and_keeping_the_rest():
    from workbench.probes.features.concepts import _without

    x, _, _, _ = confounded(20)
    coder = random_dictionary()
    chosen = torch.tensor([5, 60, 2])
    f = coder.encode(x).detach()
    error = x - coder.decode(f).detach()
    for n, got in zip((1, 3), _without(coder, x, chosen, (1, 3)), strict=True):
        left = f.clone()
        left[:, chosen[:n]] = 0
        assert torch.allclose(got, coder.decode(left).detach() + error)


# ------------------------------------------------------------ shapes, tables, refusals


def test_labels_in_every_form():
    for labels, names in (
        ({"a": [True, False, True], "b": [0, 1, 1]}, ("a", "b")),
        (torch.tensor([True, False, True]), ("0",)),
        (torch.tensor([[True, False], [False, True], [True, True]]), ("0", "1")),
        ([3, 7, 3], ("3", "7")),
    ):
        got = concepts(labels, 3)
        assert got[0] == names
        assert got[1].dtype == torch.bool
        assert got[1].shape == (3, len(names))
    for wrong, message in (
        (torch.ones(3), "bool"),
        ([True, False], "3 rows"),
        ({}, "empty"),
        ({"a": [2, 0, 1]}, "0 and 1"),
        ({"a": [1, 0]}, "belong to 3 rows"),
    ):
        with pytest.raises(WorkbenchError, match=message):
            concepts(wrong, 3)


def test_results_are_tables_figures_and_files(tmp_path):
    x, first, second, axes = confounded(200)
    coder = perfect(axes)
    for name, got in {
        "probing": sparse_probing(coder, x, first),
        "absorption": absorption(coder, x, {"a": first, "b": second}, most=2),
        "scr": spurious_removal(coder, x, first, second),
        "tpp": targeted_perturbation(coder, x, first.long()),
    }.items():
        assert len(got.frame())
        got.plot()
        got.save(tmp_path / name)


def test_what_cannot_be_probed_is_refused():
    x, first, second, axes = confounded(200)
    coder = perfect(axes)
    nan = x.clone()
    nan[3, 2] = math.nan
    for call in (
        lambda x: sparse_probing(coder, x, first),
        lambda x: absorption(coder, x, first),
        lambda x: spurious_removal(coder, x, first, second),
        lambda x: targeted_perturbation(coder, x, first.long()),
    ):
        with pytest.raises(WorkbenchError, match="1 numbers that are NaN"):
            call(nan)
        with pytest.raises(WorkbenchError, match="199"):
            call(x[:-1])
        with pytest.raises(WorkbenchError, match="width 24"):
            call(x[:, :-1])
    few = torch.zeros(200, dtype=torch.bool)
    few[:3] = True
    with pytest.raises(Refused, match="3 rows with"):
        sparse_probing(coder, x, few)
    with pytest.raises(Refused, match="combination"):
        spurious_removal(coder, x, first, first)
    with pytest.raises(WorkbenchError, match="at least two"):
        targeted_perturbation(coder, x, first)
    with pytest.raises(WorkbenchError, match="1 to 26 features"):
        sparse_probing(coder, x, first, ks=(30,))
    with pytest.raises(WorkbenchError, match="1 to 26"):
        spurious_removal(coder, x, first, second, counts=(50,))
    with pytest.raises(UnknownName, match="known: 1, 2"):
        spurious_removal(coder, x, first, second, counts=(1, 2)).at(3)
    transcoder = random_coder(D, 30, d_out=D, centred=False)
    with pytest.raises(Refused, match="for autoencoders"):
        absorption(transcoder, x, first)
    with pytest.raises(Refused, match="for autoencoders"):
        targeted_perturbation(transcoder, x, first.long())


@torch.no_grad()
def test_activations_at_chosen_tokens():
    model, site = tiny(), "blocks.1.attn.hook_z"
    torch.manual_seed(0)
    ids = torch.randint(0, 11, (3, 6))
    mask = torch.arange(6) < torch.tensor([6, 3, 4])[:, None]
    tokens = Tokens(ids, mask)
    alone = [model.run(ids[b, : int(mask[b].sum())][None], read=[site]).acts[site][0].flatten(1) for b in range(3)]
    last = activations_at(model, site, tokens, -1, batch=2)
    assert torch.allclose(last.x, torch.stack([rows[-1] for rows in alone]))
    assert last.position.tolist() == [5, 2, 3]
    some = activations_at(model, site, tokens, [[2, 0], 1, [-1]], batch=2)
    assert some.text.tolist() == [0, 0, 1, 2]
    assert some.position.tolist() == [2, 0, 1, 3]
    assert torch.allclose(some.x, torch.stack([alone[0][2], alone[0][0], alone[1][1], alone[2][3]]))
    assert some.ids.tolist() == [int(ids[0, 2]), int(ids[0, 0]), int(ids[1, 1]), int(ids[2, 3])]
    every = activations_at(model, site, tokens)
    assert torch.allclose(every.x, torch.cat(alone))
    with pytest.raises(WorkbenchError, match="3 texts, 2 entries"):
        activations_at(model, site, tokens, [0, 1])
    with pytest.raises(WorkbenchError, match="text 1 has 3 tokens"):
        activations_at(model, site, tokens, 3)
