"""Models with random transcoders for the tests of attribution graphs."""

from __future__ import annotations

import torch
from builders import hugging_face

import workbench as wb
from workbench.coders.catalogue import make_coder
from workbench.coders.cross_layer_kinds import make_cross_layer
from workbench.models.native import NativeModel
from workbench.models.native_net import NativeConfig, NativeNet

READS, MID, WRITES = "blocks.{l}.ln2.hook_normalized", "blocks.{l}.hook_resid_mid", "blocks.{l}.hook_mlp_out"


def native(seed=0, dtype=torch.float64, **options):
    """A random model whose norms, biases and weights are all at work."""
    sizes = {"layers": 3, "heads": 4, "kv_heads": 2, "width": 12, "head_width": 6, "vocab": 11, "mlp_width": 8}
    torch.manual_seed(seed)
    net = NativeNet(NativeConfig(**{**sizes, "context": 64, **options})).to(dtype).eval()
    with torch.no_grad():
        for name, value in net.named_parameters():
            if name.endswith(".w"):
                value.copy_(torch.rand_like(value) + 0.5)
            elif ".b_" in name:
                value.normal_(std=0.5)
    return NativeModel(net)


def model_of(name, dtype=torch.float64):
    """A bundled or compiled model, or ``hf:<family>``."""
    if name.startswith("hf:"):
        return hugging_face(name[3:], dtype=dtype).model
    model = wb.load(name)
    model.net.to(dtype)
    return model


def transcoders(
    model, kind="topk", features=40, seed=0, skip=False, reads=READS, dtype=torch.float64, layers=None, **options
):
    """A random transcoder for each layer, with biases."""
    width, made = model.shape.width, {}
    options = {"k": 5} if kind == "topk" and not options else options
    for layer in range(model.shape.layers) if layers is None else layers:
        generator = torch.Generator().manual_seed(seed * 100 + layer)
        coder = make_coder(
            kind, width, features, d_out=width, skip=skip, centred=False, generator=generator, **options
        ).to(dtype)
        with torch.no_grad():
            for weight, size in ((coder.b_enc, 0.5), (coder.b_dec, 0.2), (coder.W_skip, 0.1)):
                if weight is not None:
                    weight.copy_(torch.randn(weight.shape, generator=generator) * size)
            coder.W_dec.mul_(0.4)
        coder.about = {"model": model.name, "reads": reads.format(l=layer), "writes": WRITES.format(l=layer)}
        made[layer] = coder
    return made


def cross_layer(model, kind="jumprelu", features=20, skip=False, dtype=torch.float64):
    coder = make_cross_layer(kind, model.shape.layers, model.shape.width, features, skip=skip).to(dtype)
    with torch.no_grad():
        coder.b_enc.normal_(std=0.3)
        coder.b_dec.normal_(std=0.2)
        if skip:
            coder.W_skip.normal_(std=0.1)
    return coder


def ids(model, length=9, seed=0):
    """Random token ids ``[T]``."""
    return torch.randint(0, model.shape.vocab, (length,), generator=torch.Generator().manual_seed(seed))


def sums(graph):
    """Incoming weights of every node, ``[N]``."""
    return graph.weight.new_zeros(len(graph.nodes)).index_add(0, graph.target, graph.weight)


def gaps(graph):
    """What the identity of every node with inputs is off by, ``[N]``."""
    c = graph.nodes.columns
    off = sums(graph) + c["omitted"] + c["bias"] + c["b_enc"] - c["pre"]
    return off[~off.isnan()]
