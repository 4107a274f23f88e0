"""What attribution graphs refuse, and that they say why."""

import pytest
import torch
from frozen_cases import cross_layer, ids, model_of, native, transcoders

import workbench as wb
from workbench.coders.catalogue import make_coder
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.probes.features.attribution_graph import attribution_graph


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "gemma2",
            "layer 0: attention's output as a projection of z is not what its parts add up to",
        ),  # a norm behind it
        ("olmo2", "its norms before attention and MLP are not known"),
        ("falcon", "its norms before attention and MLP are not known"),
        ("deepseek_v3", "no plain projections of the stream"),
        ("qwen3_next", "where its projections lie is not known"),
        ("bert", "does not predict next tokens"),
        ("t5", "where its norms and MLP lie is not known"),
    ],
)
def test_models_that_cannot_be_frozen(name, said):
    model = model_of(f"hf:{name}")
    with pytest.raises(Refused, match=said):
        attribution_graph(model, transcoders(model, layers=[0]), torch.tensor([3, 4, 5]))


def test_mixers_that_are_no_map_times_values():
    model = native(mixer="mamba")
    with pytest.raises(Refused, match="layer 0: the map times the values is not what its parts add up to"):
        attribution_graph(model, transcoders(model), ids(model))


def test_coders_of_other_places():
    model = native()
    prompt = ids(model)
    coders = transcoders(model)
    coders[1].about["reads"] = "blocks.1.hook_resid_post"
    with pytest.raises(
        Refused, match=r"layer 1 reads blocks\.1\.hook_resid_post; .* read blocks\.1\.ln2\.hook_normalized"
    ):
        attribution_graph(model, coders, prompt)
    coders = transcoders(model)
    coders[1].about["writes"] = "blocks.2.hook_mlp_out"
    with pytest.raises(Refused, match="writes"):
        attribution_graph(model, coders, prompt)
    with pytest.raises(Refused, match="reads"):
        attribution_graph(model, {0: transcoders(model)[1]}, prompt)
    across = cross_layer(model)
    across.about = {"reads": ["blocks.0.hook_resid_post"] * 3, "writes": ["blocks.0.hook_mlp_out"] * 3}
    with pytest.raises(Refused, match="reads"):
        attribution_graph(model, across, prompt)


def test_coders_of_other_widths_layers_and_kinds():
    model = native()
    prompt = ids(model)
    with pytest.raises(Refused, match="width 10 to 10; native has 12"):
        attribution_graph(model, {0: make_coder("topk", 10, 20, d_out=10, centred=False, k=2).double()}, prompt)
    with pytest.raises(Refused, match="takes its output bias off"):
        attribution_graph(model, {0: make_coder("topk", 12, 20, k=2).double()}, prompt)
    with pytest.raises(UnknownName, match="layer with an MLP"):
        attribution_graph(model, {7: transcoders(model)[1]}, prompt)
    with pytest.raises(WorkbenchError, match="no coder given"):
        attribution_graph(model, {}, prompt)
    with pytest.raises(WorkbenchError, match="got a list"):
        attribution_graph(model, list(transcoders(model).values()), prompt)
    with pytest.raises(WorkbenchError, match="got a Linear"):
        attribution_graph(model, {0: torch.nn.Linear(12, 12)}, prompt)
    with pytest.raises(Refused, match="of 3 layers"):
        attribution_graph(native(layers=2), cross_layer(model), prompt)
    with pytest.raises(Refused, match="maps width 12"):
        attribution_graph(native(width=16), cross_layer(model), prompt)


def test_coders_of_another_model_are_warned_about():
    model = native()
    coders = transcoders(model)
    coders[0].about["model"] = "another"
    with pytest.warns(UserWarning, match="'another'"):
        attribution_graph(model, coders, ids(model))


def test_nan_anywhere():
    model = native()
    for spoil in ("b_enc", "W_dec", "W_enc"):
        coders = transcoders(model, "relu")
        with torch.no_grad():
            getattr(coders[1], spoil)[..., :8] = float("nan")
        with pytest.raises(WorkbenchError, match="NaN"):
            attribution_graph(model, coders, ids(model))
    broken = native()
    with torch.no_grad():
        broken.net.blocks[1].attn.W_V.view(-1)[0] = float("nan")
    with pytest.raises(WorkbenchError, match="not what its parts add up to|NaN"):
        attribution_graph(broken, transcoders(broken), ids(broken))


def test_prompts_and_settings():
    model = native()
    coders = transcoders(model)
    with pytest.raises(WorkbenchError, match="one text"):
        attribution_graph(model, coders, torch.ones(2, 5, dtype=torch.int64))
    for wrong in (
        {"max_logits": 0},
        {"max_features": 0},
        {"batch": 0},
        {"mass": 0.0},
        {"mass": 1.5},
        {"position": 9},
        {"position": -1},
    ):
        with pytest.raises(WorkbenchError, match=next(iter(wrong))):
            attribution_graph(model, coders, ids(model), **wrong)
    for targets, said in (
        (11, "0 to 10"),
        ("Mary", "tokenizer"),
        ((1, 2, 3), "pair"),
        ((1, 1), "given twice"),
        (True, "token"),
    ):
        with pytest.raises(WorkbenchError, match=said):
            attribution_graph(model, coders, ids(model), targets=targets)
    named = model_of("tiny-softmax")
    with pytest.raises(WorkbenchError, match="token"):
        attribution_graph(named, transcoders(named), "Mary and John", targets="Mary and")
    with pytest.raises(UnknownName, match="xyzzy"):
        attribution_graph(named, transcoders(named), "Mary and John", targets="xyzzy")
    model.net.train()
    with pytest.raises(WorkbenchError, match="training mode"):
        attribution_graph(model, coders, ids(model))


def test_images():
    vision = wb.load("tiny-vit")
    with pytest.raises(Refused):
        attribution_graph(vision, {}, torch.zeros(1, 3, 16, 16))
