"""Reconstruction, sparsity and loss of coders against plain loops in float64."""

import math

import pytest
import torch
from planted_coders import coder_of, identity, nothing, random_coder, tiny

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.protocol import Tokens
from workbench.probes.features.model_quality import coder_quality
from workbench.probes.features.quality import array_quality

RESID = "blocks.0.hook_resid_post"
NORMED, OUT, Z = "blocks.1.hook_mlp_in", "blocks.1.hook_mlp_out", "blocks.1.attn.hook_z"


def batch():
    """Five texts of unequal length, padded on the right."""
    torch.manual_seed(3)
    ids = torch.randint(0, 11, (5, 9))
    mask = torch.arange(9) < torch.tensor([9, 4, 7, 2, 8])[:, None]
    return Tokens(ids, mask)


def by_hand(model, coder, tokens, read, write, order=None, keep=lambda b, t: True):
    """Every measure by a loop over texts, one at a time, without padding."""
    inputs, targets, spliced = [], [], {"ce": [], "zero": [], "mean": [], "coder": []}
    kls = {"zero": [], "mean": [], "coder": []}
    texts = [tokens.ids[b, : int(tokens.mask[b].sum())][None] for b in range(len(tokens.ids))]
    judged = [torch.tensor([keep(b, t) for t in range(ids.shape[1])]) for b, ids in enumerate(texts)]

    def out(x):
        f = torch.relu((x - (coder.b_dec if coder.centred else 0)) @ coder.W_enc + coder.b_enc)
        rows = coder.W_dec if order is None else coder.W_dec[order.argsort()]
        y = f @ rows + coder.b_dec
        return f, y if coder.W_skip is None else y + x @ coder.W_skip

    for ids, on in zip(texts, judged, strict=True):
        run = model.run(ids, read=[read, write])
        inputs.append(run.acts[read][0].flatten(1)[on])
        targets.append(run.acts[write][0].flatten(1)[on])
    x, t = torch.cat(inputs), torch.cat(targets)
    mean = t.mean(0)
    f, y = out(x)
    for ids, on, part in zip(texts, judged, inputs, strict=True):
        own = model.run(ids).logits[0].log_softmax(-1)

        def loss(logp, ids=ids, on=on):
            return [-logp[i, ids[0, i + 1]] for i in range(ids.shape[1] - 1) if on[i]]

        spliced["ce"] += loss(own)
        for name in ("zero", "mean", "coder"):
            value = {"zero": torch.zeros_like(mean), "mean": mean, "coder": out(part)[1]}[name]

            def put(act, value=value, on=on):
                new = act.clone()
                flat = new.flatten(2)[0].clone()
                flat[on] = value
                return flat.reshape(act.shape)

            logp = model.run(ids, edit={write: put}).logits[0].log_softmax(-1)
            spliced[name] += loss(logp)
            kls[name] += [(own[i].exp() * (own[i] - logp[i])).sum() for i in range(len(own)) if on[i]]
    ce = {name: float(torch.stack(values).mean()) for name, values in spliced.items()}
    return {
        "l0": float((f > 0).double().sum(1).mean()),
        "fvu": float(((t - y) ** 2).sum() / ((t - mean) ** 2).sum()),
        "mse": float(((t - y) ** 2).mean()),
        "cosine": float(torch.nn.functional.cosine_similarity(t, y, dim=1).mean()),
        "norm_ratio": float((y.norm(dim=1) / t.norm(dim=1)).mean()),
        "ce": ce["ce"],
        "ce_coder": ce["coder"],
        **{f"ce_{name}": ce[name] for name in ("zero", "mean")},
        **{
            f"ce_recovered_{name}": (ce[name] - ce["coder"]) / (ce[name] - ce["ce"])
            if ce[name] > ce["ce"]
            else math.nan
            for name in ("zero", "mean")
        },
        **{f"kl_{name}": float(torch.stack(values).mean()) for name, values in kls.items()},
    }


CASES = {
    "autoencoder": (lambda: random_coder(8, 14), RESID, RESID),
    "transcoder": (lambda: random_coder(8, 14, d_out=8, centred=False), NORMED, OUT),
    "skip": (lambda: random_coder(8, 14, d_out=8, centred=False, skip=True), NORMED, OUT),
    "heads": (lambda: random_coder(8, 14), Z, Z),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [1, 2, 8])
@torch.no_grad()
def test_every_measure_is_that_of_a_plain_loop(case, size):
    make, read, write = CASES[case]
    model, coder, tokens = tiny(), make(), batch()
    got = coder_quality(coder, model, tokens, read, write, batch=size)
    expected = by_hand(model, coder, tokens, read, write)
    assert got.values == pytest.approx(expected, rel=1e-9, nan_ok=True)
    assert got.tokens == 30
    assert got.texts == 5


@torch.no_grad()
def test_the_null_is_the_coder_with_other_rows_of_its_decoder():
    model, coder, tokens = tiny(), random_coder(8, 14), batch()
    got = coder_quality(coder, model, tokens, RESID, seed=4)
    order = torch.randperm(14, generator=torch.Generator().manual_seed(4))
    expected = by_hand(model, coder, tokens, RESID, RESID, order=order)
    null = dict(zip(got.measures, got.null.tolist(), strict=True))
    for name in ("fvu", "cosine", "norm_ratio", "ce_coder", "ce_recovered_zero", "kl_coder"):
        assert null[name] == pytest.approx(expected[name], rel=1e-9, nan_ok=True), name
    assert math.isnan(null["l0"])


@torch.no_grad()
def test_ignored_tokens_are_neither_judged_nor_replaced():
    model, coder, tokens = tiny(), random_coder(8, 14), batch()
    ignored = int(tokens.ids[0, 0])
    got = coder_quality(coder, model, tokens, RESID, ignore=[ignored])
    expected = by_hand(model, coder, tokens, RESID, RESID, keep=lambda b, t: int(tokens.ids[b, t]) != ignored)
    assert got.values == pytest.approx(expected, rel=1e-9, nan_ok=True)


@pytest.mark.parametrize("site", [RESID, Z])
@torch.no_grad()
def test_an_identity_loses_nothing_and_silence_recovers_nothing(site):
    model, tokens = tiny(), batch()
    whole = coder_quality(identity(8), model, tokens, site)
    assert whole.fvu < 1e-28
    assert whole.l0 == 8
    assert whole.dead < 0.3
    assert whole.value("cosine") == pytest.approx(1)
    silent = coder_quality(nothing(8), model, tokens, site)
    assert silent.l0 == 0
    assert silent.dead == 1
    assert silent.value("ce_coder") == pytest.approx(silent.value("ce_zero"), abs=1e-12)
    for got, expected in ((whole, 1.0), (silent, 0.0)):
        if got.value("ce_zero") > got.value("ce"):
            assert got.ce_recovered("zero") == pytest.approx(expected, abs=1e-9)
        else:
            assert math.isnan(got.ce_recovered("zero"))


def test_on_a_trained_model_an_identity_recovers_all_and_silence_nothing():
    import workbench as wb
    from workbench.datasets.corpus import filler_text

    model = wb.load("tiny-softmax")
    texts = [filler_text(seed, 24) for seed in range(50, 54)]
    site = "blocks.2.hook_resid_post"
    whole = wb.coder_quality(identity(128, torch.float32), model, texts, site)
    assert whole.fvu < 1e-12
    assert whole.ce_recovered("zero") == pytest.approx(1, abs=1e-5)
    assert whole.ce_recovered("mean") == pytest.approx(1, abs=1e-5)
    silent = wb.coder_quality(nothing(128, torch.float32), model, texts, site, ablation="zero")
    assert silent.ce_recovered("zero") == pytest.approx(0, abs=1e-5)
    assert "ce_mean" not in silent.measures
    table = whole.frame()
    row = table[table["measure"] == "ce"].iloc[0]
    assert row["low"] < row["value"] < row["high"]


@torch.no_grad()
def test_density_dead_and_l0_are_counts():
    x = torch.tensor([[1.0, 0.0], [2.0, -1.0], [-3.0, 0.5], [0.0, 0.0]], dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64)
    coder = coder_of(torch.cat([eye, eye]), torch.cat([eye, torch.zeros(2, 2, dtype=torch.float64)], 1))
    got = array_quality(coder, x)
    assert got.density.tolist() == [0.5, 0.25, 0, 0]
    assert got.dead == 0.5
    assert got.l0_counts.tolist() == [1, 3]
    assert got.l0 == 0.75
    counts, edges = got.histogram(4)
    assert int(counts.sum()) == 2
    assert edges[-1] == 0


@torch.no_grad()
def test_rows_are_judged_as_a_loop_judges_them():
    torch.manual_seed(0)
    x, y = torch.randn(300, 5).double(), torch.randn(300, 3).double()
    coder = random_coder(5, 9, d_out=3, centred=False, skip=True)
    got = array_quality(coder, x, y)
    out = torch.relu(x @ coder.W_enc + coder.b_enc) @ coder.W_dec + coder.b_dec + x @ coder.W_skip
    assert got.fvu == pytest.approx(float(((y - out) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()), rel=1e-12)
    assert got.value("mse") == pytest.approx(float(((y - out) ** 2).mean()), rel=1e-12)
    low, high = got.intervals()
    place = got.measures.index("fvu")
    assert low[place] < got.fvu < high[place]


def test_what_a_coder_reads_is_found_where_it_says():
    model, coder = tiny(), random_coder(8, 14)
    coder.about = {"reads": RESID, "writes": RESID}
    got = coder_quality(coder, model, batch())
    assert got.reads == got.writes == (RESID,)
    crossing = random_coder(16, 14, d_out=16, reads=(8, 8), writes=(8, 8), centred=False)
    crossing.about = {"reads": [RESID, "blocks.1.hook_resid_post"], "writes": [RESID, "blocks.1.hook_resid_post"]}
    assert coder_quality(crossing, model, batch()).reads == (RESID, "blocks.1.hook_resid_post")


def test_a_coder_away_from_its_place_is_warned_of_or_refused():
    model, coder = tiny(), random_coder(8, 14)
    coder.about = {"model": "other", "reads": RESID, "writes": RESID, "context": 6}
    with pytest.warns(UserWarning, match="coder") as seen:
        coder_quality(coder, model, batch(), "blocks.1.hook_resid_post")
    said = " ".join(str(one.message) for one in seen)
    for part in ("trained on other", f"trained to read {RESID}", "contexts of 6 tokens and is used on 9"):
        assert part in said
    assert all(one.filename == __file__ for one in seen)
    transcoder = random_coder(8, 14, d_out=8, centred=False)
    transcoder.about = {"reads": NORMED, "writes": OUT}
    assert coder_quality(transcoder, model, batch(), NORMED).writes == (OUT,)
    with pytest.raises(WorkbenchError, match="pass target= as well"):
        coder_quality(transcoder, model, batch(), RESID)
    with pytest.raises(WorkbenchError, match="reads 1 sites; got 2"):
        coder_quality(coder, model, batch(), [RESID, RESID])


def test_results_are_tables_figures_and_files(tmp_path):
    import workbench as wb

    got = coder_quality(random_coder(8, 14), tiny(), batch(), RESID)
    table = got.frame().set_index("measure")
    assert {"l0", "fvu", "ce_recovered_zero", "kl_coder", "dead"} <= set(table.index)
    assert table.loc["fvu", "null"] > table.loc["fvu", "value"] or table.loc["fvu", "null"] > 0
    assert "FVU" in got.plot().get_title()
    back = wb.load_result(got.save(tmp_path / "quality"))
    assert back.tensors["density"].shape == (14,)
    assert "<table" in got._repr_html_()


def test_what_cannot_be_judged_is_refused():
    model, coder = tiny(), random_coder(8, 14)
    with pytest.raises(WorkbenchError, match="does not say where it reads"):
        coder_quality(coder, model, batch())
    with pytest.raises(WorkbenchError, match="does not say where it writes"):
        coder_quality(random_coder(8, 14, d_out=8, centred=False), model, batch(), NORMED)
    with pytest.raises(WorkbenchError, match="width 8 in this model; the coder expects 6"):
        coder_quality(random_coder(6, 14), model, batch(), RESID)
    with pytest.raises(UnknownName, match="known: zero, mean"):
        coder_quality(coder, model, batch(), RESID, ablation="resample")
    with pytest.raises(UnknownName, match="no site"):
        coder_quality(coder, model, batch(), "blocks.9.hook_resid_post")
    with pytest.raises(WorkbenchError, match="at least two tokens"):
        coder_quality(coder, model, torch.tensor([[1], [2]]), RESID)
    with pytest.raises(WorkbenchError, match="no position is left"):
        coder_quality(coder, model, torch.tensor([[1, 1]]), RESID, ignore=[1])
    with pytest.raises(Refused, match="no row for every token"):
        coder_quality(coder, model, batch(), "blocks.0.attn.hook_pattern")
    with pytest.raises(UnknownName, match="known: l0"):
        array_quality(coder, torch.randn(4, 8)).value("L0")
    transcoder = random_coder(8, 14, d_out=8, centred=False)
    with pytest.raises(WorkbenchError, match="pass what it should write as Y"):
        array_quality(transcoder, torch.randn(4, 8))
    with pytest.raises(WorkbenchError, match="got 4 and 3"):
        array_quality(transcoder, torch.randn(4, 8), torch.randn(3, 8))
    with pytest.raises(WorkbenchError, match="width 8"):
        array_quality(coder, torch.randn(4, 7))
    with pytest.raises(WorkbenchError, match="1 numbers that are NaN"):
        array_quality(coder, torch.tensor([[math.nan] + [0.0] * 7]))


def test_activations_that_are_no_numbers_are_refused():
    model = tiny()
    with torch.no_grad():
        model.net.W_E[2] = math.nan
    with pytest.raises(WorkbenchError, match="NaN or infinite"):
        coder_quality(random_coder(8, 14), model, torch.tensor([[1, 2, 3]]), RESID)
