"""Places of parts, what replaces them, and the masked model against literal loops over hooks written out."""

import math

import pytest
import torch

from workbench.errors import UnknownName, WorkbenchError
from workbench.pairs import Pairs, logit_difference
from workbench.probes.circuits.components import INPUT, Setting, components, edge_graph, writer_sites
from workbench.probes.circuits.find import find_circuit
from workbench.probes.circuits.masked import masked
from workbench.probes.circuits.places import Places
from workbench.probes.circuits.replacements import Replacements
from workbench.sites import Site

LEVELS = ("node", "edge")


def with_spans(pairs):
    """Prompts of six tokens with a word at 1, one of two tokens that moves, a long span over both, and one absent twice."""
    n = len(pairs)
    first = torch.tensor([[1, 2]]).expand(n, 2)
    moving = torch.tensor([[2 + i % 2, 4 + i % 2] for i in range(n)])
    absent = torch.tensor([[-1, -1] if i < 2 else [5, 6] for i in range(n)])
    spans = {"S1": first, "IO": moving, "both": torch.tensor([[1, 5]]).expand(n, 2), "END": absent}
    return Pairs(pairs.clean, pairs.corrupt, pairs.answer, pairs.wrong, pairs.position, spans)


def setting(make, make_pairs, positions="all", ablation="counterfactual", batch=16, **options):
    pairs = with_spans(make_pairs(n=3))
    return Setting.of(make(layers=2, heads=2, kv_heads=1, **options), pairs, None, ablation, batch, positions)


def shares(names, seed=0):
    return torch.rand(len(names), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def replaced(setting, sites):
    """Replacement of every site by the definition of the ablation, ``[B, ...]``."""
    model, pairs, ablation = setting.model, setting.pairs, setting.ablation
    with torch.no_grad():
        corrupt = model.run(pairs.corrupt, read=sites).acts
        clean = model.run(pairs.clean, read=sites).acts
    if ablation == "counterfactual":
        return corrupt
    if ablation == "zero":
        return {site: torch.zeros_like(clean[site]) for site in sites}
    return {site: clean[site].mean(0, keepdim=True).expand_as(clean[site]) for site in sites}


def literal(setting, level, keep):
    """Logits of the masked model by a loop over examples, tokens and parts; ``keep`` is a number by name."""
    model, pairs, places = setting.model, setting.pairs, setting.places
    place = places.index(pairs).tolist()

    def share(part, b, t):
        return keep[f"{part}@{places.names[place[b][t]]}" if places.kind != "all" else part]

    if level == "node":
        units = components(model)
        instead = replaced(setting, list({unit.site.whole for unit in units}))
        edits = {}
        for site in instead:

            def mix(value, site=site):
                out = value.clone()
                for unit in (unit for unit in units if unit.site.whole == site):
                    for b in range(len(value)):
                        for t in range(value.shape[1]):
                            at = (b, t) if unit.site.head is None else (b, t, unit.site.head)
                            s = share(unit.name, b, t)
                            out[at] = s * value[at] + (1 - s) * instead[site][at]
                return out

            edits[site] = mix
    else:
        graph, own, edits = edge_graph(model), {}, {}
        sites = {"input": INPUT}
        for layer in range(graph.layers):
            sites |= {f"a{layer}.h{h}": Site("result", layer, h) for h in range(graph.heads)}
            sites[f"m{layer}"] = Site("mlp_out", layer)
        instead = replaced(setting, list({site.whole for site in sites.values()}))

        def pick(value, site):
            return value if site.head is None else value[:, :, site.head]

        for site in {site.whole for site in sites.values()}:

            def follow(value, site=site):
                own.update({n: pick(value, s) for n, s in sites.items() if s.whole == site})
                return value

            edits[site] = follow
        kinds = {"q": "q_input", "k": "k_input", "v": "v_input"}
        by_site = {}
        for slot in graph.slots:
            if slot.reader == "logits":
                site = Site("resid_post", graph.layers - 1)
            else:
                site = Site("mlp_in" if slot.channel == "in" else kinds[slot.channel], slot.layer)
            by_site.setdefault(site, []).append(slot)
        for site, slots in by_site.items():

            def rewire(value, slots=slots):
                out = value.clone()
                for slot in slots:
                    part = out if out.ndim == 3 else out[:, :, slot.index]
                    for source in graph.writers[: slot.sources]:
                        suffix = "" if slot.channel == "in" else f"<{slot.channel}>"
                        change = pick(instead[sites[source].whole], sites[source]) - own[source]
                        for b in range(len(value)):
                            for t in range(value.shape[1]):
                                lost = 1 - share(f"{source}->{slot.reader}{suffix}", b, t)
                                part[b, t] += lost * change[b, t]
                return out

            edits[site] = rewire
    with torch.no_grad():
        return model.run(pairs.clean, edit=edits).logits


def test_places_cut_every_prompt_into_the_shortest_spans(make_pairs):
    pairs = with_spans(make_pairs(n=3))
    places = Places.of("spans", pairs)
    assert places.names == ("S1", "IO", "both", "END", "rest")
    drawn = [[places.names[i] for i in row] for row in places.index(pairs).tolist()]
    assert drawn == [
        ["rest", "S1", "IO", "IO", "both", "rest"],
        ["rest", "S1", "both", "IO", "IO", "rest"],
        ["rest", "S1", "IO", "IO", "both", "END"],
    ]
    assert places.of_each(["a0.h1", "m0"])[:6] == (
        *(f"a0.h1@{place}" for place in places.names),
        "m0@S1",
    )


def test_all_positions_are_one_place_and_each_is_its_own(make_pairs):
    pairs = make_pairs(n=3)
    whole, each = Places.of("all", pairs), Places.of("each", pairs)
    assert (len(whole), len(each)) == (1, 6)
    assert whole.of_each(["m0"]) == ("m0",)
    assert each.of_each(["m0"]) == tuple(f"m0@{t}" for t in range(6))
    assert whole.index(pairs).tolist() == [[0] * 6] * 3
    assert each.index(pairs).tolist() == [list(range(6))] * 3


def test_unknown_places_and_pairs_without_spans_are_refused(make_pairs):
    with pytest.raises(UnknownName, match="all, each, spans"):
        Places.of("tokens", make_pairs())
    with pytest.raises(WorkbenchError, match="name no spans"):
        Places.of("spans", make_pairs())


@pytest.mark.parametrize("batch", [16, 2])
@pytest.mark.parametrize("ablation", ["counterfactual", "zero", "mean"])
def test_replacements_are_what_the_ablation_says(make, make_pairs, ablation, batch):
    s = setting(make, make_pairs, ablation=ablation, batch=batch)
    sites = list(dict.fromkeys(writer_sites(edge_graph(s.model))))
    expected, made = replaced(s, sites), Replacements(s, sites)
    start = 0
    for pairs in s.chunks():
        clean = s.model.run(pairs.clean, read=sites).acts
        for site, value in made.of(pairs, clean).items():
            assert value.shape == clean[site].shape
            torch.testing.assert_close(value, expected[site][start : start + len(pairs)], atol=1e-12, rtol=0)
        start += len(pairs)
    assert start == 3


@pytest.mark.parametrize("positions", ["all", "spans", "each"])
@pytest.mark.parametrize("level", LEVELS)
def test_shares_of_one_are_the_model_to_the_last_bit(make, make_pairs, level, positions):
    s = setting(make, make_pairs, positions)
    m = masked(s, level)
    batch = m.prepare(s.pairs)
    with torch.no_grad():
        own = s.model.run(s.pairs.clean).logits
        assert torch.equal(m.logits(batch, torch.ones(len(m.names))), own)
        assert torch.equal(batch.logits, own)


@pytest.mark.parametrize("positions", ["all", "spans"])
def test_shares_of_zero_of_all_edges_are_the_run_on_the_corrupted_prompt(make, make_pairs, positions):
    s = setting(make, make_pairs, positions)
    m = masked(s, "edge")
    with torch.no_grad():
        zero = m.logits(m.prepare(s.pairs), torch.zeros(len(m.names), dtype=torch.float64))
        corrupt = s.model.run(s.pairs.corrupt).logits
    torch.testing.assert_close(zero, corrupt, atol=1e-11, rtol=0)


@pytest.mark.parametrize("ablation", ["counterfactual", "zero", "mean"])
@pytest.mark.parametrize("positions", ["all", "spans", "each"])
@pytest.mark.parametrize("level", LEVELS)
def test_fractional_shares_equal_a_literal_loop(make, make_pairs, level, positions, ablation):
    s = setting(make, make_pairs, positions, ablation)
    m = masked(s, level)
    keep = shares(m.names)
    expected = literal(s, level, dict(zip(m.names, keep.tolist(), strict=True)))
    with torch.no_grad():
        found = m.logits(m.prepare(s.pairs), keep)
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=0)
    assert not torch.allclose(found, s.model.run(s.pairs.clean).logits, atol=1e-3)


def test_chosen_nodes_are_masked_and_the_others_left_alone(make, make_pairs):
    s = setting(make, make_pairs)
    chosen = ["m1", "a0.h1"]
    m = masked(s, "node", chosen)
    assert m.names == ("m1", "a0.h1")
    keep = dict.fromkeys((unit.name for unit in components(s.model)), 1.0) | {"m1": 0.25, "a0.h1": 0.5}
    with torch.no_grad():
        found = m.logits(m.prepare(s.pairs), torch.tensor([0.25, 0.5], dtype=torch.float64))
    torch.testing.assert_close(found, literal(s, "node", keep), atol=1e-11, rtol=0)
    with pytest.raises(UnknownName, match="node of random"):
        masked(s, "node", ["a7.h0"])
    with pytest.raises(WorkbenchError, match="chooses nodes"):
        masked(s, "edge", ["m1"])
    with pytest.raises(WorkbenchError, match="one share per part"):
        m.logits(m.prepare(s.pairs), torch.ones(3))


@pytest.mark.parametrize("positions", ["all", "spans"])
@pytest.mark.parametrize("level", LEVELS)
def test_the_gradient_in_the_shares_is_a_finite_difference(make, make_pairs, level, positions):
    s = setting(make, make_pairs, positions)
    m = masked(s, level)
    batch = m.prepare(s.pairs)
    keep = shares(m.names, 1).requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(m.metric(batch, keep).sum(), keep)
    step = 1e-5
    with torch.no_grad():
        for i in range(0, len(m.names), max(1, len(m.names) // 12)):
            ends = []
            for sign in (1, -1):
                moved = keep.detach().clone()
                moved[i] += sign * step
                ends.append(float(m.metric(batch, moved).sum()))
            assert float(slope[i]) == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-7), m.names[i]
    assert all(p.grad is None for p in s.model.net.parameters())


@pytest.mark.parametrize("level", LEVELS)
def test_the_gradient_at_one_is_attribution_patching(make, make_pairs, level):
    s = setting(make, make_pairs)
    m = masked(s, level)
    keep = torch.ones(len(m.names), dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(m.metric(m.prepare(s.pairs), keep).mean(), keep)
    eap = find_circuit(s.model, s.pairs, "eap", level)
    assert eap.names == m.names
    torch.testing.assert_close(slope, eap.scores, atol=1e-10, rtol=0)


@pytest.mark.parametrize("positions", ["spans", "each"])
@pytest.mark.parametrize("method", ["eap", "eap-ig"])
@pytest.mark.parametrize("level", LEVELS)
def test_first_order_scores_of_places_add_up(make, make_pairs, level, method, positions):
    s = setting(make, make_pairs)
    whole = find_circuit(s.model, s.pairs, method, level)
    parted = find_circuit(s.model, s.pairs, method, level, positions=positions, batch=2)
    assert len(parted.names) == len(whole.names) * len(Places.of(positions, s.pairs))
    summed = parted.over_positions()
    assert summed.names == whole.names
    torch.testing.assert_close(summed.scores, whole.scores, atol=1e-11, rtol=0)


@pytest.mark.parametrize("level", LEVELS)
def test_patching_one_part_at_all_its_places_is_patching_it_everywhere(make, make_pairs, level):
    s, everywhere = setting(make, make_pairs, "spans"), setting(make, make_pairs)
    exact = find_circuit(s.model, s.pairs, "patching", level)
    m = masked(s, level)
    batch = m.prepare(s.pairs)
    places = len(s.places)
    with torch.no_grad():
        before = float(logit_difference(batch.logits, s.pairs).mean())
        for i in range(0, len(exact.names), 5):
            keep = torch.ones(len(m.names), dtype=torch.float64)
            keep[i * places : (i + 1) * places] = 0
            effect = before - float(m.metric(batch, keep).mean())
            assert effect == pytest.approx(float(exact.scores[i]), abs=1e-10), exact.names[i]
    assert masked(everywhere, level).names == exact.names


@pytest.mark.parametrize("level", LEVELS)
def test_patching_at_a_place_is_a_share_of_zero_there(make, make_pairs, level):
    s = setting(make, make_pairs, "spans", batch=2)
    exact = find_circuit(s.model, s.pairs, "patching", level, positions="spans", batch=2)
    m = masked(s, level)
    assert m.names == exact.names
    one = torch.ones(len(m.names), dtype=torch.float64)
    with torch.no_grad():
        batches = [m.prepare(pairs) for pairs in s.chunks()]
        before = sum(float(m.metric(batch, one).sum()) for batch in batches)
        for i in range(0, len(m.names), 23):
            keep = one.clone()
            keep[i] = 0
            after = sum(float(m.metric(batch, keep).sum()) for batch in batches)
            assert (before - after) / 3 == pytest.approx(float(exact.scores[i]), abs=1e-10), m.names[i]


def test_grouped_keys_have_a_reader_per_group_and_mlps_an_input_of_their_own(make, make_pairs):
    grouped = masked(setting(make, make_pairs), "edge").names
    assert "input->a1.g0<k>" in grouped
    assert "input->a1.h1<k>" not in grouped
    assert "a1.h1->m1" in grouped
    bare = masked(setting(make, make_pairs, mlp_width=0), "edge").names
    assert not any("m" in name.split("->")[0] or "->m" in name for name in bare)
    s = setting(make, make_pairs, mlp_width=0)
    keep = shares(bare)
    with torch.no_grad():
        m = masked(s, "edge")
        corrupt = s.model.run(s.pairs.corrupt).logits
        torch.testing.assert_close(
            m.logits(m.prepare(s.pairs), torch.zeros(len(bare)).double()), corrupt, atol=1e-11, rtol=0
        )
        assert not torch.allclose(m.logits(m.prepare(s.pairs), keep), corrupt)


@pytest.mark.parametrize("level", LEVELS)
def test_hooks_are_gone_after_an_exception(make, make_pairs, level):
    s = setting(make, make_pairs)
    before = s.model.run(s.pairs.clean).logits

    def broken(logits, pairs):
        raise RuntimeError("half way")

    m = masked(Setting.of(s.model, s.pairs, broken), level)
    batch = m.prepare(s.pairs)
    with pytest.raises(RuntimeError, match="half way"):
        m.metric(batch, torch.zeros(len(m.names)))
    site = next(iter(batch.instead))
    batch.instead[site] = torch.zeros(1, 1, 1, 1, 2)  # an edit that fails inside the forward pass
    with pytest.raises(Exception, match=r"size|shape|dimension|broadcast"):
        m.logits(batch, torch.zeros(len(m.names)))
    assert not any(point.fwd_hooks for point in s.model.net.hook_dict.values())
    assert torch.equal(s.model.run(s.pairs.clean).logits, before)
    assert math.isfinite(float(before.sum()))
