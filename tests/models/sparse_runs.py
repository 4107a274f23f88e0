"""Sparse, low-rank, differential and Fourier models for tests, and what their layers compute, read without us."""

import functools
from contextlib import ExitStack, contextmanager

import builders as B
import torch
from sparse_nets import INTERFACE_NETS, SPARSE_NETS

from workbench.mixers.spectral import fourier_values
from workbench.models.hf import HFModel

LENGTHS = {"big_bird-sparse": 23, "nystromformer": 15, "nystromformer-full": 16}
IMAGES = ("swin", "swinv2", "donut", "maskformer_swin", "swin2sr")
TEXTS = tuple(name for name in SPARSE_NETS if name not in IMAGES)


def made(name, dtype=torch.float64):
    """A model of its own, as some of these change with the length of their input."""
    net = {**B.NETS, **SPARSE_NETS, **INTERFACE_NETS}[name](None, dtype)
    return HFModel(net, name=name), B.inputs(name, dtype) if name in IMAGES else B.ids(2, LENGTHS.get(name, 11))


def answer(run):
    return run.output if run.logits is None else run.logits


@contextmanager
def looking(model):
    """Values and outputs of every layer as the layer itself has them, ``[B, H, N, E]`` by layer, read without us."""
    seen = {}

    def keep(key, name, value):
        seen.setdefault(key, {})[name] = value.detach()

    with ExitStack() as undo:
        for layer in model._layers:
            module, key = layer.module, layer.key
            kind = type(module).__name__
            inner = module.self if kind == "BigBirdAttention" else module

            def after(part, hook):
                undo.callback(part.register_forward_hook(hook).remove)

            def values(m, i, o, key=key, name="v", turned=kind == "LongformerSelfAttention"):
                keep(key, name, (o.transpose(0, 1) if turned else o).unflatten(-1, (4, -1)).transpose(1, 2))

            def output(m, i, o, key=key):
                z = o.hidden_states if hasattr(o, "hidden_states") else o[0]
                keep(key, "z", z.unflatten(-1, (4, -1)).transpose(1, 2))

            def halves(m, i, o, key=key):
                keep(key, "v", torch.cat(o.unflatten(-1, (2, -1)).unbind(-2), -1)[:, None])

            if kind == "FNetBasicFourierTransform":
                after(module, lambda m, i, o, key=key: keep(key, "v", fourier_values(i[0])))
                after(module, lambda m, i, o, key=key: keep(key, "z", o[0][:, None]))
            elif kind == "DiffLlamaAttention":
                after(module.v_proj, halves)
                after(module.groupnorm, lambda m, i, o, key=key: keep(key, "z", i[0].transpose(1, 2)))
            else:
                after(inner.value, values)
                after(inner, output)
            if hasattr(module, "value_global"):
                after(module.value_global, functools.partial(values, key=key, name="all"))
        yield seen
