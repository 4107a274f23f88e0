from dataclasses import replace

import pytest
import torch
from builders import hugging_face
from coders_at import coder_at
from natives import CONFIG, DATA, VARIANTS, make

import workbench as wb
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.probes.features.recursive_attribution import recursive_attribution

ONE = DATA[:1, :4]


def deep(name="grouped", layers=3):
    return make(replace(VARIANTS[name], layers=layers))


def width(site):
    return 24 if site.endswith("hook_z") else 16


@pytest.mark.parametrize(
    "site", ["blocks.2.attn.hook_z", "blocks.2.hook_attn_out", "blocks.2.hook_resid_pre", "ln_final.hook_normalized"]
)
@pytest.mark.parametrize("name", ["grouped", "gated", "biased", "learned", "bare"])
def test_everything_sums_at_every_level(name, site):
    """The whole tree, and what all its paths come to by token, found in one pass down instead."""
    model = deep(name)
    coder = coder_at(site, width(site))
    whole = recursive_attribution(coder, model, ONE, 3, -1, threshold=0, nodes=10**6)
    pre = float(coder.pre(model.run(ONE, [site]).acts[site][0, -1:].flatten(1))[0, 3])
    assert whole.pre == pre
    assert whole.error < 1e-10
    assert whole.rest == 0
    leaves = whole.leaves()
    assert abs(leaves["value"].sum() - pre) < 1e-10
    assert not (leaves["kind"] == "head").any()
    assert abs(float(whole.upstream.sum()) + whole.constant - pre) < 1e-10
    for row, component in enumerate(whole.components):
        mine = leaves[(leaves["kind"] == component.kind) & (leaves["layer"] == component.layer)]
        sums = mine.groupby("position")["value"].sum()
        for position in range(ONE.shape[1]):
            assert abs(float(whole.upstream[row, position]) - sums.get(position, 0.0)) < 1e-10


def test_the_first_level_is_the_direct_attribution():
    model, coder = deep(), coder_at("blocks.2.attn.hook_z", 24)
    direct = wb.feature_attribution(coder, model, ONE, 3, -1)
    tree = recursive_attribution(coder, model, ONE, 3, -1, threshold=0, depth=1)
    frame = tree.frame()
    first = frame[(frame["depth"] == 1) & (frame["kind"] == "head")]
    assert len(first) == 16
    assert not first["expanded"].any()
    for _, node in first.iterrows():
        assert abs(node["value"] - float(direct.values[0, 0, node["index"], node["source"]])) < 1e-12


def test_what_is_cut_stays_in_the_sum():
    model, coder = deep(), coder_at("blocks.2.attn.hook_z", 24)
    found = recursive_attribution(coder, model, DATA[:1], 3, -1, threshold=0.05)
    assert found.rest != 0
    assert found.error < 1e-10
    frame = found.frame()
    least = 0.05 * frame[(frame["depth"] == 1) & (frame["kind"] != "rest")]["value"].abs().sum()
    assert (frame[~frame["kind"].isin(["rest", "root"])]["value"].abs() >= 0.9 * least).all()
    few = recursive_attribution(coder, model, DATA[:1], 3, -1, threshold=0.001, nodes=60)
    assert few.error < 1e-10
    assert (few.leaves()["kind"] == "head").any()
    assert abs(few.leaves()["value"].sum() - few.pre) < 1e-10


def test_an_embedding_through_one_head_by_hand():
    """Two layers without MLPs and norms: the token's embedding through W_V W_O of one head and W_V of the next."""
    model = make(replace(VARIANTS["bare"], kv_heads=None))
    coder = coder_at("blocks.1.attn.hook_z", 24)
    maps = model.run(ONE, maps=wb.capture()).maps
    found = recursive_attribution(coder, model, ONE, 2, -1, threshold=0, nodes=10**6).frame()
    first = found[(found["depth"] == 1) & (found["index"] == 1) & (found["source"] == 2)].iloc[0]
    below = found[(found["parent"] == first["node"]) & (found["index"] == 3) & (found["source"] == 1)].iloc[0]
    attn = [block.attn for block in model.net.blocks]
    read = attn[1].W_V[1] @ coder.W_enc[6:12, 2] * maps[1].rows(3, 4)[0, 1, 0, 2]
    moved = model.net.W_E[ONE[0, 1]] @ attn[0].W_V[3] @ attn[0].W_O[3] * maps[0].rows(2, 3)[0, 3, 0, 1]
    assert abs(below["value"] - float(moved @ read)) < 1e-12


@pytest.mark.parametrize("skip", [False, True])
def test_features_stand_for_mlps_and_for_the_stream(skip):
    model = deep()
    coder = coder_at("blocks.2.attn.hook_z", 24)
    plain = recursive_attribution(coder, model, ONE, 3, -1, threshold=0, nodes=10**6)
    mlp = coder_at("blocks.0.ln2.hook_normalized", 16, 12, "blocks.0.hook_mlp_out", skip=skip)
    found = recursive_attribution(coder, model, ONE, 3, -1, coders=[mlp], threshold=0, nodes=10**6)
    assert found.error < 1e-10
    assert torch.equal(found.upstream, plain.upstream)
    leaves, whole = found.leaves(), plain.leaves()
    kinds = {"feature", "decoder bias", "error", *(["skip"] if skip else [])}
    assert kinds <= set(leaves["kind"])
    assert not ((leaves["kind"] == "mlp") & (leaves["layer"] == 0)).any()
    for position in range(4):
        parts = leaves[leaves["kind"].isin(kinds) & (leaves["position"] == position)]["value"].sum()
        mine = whole[(whole["kind"] == "mlp") & (whole["layer"] == 0) & (whole["position"] == position)]["value"].sum()
        assert abs(parts - mine) < 1e-10
    stream = coder_at("blocks.1.hook_resid_post", 16, 12)
    ends = recursive_attribution(coder, model, ONE, 3, -1, coders={"blocks.1.hook_resid_post": stream}, threshold=0)
    assert ends.error < 1e-10
    assert int(ends.depth.max()) == 2
    run = model.run(ONE, ["blocks.1.hook_resid_post"]).acts["blocks.1.hook_resid_post"][0]
    active = stream.encode(run).nonzero()
    frame = ends.frame()
    features = frame[frame["kind"] == "feature"]
    assert {(p, i) for p, i in zip(features["position"], features["index"], strict=True)} <= {
        tuple(x) for x in active.tolist()
    }


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_hugging_face(name):
    model = hugging_face(name).model
    coder = coder_at("blocks.1.attn.hook_z", 32)
    found = recursive_attribution(coder, model, torch.arange(6)[None] + 3, 1, -1, threshold=0, nodes=10**6)
    assert found.error < 1e-6
    assert abs(found.leaves()["value"].sum() - found.pre) < 1e-6
    assert abs(float(found.upstream.sum()) + found.constant - found.pre) < 1e-6


def test_float32_page_and_file(tmp_path):
    model = wb.load("tiny-softmax")
    coder = coder_at("blocks.3.attn.hook_z", 128, 64, dtype=torch.float32)
    tokens = model.tokens("the cat sat on the mat and the cat sat")
    tokens = wb.Tokens(tokens.ids, tokens.mask, (("<b>", *tokens.labels[0][1:]),))
    found = wb.recursive_attribution(coder, model, tokens, 5, threshold=0.02)
    size = max(1.0, float(found.value[1:].abs().sum()))
    assert found.error < 1e-5 * size
    page = found._repr_html_()
    assert "<b>: " not in page
    assert "&lt;b&gt;" in page
    assert found.plot().get_xlabel() == "token"
    assert len(wb.load_result(found.save(tmp_path / "tree")).table) == len(found.value)


def test_refusals():
    model, coder = deep(), coder_at("blocks.1.attn.hook_z", 24)
    with pytest.raises(WorkbenchError, match="depth"):
        recursive_attribution(coder, model, ONE, 0, depth=0)
    with pytest.raises(WorkbenchError, match="threshold"):
        recursive_attribution(coder, model, ONE, 0, threshold=1.5)
    with pytest.raises(WorkbenchError, match="nodes"):
        recursive_attribution(coder, model, ONE, 0, nodes=1)
    with pytest.raises(UnknownName, match="position"):
        recursive_attribution(coder, model, ONE, 0, 4)
    with pytest.raises(UnknownName, match="feature"):
        recursive_attribution(coder, model, ONE, 99)
    with pytest.raises(Refused, match="nothing of it goes there"):
        recursive_attribution(coder, model, ONE, 0, coders=[coder_at("blocks.1.hook_mlp_out", 16)])
    with pytest.raises(Refused, match="hook_mlp_out"):
        recursive_attribution(coder, model, ONE, 0, coders=[coder_at("blocks.0.hook_attn_out", 16)])
    with pytest.raises(WorkbenchError, match="two coders"):
        recursive_attribution(coder, model, ONE, 0, coders=[coder_at("blocks.0.hook_mlp_out", 16)] * 2)
    with pytest.raises(Refused, match="no sum"):
        recursive_attribution(coder_at("blocks.1.hook_mlp_out", 16), model, ONE, 0)
    convolved = make(replace(CONFIG, mixer="rcmha", kv_heads=None, positions="none"))
    with pytest.raises(Refused, match="no weights of single sources"):
        recursive_attribution(coder, convolved, ONE, 0)
