from dataclasses import replace

import pytest
import torch
from builders import hugging_face
from natives import make
from suppressor import copy_suppressor

import workbench as wb
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.probes.heads.kinds import KINDS, head_scores
from workbench.probes.heads.roles import ROLES, SCORES, head_roles, role_ablation
from workbench.results import load_result


@pytest.fixture(scope="module")
def compiled():
    return head_roles(wb.load("compiled-induction"), batches=1, sequences=4, length=32)


def test_compiled_heads_get_the_roles_they_were_built_for(compiled):
    assert compiled.labels[1][2] == ("induction", "content", "copying")
    assert compiled.labels[0][1] == ("previous", "positional")
    assert compiled.heads("induction")[0][:2] == (1, 2)
    assert [head[:2] for head in compiled.heads("copying")] == [(1, 2)]
    assert "write to no logit" in compiled.undefined["copying"]
    table = compiled.frame()
    assert list(table.columns[:3]) == ["layer", "head", "roles"]
    assert len(table) == 8
    assert {f"{s}{x}" for s in SCORES for x in ("", "_null", "_z")} < set(table.columns)


def test_the_roles_follow_their_thresholds(compiled):
    for layer, roles in compiled.labels.items():
        for h, own in enumerate(roles):
            score, gap = float(compiled.value["induction"][layer][h]), float(compiled.z["induction"][layer][h])
            assert ("induction" in own) == (score >= 0.3 and gap >= 3)
            assert ("positional" in own) == (float(compiled.value["positional"][layer][h]) >= 0.8)


def test_a_score_that_its_null_explains_is_no_role():
    model = wb.load("compiled-induction")
    scores = head_scores(model, kinds=tuple(KINDS), batches=1, sequences=4)
    chance = replace(scores, z={layer: torch.zeros_like(z) for layer, z in scores.z.items()})
    roles = head_roles(model, scores=chance, sequences=4, length=24)
    assert roles.labels[1][2] == ("content", "copying")
    assert not roles.heads("previous")


def test_removing_the_induction_head_ends_repetition_and_removing_others_does_not(compiled):
    model = wb.load("compiled-induction")
    curve = role_ablation(model, compiled, "induction", sequences=4, random=3).frame().iloc[0]
    assert curve["base"] < 2
    assert curve["ranked"] > curve["base"] + 3
    assert curve["random_high"] == pytest.approx(curve["base"], abs=0.01)


def test_the_trained_model_needs_its_induction_heads():
    model = wb.load("tiny-softmax")
    roles = head_roles(model)
    curve = role_ablation(model, roles, n=4, sequences=4, random=4).frame()
    assert curve["base"].iloc[0] < 0.1
    assert curve["ranked"].iloc[-1] > 3
    assert curve["random_high"].iloc[-1] < 1


def test_a_planted_copy_suppression_head_is_labelled():
    model = copy_suppressor()
    roles = head_roles(model, words=range(16), batches=1, sequences=4)
    assert "copy-suppression" in roles.labels[1][0]
    assert "suppressing" in roles.labels[1][0]
    assert "copying" in roles.labels[1][1]
    assert [head[:2] for head in roles.heads("copy-suppression")] == [(1, 0)]


def test_a_random_network_has_no_roles_of_copying_or_looking():
    roles = head_roles(make(), words=range(23), batches=1, sequences=4)
    found = {role for layer in roles.labels.values() for own in layer for role in own}
    assert not found & {"previous", "duplicate", "induction", "copy-suppression"}
    assert set(roles.frame()["roles"]) <= {
        "unclassified",
        "positional",
        "content",
        "copying",
        "suppressing",
        "first",
        "current",
        "positional, copying",
        "content, copying",
        "positional, suppressing",
        "content, suppressing",
    }


@pytest.mark.parametrize("name", ["llama", "gpt2", "deepseek_v3", "bert"])
def test_models_of_other_libraries_are_answered_as_far_as_they_go(name):
    model = hugging_face(name).model
    roles = head_roles(model, batches=1, sequences=2, length=24)
    assert len(roles.frame()) == model.shape.layers * model.shape.heads
    if name in ("deepseek_v3", "bert"):
        assert roles.undefined["copying"]
        assert roles.value["copying"][0].isnan().all()
    else:
        assert roles.value["copying"][0].isfinite().all()
    assert roles.value["positional"][0].isfinite().all()


def test_groups_of_heads():
    model = make()
    roles = head_roles(model, words=range(23), batches=1, sequences=2, per="kv")
    assert len(roles.frame()) == 4
    assert "per query head" in roles.undefined["positional"]
    with pytest.raises(Refused, match="groups of heads"):
        role_ablation(model, roles, "content")


def test_a_gate_is_looked_into_on_request():
    model = wb.load("tiny-gated")
    inside = head_roles(model, batches=1, sequences=4, raw=True)
    assert {head.layer for head in inside.heads("induction")} == {1}


def test_it_is_drawn_saved_and_refuses_what_it_does_not_know(compiled, tmp_path):
    assert "Induction" in compiled.plot().get_title()
    assert compiled.plot(score="copying").has_data()
    saved = load_result(compiled.save(tmp_path / "roles"))
    assert saved.frame()["roles"].tolist() == compiled.frame()["roles"].tolist()
    model = wb.load("compiled-induction")
    with pytest.raises(UnknownName, match="unclassified"):
        compiled.heads("mover")
    with pytest.raises(Refused, match="no head is duplicate; roles found: previous, induction"):
        role_ablation(model, compiled, "duplicate")
    with pytest.raises(WorkbenchError, match="missing: duplicate"):
        head_roles(model, scores=head_scores(model, kinds=("previous", "induction"), batches=1, sequences=2))
    assert len(ROLES) == len(set(ROLES))
