"""Coders whose answer is known, and small random models in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.coders.catalogue import make_coder
from workbench.coders.coder import Coder
from workbench.models.native import NativeModel
from workbench.models.native_net import NativeConfig, NativeNet


def tiny(seed: int = 0, vocab: int = 11, mixer: str = "softmax") -> NativeModel:
    """A random model of 2 layers x 2 heads, width 8, in float64."""
    torch.manual_seed(seed)
    config = NativeConfig(layers=2, heads=2, width=8, head_width=4, mlp_width=12, vocab=vocab, context=32, mixer=mixer)
    return NativeModel(NativeNet(config).double().eval(), name="tiny")


def coder_of(rows: Tensor, encoder: Tensor | None = None, bias: Tensor | None = None, **arguments) -> Coder:
    """A ReLU coder with decoder ``rows`` ``[F, D]``, encoder ``[D_in, F]`` (its transpose) and encoder bias."""
    encoder = rows.T if encoder is None else encoder
    wide = {} if len(encoder) == rows.shape[1] and not arguments.get("d_out") else {"d_out": rows.shape[1]}
    coder = make_coder("relu", len(encoder), len(rows), **{**wide, **arguments}).to(rows.dtype)
    with torch.no_grad():
        coder.W_dec.copy_(rows)
        coder.W_enc.copy_(encoder)
        coder.b_enc.zero_() if bias is None else coder.b_enc.copy_(bias)
        coder.b_dec.zero_()
    return coder


def identity(width: int, dtype: torch.dtype = torch.float64) -> Coder:
    """Rebuilds everything: W_enc = [I, -I]."""
    eye = torch.eye(width, dtype=dtype)
    return coder_of(torch.cat([eye, -eye]))


def nothing(width: int, dtype: torch.dtype = torch.float64) -> Coder:
    """Never active, and writes 0."""
    eye = torch.eye(width, dtype=dtype)
    return coder_of(eye, torch.zeros(width, width, dtype=dtype))


def random_coder(d_in: int, features: int, seed: int = 0, kind: str = "relu", **arguments) -> Coder:
    """A random coder in float64 with biases of its own."""
    coder = make_coder(kind, d_in, features, generator=torch.Generator().manual_seed(seed), **arguments).double()
    torch.manual_seed(seed)
    with torch.no_grad():
        coder.b_enc.normal_().mul_(0.3)
        coder.b_dec.normal_().mul_(0.3)
        if coder.W_skip is not None:
            coder.W_skip.normal_().mul_(0.2)
    return coder
