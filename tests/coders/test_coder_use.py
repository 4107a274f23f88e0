"""Warnings where a coder is used on what it was not trained for: each alone, by one line."""

import warnings

import pytest
import torch

from workbench.coders.catalogue import make_coder
from workbench.coders.folder import load_coder, save_coder
from workbench.coders.use import check_use, coder_warnings


def fitting(**about: object):
    coder = make_coder("relu", 16, 8)
    coder.about = {"model": "random", "reads": ["blocks.1.hook_resid_pre"], "context": 64, **about}
    return coder


def test_nothing_is_said_where_all_fits(small_model):
    assert coder_warnings(fitting(), small_model) == []
    assert coder_warnings(fitting(), small_model, "blocks.1.hook_resid_pre", context=64) == []
    assert coder_warnings(make_coder("relu", 16, 8), small_model, "blocks.0.hook_mlp_out", 1000, True) == []
    assert coder_warnings(fitting(model="someone/Random"), small_model) == []
    assert coder_warnings(fitting(prepend_bos=True), small_model, prepend_bos=True) == []


@pytest.mark.parametrize(
    ("about", "use", "line"),
    [
        ({"model": "gpt2"}, {}, "trained on gpt2 and is used on random"),
        ({}, {"site": "blocks.0.hook_resid_pre"}, "trained to read blocks.1.hook_resid_pre and is used at blocks.0"),
        ({"reads": ["blocks.7.hook_resid_pre"]}, {}, "random has layers 0 to 1"),
        ({"reads": ["blocks.1.attn.hook_z[1]"]}, {}, "reads 16 numbers at blocks.1.attn.hook_z.1.; random has 8 there"),
        ({}, {"context": 65}, "contexts of 64 tokens and is used on 65"),
        ({"prepend_bos": True}, {"prepend_bos": False}, "with a BOS token in front; here they are read without"),
        ({"prepend_bos": False}, {"prepend_bos": True}, "without a BOS token in front; here they are read with"),
        ({"saelens": {"metadata": {"seqpos_slice": [5, None]}}}, {}, "seqpos_slice"),
        ({"saelens": {"metadata": {"exclude_special_tokens": True}}}, {}, "exclude_special_tokens"),
        ({"saelens": {"metadata": {"model_from_pretrained_kwargs": {"fold_ln": True}}}}, {}, "loaded with .*fold_ln"),
    ],
)
def test_each_misfit_is_one_line(small_model, about, use, line):
    found = coder_warnings(fitting(**about), small_model, **use)
    assert len(found) == 1
    with pytest.warns(UserWarning, match=line):
        check_use(fitting(**about), small_model, **use)


def test_half_precision_is_told(small_model):
    assert "bfloat16" in coder_warnings(fitting().to(torch.bfloat16), small_model)[0]


def test_tokenization_is_compared_where_nobody_says(small_model):
    """The bundled tokenizer says whether it puts BOS in front."""
    bos = small_model.tokenizer.bos_token_id
    begins = bos is not None and int(small_model.tokens("a").ids[0, 0]) == bos
    lines = coder_warnings(fitting(prepend_bos=not begins), small_model)
    assert len(lines) == (bos is not None)
    assert coder_warnings(fitting(prepend_bos=begins), small_model) == []


def test_loading_for_a_model_warns(tmp_path, small_model):
    save_coder(fitting(model="gpt2"), tmp_path / "c")
    with pytest.warns(UserWarning, match="trained on gpt2"):
        load_coder(tmp_path / "c", model=small_model)
    save_coder(fitting(), tmp_path / "d")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_coder(tmp_path / "d", model=small_model)
