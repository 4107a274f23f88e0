"""The suite of the ``Model`` protocol. An implementation enters it by one line in ``tests/models/builders.py``."""

from __future__ import annotations

import pytest
import torch
from builders import BUILDERS

from workbench.captures import capture
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.protocol import Model, Tokens
from workbench.sites import Site

POST_NORM = ("Bert", "Roberta", "Longformer", "BigBird")
STATISTICS = ("lse", "received", "entropy", "block_mass", "block_max")


@pytest.fixture(params=BUILDERS)
def case(request):
    with torch.no_grad():
        yield BUILDERS[request.param]()


def answer(run):
    return run.output if run.logits is None else run.logits


def tolerance(run):
    """Half the digits of the type the model ran in; some families do their softmax in float32 whatever the type."""
    return 1e-5 if answer(run).dtype in (torch.float64, torch.float32) else 0.05


def served(case, kind):
    return [site for site in case.model.sites() if site.kind == kind]


def any_heads(case):
    """A site with heads that every model has: ``z``, or the values of a mixer whose output is never there without its gate."""
    return [*served(case, "z"), *served(case, "v")][0]


def test_it_is_a_model_with_a_manifest_of_every_layer(case):
    assert isinstance(case.model, Model)
    manifest = case.model.manifest()
    assert tuple(record.layer for record in manifest.layers) == case.keys
    assert all(record.exactness == "exact" and record.route != "none" for record in manifest.layers)
    assert len(manifest.frame()) == len(case.keys)
    assert manifest.sites == tuple(map(str, case.model.sites()))


def test_capture_changes_no_bit_and_maps_keep_their_contract(case):
    off = case.model.run(case.inputs)
    stats = ("received",) if case.signed else ("received", "entropy")
    on = case.model.run(case.inputs, maps=capture(blocks=4, stats=stats))
    assert torch.equal(answer(off), answer(on))
    assert tuple(on.maps) == case.keys
    assert not off.maps
    for found in on.maps.values():
        weights = found.dense()
        sums = weights.sum(-1)
        assert case.signed or found.sign == "nonnegative"
        assert found.sign == "signed" or (weights >= 0).all()
        assert found.row_sum == "free" or (sums <= 1 + 1e-5).all()
        if found.row_sum == "1":
            assert torch.allclose(sums, torch.ones_like(sums), atol=1e-5)
        assert torch.allclose(found.received(), weights.sum(2), atol=1e-5)
    assert on.provenance.attention
    assert on.provenance.versions["torch"] == torch.__version__


def test_only_the_layers_asked_for_are_captured(case):
    run = case.model.run(case.inputs, maps=capture(layers=case.keys[-1]))
    assert tuple(run.maps) == case.keys[-1:]


def test_map_times_values_is_the_attention_output(case):
    """The definition of a pattern, o_i = sum_j M_ij v_j, with values and outputs read off the same run."""
    v, z = served(case, "v"), served(case, "z")
    both = [site for site in z if Site("v", site.layer, stack=site.stack) in v]
    assert both or not z
    values = [Site("v", site.layer, stack=site.stack) for site in both]
    run = case.model.run(case.inputs, read=[*both, *values], maps=capture())
    for at, of in zip(both, values, strict=True):
        found = run.maps[f"{at.stack}.{at.layer}" if at.stack else at.layer]
        got = found.matvec(run.acts[of].transpose(1, 2).to(found.dense().dtype)).transpose(1, 2)
        assert torch.allclose(got.to(run.acts[at].dtype), run.acts[at], atol=tolerance(run)), str(at)


def test_every_site_can_be_read_in_its_shape_without_changing_a_bit(case):
    model, plain = case.model, answer(case.model.run(case.inputs))
    sites = model.sites()
    run = model.run(case.inputs, read=sites, maps=capture(blocks=4))
    assert torch.equal(answer(run), plain)
    for site in sites:
        value = run.acts[site]
        square = ("pattern", "attn_scores", "block_mass", "block_max")
        by_head = ("q", "k", "v", "z", "rot_q", "rot_k", "result", "q_input", "k_input", "v_input")
        assert value.ndim == (4 if site.kind in (*square, *by_head) else 3), str(site)
        if site.kind == "pattern":
            key = f"{site.stack}.{site.layer}" if site.stack else site.layer
            softmax = getattr(run.maps[key], "raw", run.maps[key])  # a gate scales the map, not the pattern
            assert torch.allclose(value.double(), softmax.dense().double(), atol=1e-6)


def test_residual_stream_adds_up(case):
    """resid_mid = resid_pre + attn_out and resid_post = resid_mid + mlp_out: the wiring is what the names say."""
    model, checked = case.model, 0
    stream = model.run(case.inputs, read=[*served(case, "resid_pre"), *served(case, "resid_post")]).acts
    for post in served(case, "resid_post"):
        names = {
            kind: Site(kind, post.layer, stack=post.stack) for kind in ("resid_pre", "attn_out", "resid_mid", "mlp_out")
        }
        cross = Site("attn_out", post.layer, stack="cross")
        have = {kind: site for kind, site in names.items() if site in model.sites()}
        alone = case.state and "mlp_out" not in have  # a block that mixes tokens and does nothing else
        if not {"resid_pre", "attn_out"} <= set(have) or not ("mlp_out" in have or alone):
            continue
        run = model.run(case.inputs, read=[post, *have.values(), *([cross] if cross in model.sites() else [])])
        acts = {kind: run.acts[site] for kind, site in have.items()}
        scale = run.acts[post].abs().max()
        if "resid_mid" in acts:
            assert torch.allclose(acts["resid_mid"], acts["resid_pre"] + acts["attn_out"], atol=1e-6 * scale), str(post)
        first = Site("resid_post", 0, stack=post.stack), Site("resid_pre", 1, stack=post.stack)
        if first[1] in model.sites() and not torch.equal(stream[first[0]], stream[first[1]]):
            continue  # post-norm: a norm sits between the two
        total = acts["resid_pre"] + acts["attn_out"] + acts.get("mlp_out", 0)
        if post.stack == "decoder" and cross in run.acts:
            total = total + run.acts[cross]
        assert torch.allclose(run.acts[post], total, atol=1e-5 * scale), str(post)
        checked += 1
    assert checked or not served(case, "attn_out") or type(case.net).__name__.startswith(POST_NORM)


def test_identity_edits_change_no_bit(case):
    plain = answer(case.model.run(case.inputs))
    for site in case.model.sites():
        if site.kind in (*STATISTICS, "pattern", "attn_scores"):
            continue
        run = case.model.run(case.inputs, edit={site: lambda x: x})
        assert torch.allclose(answer(run), plain, atol=tolerance(run)), str(site)


def flipped(x):
    return x.flip(-1 if x.shape[-1] > 1 else -2)  # maps with a head per channel have values of width 1


def test_edits_live_for_one_run_and_reads_see_them(case):
    plain = answer(case.model.run(case.inputs))
    for kind in ("z", "resid_mid", "resid_pre", "v", "attn_out"):
        for site in served(case, kind)[:2]:
            run = case.model.run(case.inputs, edit={site: flipped}, read=[site])
            changed = case.model.run(case.inputs, edit={site: run.acts[site]})
            assert not torch.allclose(answer(run), plain, atol=1e-4), str(site)
            assert torch.allclose(answer(run), answer(changed), atol=1e-4), str(site)
            assert torch.equal(answer(case.model.run(case.inputs)), plain), str(site)


def test_an_edit_of_one_head_leaves_the_others_alone(case):
    site = any_heads(case)
    one = Site(site.kind, site.layer, 1, site.stack)
    before = case.model.run(case.inputs, read=[site]).acts[site]
    run = case.model.run(case.inputs, edit={one: torch.zeros_like}, read=[site, one])
    assert (run.acts[one] == 0).all()
    rest = [h for h in range(before.shape[2]) if h != 1]
    assert torch.equal(run.acts[site][:, :, rest], before[:, :, rest])


def test_result_is_z_through_the_output_matrix(case):
    for site in served(case, "result"):
        z = Site("z", site.layer, stack=site.stack)
        key = f"{site.stack}.{site.layer}" if site.stack else site.layer
        run = case.model.run(case.inputs, read=[site, z])
        expected = torch.einsum("bthe,hed->bthd", run.acts[z], case.model.weight("W_O", key))
        assert torch.allclose(run.acts[site], expected, atol=tolerance(run))
        out = Site("attn_out", site.layer, stack=site.stack)
        if not served(case, "gate") and out in case.model.sites():
            half = {"layer": site.layer, "head": 1, "stack": site.stack}
            a = case.model.run(case.inputs, edit={Site("z", **half): lambda x: x / 2})
            b = case.model.run(case.inputs, edit={Site("result", **half): lambda x: x / 2})
            assert torch.allclose(answer(a), answer(b), atol=1e-4)


def test_unknown_requests_name_what_exists(case):
    model, inputs = case.model, case.inputs
    site = any_heads(case)
    far = str(site).replace(f"blocks.{site.layer}.", "blocks.99.")
    for bad in ("blocks.0.attn.hook_patern", far, f"{site}[99]"):
        with pytest.raises(UnknownName, match="known: .*hook_"):
            model.run(inputs, read=[bad])
        with pytest.raises(UnknownName, match="known: .*hook_"):
            model.run(inputs, edit={bad: torch.zeros_like})
    with pytest.raises(UnknownName, match="known: "):
        model.run(inputs, maps=capture(layers=[99]))
    with pytest.raises(UnknownName, match="all, last"):
        model.run(inputs, logits="most")


def test_bad_edits_are_refused_by_name(case):
    site = any_heads(case)
    with pytest.raises(WorkbenchError, match="NoneType"):
        case.model.run(case.inputs, edit={site: lambda x: None})
    with pytest.raises(WorkbenchError, match=r"\[3, 3\]"):
        case.model.run(case.inputs, edit={site: torch.zeros(3, 3)})
    statistic = Site("received", site.layer, stack=site.stack)
    with pytest.raises(WorkbenchError, match="cannot be edited"):
        case.model.run(case.inputs, edit={statistic: torch.zeros_like})
    with pytest.raises(WorkbenchError, match="edited twice"):
        case.model.run(case.inputs, edit={site: torch.zeros_like, str(site): torch.ones_like})


def test_logits_last_and_none(case):
    if not case.text or case.model.run(case.inputs).logits is None:
        return
    everything = case.model.run(case.inputs)
    last = case.model.run(case.inputs, logits="last")
    assert last.logits.shape == (len(case.inputs), 1, case.model.shape.vocab)
    assert torch.allclose(last.logits, everything.logits[:, -1:], atol=1e-5)
    assert case.model.run(case.inputs, logits=None).logits is None


def test_inputs_that_make_no_sense_are_refused(case):
    if not case.text:
        return
    shape = case.model.shape
    with pytest.raises(WorkbenchError, match="no tokens"):
        case.model.run(torch.zeros(1, 0, dtype=torch.int64))
    with pytest.raises(WorkbenchError, match="token ids lie in"):
        case.model.run(torch.full((1, 3), shape.vocab))
    if shape.context is not None:
        with pytest.raises(WorkbenchError, match="3 more than"):
            case.model.run(torch.full((1, shape.context + 3), 5))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_receives_and_gives_nothing(case, side):
    """A padded row is, on its real tokens, the same text alone; positions count from its first real token."""
    if not case.text:
        return
    ids, pad = case.inputs[:, :7], 3
    filler = torch.full((len(ids), pad), 0)
    real = torch.ones_like(ids, dtype=torch.bool)
    hidden = torch.zeros_like(filler, dtype=torch.bool)
    parts = ((filler, ids), (hidden, real)) if side == "left" else ((ids, filler), (real, hidden))
    tokens = Tokens(torch.cat(parts[0], 1), torch.cat(parts[1], 1))
    at = slice(pad, None) if side == "left" else slice(0, 7)
    if side == "left" and not case.heeds_padding:
        with pytest.raises(Refused, match="takes padding for text"):
            case.model.run(tokens, maps=capture())
        return
    alone, padded = case.model.run(ids, maps=capture()), case.model.run(tokens, maps=capture())
    assert torch.allclose(answer(padded)[:, at], answer(alone), atol=1e-4)
    for key in case.keys:
        weights = padded.maps[key].dense()
        assert (weights[..., ~tokens.mask[0]] == 0).all()
        assert (weights[:, :, ~tokens.mask[0]] == 0).all()
        assert torch.allclose(weights[:, :, at, at], alone.maps[key].dense(), atol=1e-5)
    last = case.model.run(tokens, logits="last")
    if last.logits is not None and side == "right":
        assert torch.allclose(last.logits, padded.logits[:, 6:7], atol=1e-5)


def test_decoding_with_a_cache_gives_the_same_rows(case):
    if not case.text or not case.model.shape.causal:
        return
    ids = case.inputs
    if case.state:
        states_are_not_continued(case)
        return
    whole = case.model.run(ids, maps=capture())
    first = case.model.run(ids[:, :6], cache=True)
    before = first.cache.get_seq_length() if hasattr(first.cache, "get_seq_length") else None
    second = case.model.run(ids[:, 6:10], cache=first.cache, maps=capture())
    third = case.model.run(ids[:, 10:], cache=second.cache, maps=capture())
    assert torch.allclose(torch.cat([second.logits, third.logits], 1), whole.logits[:, 6:], atol=1e-4)
    for run, lo, hi in ((second, 6, 10), (third, 10, 11)):
        for key in case.keys:
            found, full = run.maps[key], whole.maps[key].dense()[:, :, lo:hi, :hi]
            assert found.shape[2:] == (hi - lo, hi), "keys count from position 0, a window's cache notwithstanding"
            assert found.offset == lo
            assert torch.allclose(found.dense(), full, atol=1e-5)
            assert torch.equal(found.received() > 0, full.sum(2) > 0)
    again = case.model.run(ids[:, 6:10], cache=first.cache)
    assert torch.equal(again.logits, second.logits)
    assert before is None or first.cache.get_seq_length() == before
    assert first.cache is not None
    assert whole.cache is None


def states_are_not_continued(case):
    """A state does not tell its tokens apart: decoding goes on as it does without us, and maps of it are refused."""
    ids = case.inputs
    try:
        first = case.model.run(ids[:, :6], cache=True, maps=capture())
        second = case.model.run(ids[:, 6:7], cache=first.cache)
    except Refused as refused:
        assert "run the whole text without cache" in str(refused)  # noqa: PT017
        return
    whole = case.model.run(ids)
    assert torch.allclose(torch.cat([first.logits, second.logits], 1), whole.logits[:, :7], atol=1e-4)
    assert torch.equal(case.model.run(ids[:, 6:7], cache=first.cache).logits, second.logits), "the cache was written to"
    with pytest.raises(Refused, match="continues from a state in which 6 cached tokens"):
        case.model.run(ids[:, 6:7], cache=first.cache, maps=capture())
    softmax = [record.layer for record in case.model.manifest().layers if record.route == "attention interface"]
    found = case.model.run(ids[:, 6:7], cache=first.cache, maps=capture(layers=softmax)).maps
    expected = case.model.run(ids, maps=capture(layers=softmax)).maps
    for key in softmax:
        assert torch.allclose(found[key].dense(), expected[key].dense()[:, :, 6:7, :7], atol=1e-5)


def test_gradients_flow_through_reads_and_edits(case):
    sites = [s for kind in ("resid_pre", "z", "v") for s in served(case, kind)[-1:]]
    with torch.enable_grad():
        run = case.model.run(case.inputs, read=sites, edit={sites[0]: lambda x: x * 1.0}, maps=capture())
        grads = torch.autograd.grad(answer(run).sum(), [run.acts[s] for s in sites])
    assert all(g.abs().sum() > 0 for g in grads)
    assert not case.model.run(case.inputs, read=sites).acts[sites[0]].requires_grad
    assert not next(iter(run.maps.values())).dense().requires_grad


def test_reading_a_site_leaves_the_gradients_of_others(case):
    first = [*served(case, "resid_pre"), *served(case, "embed")][0]

    def slope(*more):
        with torch.enable_grad():
            run = case.model.run(case.inputs, read=[first, *more])
            return torch.autograd.grad(answer(run).square().sum(), run.acts[first])[0]

    plain = slope()
    for kind in ("result", "z", "q", "q_input", "v_input", "resid_mid", "mlp_out", "pattern"):
        for site in served(case, kind)[-1:]:
            assert torch.allclose(slope(site), plain, atol=1e-4 * plain.abs().max(), rtol=1e-4), str(site)
