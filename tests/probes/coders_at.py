"""Random coders of sites, in float64, with biases that are not 0."""

import torch

from workbench.coders.catalogue import make_coder


def coder_at(reads, width, features=9, writes=None, seed=0, dtype=torch.float64, **options):
    """An autoencoder of a site; with ``writes`` a transcoder."""
    torch.manual_seed(seed)
    out = {} if writes is None else {"d_out": options.pop("d_out", width)}
    coder = make_coder("relu", width, features, **out, **options)
    with torch.no_grad():
        coder.b_dec.normal_()
        coder.b_enc.normal_(0, 0.3)
        if coder.W_skip is not None:
            coder.W_skip.normal_(0, 0.2)
    coder.about.update(reads=reads, writes=writes or reads)
    return coder.to(dtype)


def transcoders(model, features=8, skip=False, seed=0):
    """One of every layer, behind the norm before the MLP."""
    names = [
        (f"blocks.{layer}.ln2.hook_normalized", f"blocks.{layer}.hook_mlp_out") for layer in range(model.shape.layers)
    ]
    return {
        layer: coder_at(reads, model.shape.width, features, writes, seed + layer, skip=skip)
        for layer, (reads, writes) in enumerate(names)
    }
