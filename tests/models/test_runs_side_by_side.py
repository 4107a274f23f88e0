"""A run inside another run, and runs in several threads, know nothing of each other."""

import threading

import builders as B
import pytest
import torch
import transformers as hf

from workbench.captures import capture
from workbench.models.hf import HFModel


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize(
    "name",
    [
        "hf-llama",
        "hf-falcon",
        "hf-diffllama",
        "hf-longformer",
        "hf-big_bird",
        "hf-deepseek_v32",
        "native-softmax",
        "bridge-llama",
    ],
)
@pytest.mark.parametrize("site", ["blocks.0.hook_resid_pre", "blocks.0.attn.hook_z"])
def test_a_run_started_by_an_edit_is_a_run_of_its_own(name, site):
    case = B.BUILDERS[name]()
    reads = ["blocks.1.hook_resid_post", site]
    alone = case.model.run(case.inputs, read=reads, maps=capture())
    inner = []

    def nested(x):
        inner.append(case.model.run(case.inputs, read=reads, maps=capture()))
        return 2 * x

    outer = case.model.run(case.inputs, edit={site: nested}, read=reads, maps=capture(), logits="last")
    assert len(inner) == 1
    assert torch.equal(inner[0].logits, alone.logits)
    assert torch.equal(inner[0].acts[site], alone.acts[site])
    assert torch.equal(outer.acts[site], 2 * alone.acts[site])
    assert torch.equal(inner[0].maps[1].dense(), alone.maps[1].dense())
    assert outer.logits.shape[1] == 1


def test_an_edit_may_generate_with_the_bare_model():
    case = B.hugging_face("llama")
    prompt, found = case.inputs[:1, :4], []
    expected = case.net.generate(prompt, max_new_tokens=3, do_sample=False)

    def nested(x):
        found.append(case.net.generate(prompt, max_new_tokens=3, do_sample=False))
        return 2 * x

    case.model.run(case.inputs, edit={"blocks.0.hook_resid_pre": nested}, maps=capture())
    assert torch.equal(found[0], expected)


def test_another_thread_sees_the_plain_model_during_a_run():
    case = B.hugging_face("llama")
    plain, seen = case.net(case.inputs[:, :5]).logits, []

    def forward():
        with torch.no_grad():
            seen.append(case.net(case.inputs[:, :5]).logits)

    def wait_for_other(x):
        thread = threading.Thread(target=forward)
        thread.start()
        thread.join()
        return 2 * x

    run = case.model.run(case.inputs, edit={"blocks.0.hook_resid_pre": wait_for_other}, logits="last", maps=capture())
    assert torch.equal(seen[0], plain)
    assert run.logits.shape[1] == 1


def test_models_that_share_a_config_run_in_threads():
    config = hf.LlamaConfig(**B.DECODER)
    nets = [hf.LlamaForCausalLM(config).eval() for _ in range(2)]
    models = [HFModel(nets[0]), HFModel(nets[1]), HFModel(nets[0])]
    before = config._attn_implementation_internal
    alone = [model.run(B.ids(), maps=capture(blocks=4)) for model in models]
    start, failures = threading.Barrier(len(models)), []

    def work(model, expected):
        try:
            start.wait()
            for _ in range(10):
                with torch.no_grad():
                    run = model.run(B.ids(), read=["blocks.1.hook_resid_pre"], maps=capture(blocks=4))
                assert torch.equal(run.logits, expected.logits)
                assert torch.equal(run.maps[1].blocks(4), expected.maps[1].blocks(4))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(models, alone, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert config._attn_implementation_internal is before
    assert type(config._attn_implementation_internal) is str
