"""Pages of features against plain loops: examples, samples, histograms, logits, heads, correlations."""

import re
from dataclasses import replace

import pytest
import torch
from planted_coders import coder_of, identity, nothing, random_coder, tiny

import workbench as wb
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.protocol import Tokens
from workbench.probes.features.dashboards import feature_dashboard
from workbench.probes.features.direct_logits import direct_logits, head_shares, stream_rows
from workbench.sites import Site

RESID, Z = "blocks.0.hook_resid_post", "blocks.1.attn.hook_z"


def batch(left: bool = False) -> Tokens:
    torch.manual_seed(3)
    ids = torch.randint(0, 11, (7, 9))
    lengths = torch.tensor([9, 4, 7, 2, 8, 5, 9])[:, None]
    mask = torch.arange(9) >= 9 - lengths if left else torch.arange(9) < lengths
    labels = tuple(tuple(f"<{i}>" for i in row) for row in ids.tolist())
    return Tokens(ids, mask, labels)


@torch.no_grad()
def codes(model, coder, tokens, site):
    """``[(text, position, id, code [F])]`` one text at a time."""
    out = []
    for b in range(len(tokens.ids)):
        ids = tokens.ids[b][tokens.mask[b]]
        x = model.run(ids[None], read=[site]).acts[site][0].flatten(1)
        f = torch.relu((x - coder.b_dec) @ coder.W_enc + coder.b_enc)
        out += [(b, t, int(ids[t]), f[t]) for t in range(len(ids))]
    return out


@pytest.mark.parametrize("site", [RESID, Z])
@pytest.mark.parametrize("left", [False, True])
def test_pages_say_what_a_loop_over_all_tokens_says(site, left):
    model, coder, tokens = tiny(), random_coder(8, 14), batch(left)
    every = codes(model, coder, tokens, site)
    table = torch.stack([code for *_, code in every])
    got = feature_dashboard(coder, model, tokens, [3, 9], site=site, top=4, batch=3, window=(2, 1), correlated=13)
    assert got.tokens == len(every) == 44
    for page in got.pages:
        own = table[:, page.feature]
        assert page.density == pytest.approx(float((own > 0).double().mean()))
        assert page.largest == pytest.approx(float(own.max()))
        assert page.mean == pytest.approx(float(own[own > 0].mean()))
        ranked = sorted(range(len(every)), key=lambda n: -float(own[n]))[:4]
        assert [(e.text, e.position) for e in page.group("top")] == [every[n][:2] for n in ranked]
        assert [e.activation for e in page.group("top")] == pytest.approx([float(own[n]) for n in ranked])
        counted = torch.histc(own[own > 0] / own.max(), bins=20, min=0, max=1)
        assert int(page.histogram.sum()) == int((own > 0).sum())
        assert (page.histogram - counted).abs().sum() <= 2  # a value on an edge may fall on either side
        correlation = torch.corrcoef(table.T)[page.feature]
        for other, r in page.goes_with:
            assert r == pytest.approx(float(correlation[other]), abs=1e-9)
        assert page.feature not in dict(page.goes_with)
        alive = [j for j in range(14) if j != page.feature and correlation[j] > 0]
        assert {other for other, _ in page.goes_with} == set(alive)
        values = {(b, t): (i, float(code[page.feature])) for b, t, i, code in every}
        for example in page.examples:
            start = example.position - example.at
            for step, (token, value) in enumerate(zip(example.tokens, example.values, strict=True)):
                there = values[example.text, start + step]
                assert token == f"<{there[0]}>"
                assert value == pytest.approx(there[1], abs=1e-12)
            assert example.values[example.at] == example.activation
            assert example.at == min(2, example.position)


def test_samples_lie_in_their_part_of_the_range_and_are_drawn_from_all_of_it():
    model, coder, tokens = tiny(), random_coder(8, 14), batch()
    every = codes(model, coder, tokens, RESID)
    for seed in range(3):
        page = feature_dashboard(coder, model, tokens, [3], site=RESID, ranges=3, per_range=50, seed=seed).pages[0]
        for r in range(3):
            name = f"{100 * r / 3:.0f}-{100 * (r + 1) / 3:.0f}%"
            inside = {
                (b, t)
                for b, t, _, code in every
                if code[3] > 0 and r < float(code[3]) / page.largest * 3 <= r + 1 + 1e-12
            }
            assert {(e.text, e.position) for e in page.group(name)} == inside
    seen = set()
    for seed in range(60):
        page = feature_dashboard(coder, model, tokens, [3], site=RESID, ranges=1, per_range=1, seed=seed).pages[0]
        (one,) = page.group("0-100%")
        seen.add((one.text, one.position))
    active = sum(float(code[3]) > 0 for *_, code in every)
    assert len(seen) > 0.7 * active * (1 - (1 - 1 / active) ** 60)


def test_batches_do_not_change_what_is_seen():
    model, coder, tokens = tiny(), random_coder(8, 14), batch()
    one, other = (
        feature_dashboard(coder, model, tokens, [1, 5], site=RESID, per_range=0, batch=size) for size in (1, 7)
    )
    for a, b in zip(one.pages, other.pages, strict=True):
        assert a.largest == pytest.approx(b.largest)
        assert [(e.text, e.position) for e in a.examples] == [(e.text, e.position) for e in b.examples]


@torch.no_grad()
def test_logits_of_a_direction_are_what_the_model_adds_without_its_last_norm():
    model = tiny()
    model.net.ln_final = torch.nn.Identity()
    coder = random_coder(8, 14)
    x = torch.randn(8, dtype=torch.float64)
    found = direct_logits(coder, model, "blocks.1.hook_resid_post", [2, 6], count=4)
    for i, feature in enumerate((2, 6)):
        change = model.net.logits((x + coder.W_dec[feature])[None, None])[0, 0] - model.net.logits(x[None, None])[0, 0]
        change = change - change.mean()
        assert found.top[i].tolist() == change.topk(4).indices.tolist()
        assert torch.allclose(found.top_values[i], change.topk(4).values)
        assert torch.allclose(found.bottom_values[i], change.topk(4, largest=False).values)


@torch.no_grad()
def test_rows_of_z_reach_the_stream_as_the_model_takes_them_there():
    model, coder = tiny(), random_coder(8, 14)
    ids = torch.tensor([[1, 2, 3]])
    out = "blocks.1.hook_attn_out"
    plain = model.run(ids, read=[out]).acts[out]

    def add(z):
        return z + coder.W_dec[4].view(2, 4)

    changed = model.run(ids, read=[out], edit={Z: add}).acts[out]
    assert torch.allclose(changed - plain, stream_rows(coder, model, Site.parse(Z), [4])[0].expand(1, 3, 8))
    with pytest.raises(Refused, match="does not write to the residual stream"):
        stream_rows(coder, model, Site.parse("blocks.1.attn.hook_q"), [4])


@torch.no_grad()
def test_heads_are_the_shares_of_the_slices():
    rows = torch.zeros(2, 8, dtype=torch.float64)
    rows[0, :4] = 3.0
    rows[0, 4] = 2.0
    rows[1, 5] = 1.0
    got = head_shares(coder_of(rows, torch.zeros(8, 2, dtype=torch.float64)), [0, 1], 2)
    assert torch.allclose(got, torch.tensor([[6 / 8, 2 / 8], [0.0, 1.0]], dtype=torch.float64))
    board = feature_dashboard(random_coder(8, 14), tiny(), batch(), [1], site=Z)
    assert float(board.pages[0].heads.sum()) == pytest.approx(1)
    assert len(feature_dashboard(random_coder(8, 14), tiny(), batch(), [1], site=RESID).pages[0].heads) == 0
    with pytest.raises(WorkbenchError, match="no 3 heads"):
        head_shares(random_coder(8, 14), [0], 3)


def test_attribution_by_source_sums_with_its_constants_to_the_pre_activation():
    model, coder, tokens = tiny(), random_coder(8, 14), batch()
    board = feature_dashboard(coder, model, tokens, [3, 9], site=Z, attributed=2, top=3)
    for page in board.pages:
        with_sources = [e for e in page.examples if len(e.sources)]
        assert with_sources == list(page.group("top")[:2])
        for example in with_sources:
            ids = tokens.ids[example.text][tokens.mask[example.text]][None]
            whole = wb.feature_attribution(coder, model, ids, page.feature, example.position, site=Z)
            assert torch.equal(example.sources, whole.by_source[0, 0])
            assert example.activation == pytest.approx(float(whole.pre[0, 0]))
    assert 'class="no">from' in board.html()
    refused = feature_dashboard(coder, model, tokens, [3], site="blocks.1.hook_mlp_out", attributed=1)
    assert "no attribution by source" in refused.notes[0]


def test_a_transcoder_and_features_that_are_never_active():
    model, tokens = tiny(), batch()
    transcoder = random_coder(8, 14, d_out=8, centred=False)
    board = feature_dashboard(transcoder, model, tokens, site="blocks.1.hook_mlp_in", target="blocks.1.hook_mlp_out")
    assert board.reads != board.writes
    assert board.pages[0].raises
    silent = feature_dashboard(nothing(8), model, tokens, [2], site=RESID)
    assert silent.pages[0].examples == ()
    assert silent.pages[0].density == 0
    assert "never active" in silent.html()
    silent.plot()
    assert feature_dashboard(nothing(8), model, tokens, site=RESID).pages[0].feature == 0


def test_the_features_that_write_most_come_first():
    model, tokens = tiny(), batch()
    coder = identity(8)
    every = codes(model, coder, tokens, RESID)
    power = torch.stack([code for *_, code in every]).square().sum(0)
    board = feature_dashboard(coder, model, tokens, site=RESID, per_range=0)
    assert [page.feature for page in board.pages] == [
        i for i in power.argsort(descending=True).tolist() if power[i] > 0
    ]


def test_html_is_escaped_and_needs_nothing_from_elsewhere(tmp_path):
    model, coder, tokens = tiny(), random_coder(8, 14), batch()
    evil = tuple(tuple("<script>alert('&\"')</script>" for _ in row) for row in tokens.labels)
    board = feature_dashboard(coder, model, replace(tokens, labels=evil), [3], site=RESID)
    for text in (board._repr_html_(), board.html()):
        assert "<script" not in text
        assert "&lt;script&gt;" in text
        assert not re.search(r"(src|href)=|https?://|@import|url\(", text)
    path = board.write_html(tmp_path / "pages.html")
    assert path.read_text() == board.html()
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(WorkbenchError, match="cannot write"):
        board.write_html(tmp_path / "none" / "pages.html")


def test_results_are_tables_figures_and_files(tmp_path):
    board = feature_dashboard(random_coder(8, 14), tiny(), batch(), [3, 5], site=Z, attributed=1)
    assert board.frame()["feature"].tolist() == [3, 5]
    assert set(board.examples()["group"]) >= {"top", "80-100%"}
    assert "feature 5" in board.plot(feature=5).get_title()
    back = wb.load_result(board.save(tmp_path / "board"))
    assert back.tensors["pages.0.histogram"].shape == (20,)
    with pytest.raises(UnknownName, match="known: 3, 5"):
        board.page(4)


def test_what_cannot_be_shown_is_refused():
    model, coder, tokens = tiny(), random_coder(8, 14), batch()
    with pytest.raises(UnknownName, match="known: 0 to 13"):
        feature_dashboard(coder, model, tokens, [14], site=RESID)
    with pytest.raises(WorkbenchError, match="no feature given"):
        feature_dashboard(coder, model, tokens, [], site=RESID)
    with pytest.raises(WorkbenchError, match="does not say where it reads"):
        feature_dashboard(coder, model, tokens)
    with pytest.raises(WorkbenchError, match="top is at least 1"):
        feature_dashboard(coder, model, tokens, [1], site=RESID, top=0)
    with pytest.raises(WorkbenchError, match="window"):
        feature_dashboard(coder, model, tokens, [1], site=RESID, window=(-1, 2))
