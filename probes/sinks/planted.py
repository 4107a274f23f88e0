"""Streams, maps and a model with sinks put in by hand, for the examples of the analyses of sinks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.maps import AttentionMap
from workbench.models.protocol import Tokens
from workbench.run import Activations, Maps, Provenance, Run
from workbench.sites import Site

if TYPE_CHECKING:
    from workbench.models.native import NativeModel

FIRST, TRIGGER, TEXT = 0, 1, (0, 2, 3, 4, 1, 5, 6, 7, 8, 9, 10, 11)
_CHAIN = (2, 3, 4, 1, 5, 6, 7, 8, 9, 10, 11)
_HEIGHT = 200.0


def planted_stream() -> Tensor:
    """A stream ``[13, 24, 64]`` of 12 blocks: primary sink (1, 10) at position 0, secondary (4, 5) at 9 and (6, 4) at 15."""
    generator = torch.Generator().manual_seed(0)
    stream = torch.randn(13, 24, 64, generator=generator)
    direction = torch.randn(64, generator=generator)
    for position, start, lifetime, norm in ((0, 1, 10, 300.0), (9, 4, 5, 120.0), (15, 6, 4, 80.0)):
        stream[1 + start : 1 + start + lifetime, position] += norm * direction / direction.norm()
    return stream


def planted_run() -> Run:
    """The planted stream as a run of causal maps that weigh every key by the norm of its stream, so that secondary sinks take
    attention from the primary one."""
    stream = planted_stream()
    blocks, (tokens, _) = len(stream) - 1, stream.shape[1:]
    maps: dict[int | str, AttentionMap] = {}
    for layer in range(1, blocks):
        weight = stream[layer].double().norm(dim=-1).expand(tokens, tokens).tril()
        maps[layer] = AttentionMap.from_dense((weight / weight.sum(-1, keepdim=True))[None, None])
    acts = {Site("resid_post", layer): stream[layer + 1][None] for layer in range(blocks)}
    provenance = Provenance("planted")
    return Run(Tokens.of(torch.arange(tokens)), acts=Activations(acts), maps=Maps(maps), provenance=provenance)


def planted_model() -> NativeModel:
    """Eight blocks that make, use and take down sinks; channel 2 is their direction.

    The MLP of block 0 writes a massive number at token 0, that of block 3 one at token 1 (the trigger), that of block 6 takes
    both down: levels (0, 6) and (3, 3). Heads look at channel 2 alone. While there is a sink they fetch nothing; without one they
    fetch the wrong contents, which spoils a prediction that is otherwise right: each token of ``TEXT`` is followed by the next.
    """
    from workbench.models.native import NativeConfig, NativeModel, NativeNet

    config = NativeConfig(
        layers=8, heads=1, width=16, head_width=12, vocab=12, mlp_width=1, positions="none", activation="relu", bias=True
    )  # fmt: skip
    net = NativeNet(config).requires_grad_(False).eval()
    for parameter in net.parameters():
        parameter.zero_()
    for name, parameter in net.named_parameters():
        if name.endswith(("ln1.w", "ln2.w", "ln_final.w")):
            parameter.fill_(1.0)
    content = 3 + torch.arange(12)
    net.W_E[torch.arange(12), content] = 1.0
    net.W_E[FIRST, 0] = net.W_E[TRIGGER, 1] = 2.0
    follower = dict(zip(_CHAIN, (*_CHAIN[1:], _CHAIN[0]), strict=True)) | {FIRST: _CHAIN[0]}
    unembed = net.unembed
    for token, after in follower.items():
        unembed[3 + token, after] = 4.0
    blocks: Any = net.blocks
    for layer, block in enumerate(blocks):
        attention, mlp = block.attn, block.mlp
        attention.b_Q[0, 0], attention.W_K[0, 2, 0] = 4.5, 1.0
        if 0 < layer < 7:
            attention.W_V[0, content, torch.arange(12)] = 1.0
            attention.W_O[0, torch.arange(12), content.roll(5)] = 1.0
        if layer in (0, 3, 6):
            source, threshold, height = {0: (0, 2.6, _HEIGHT), 3: (1, 2.0, _HEIGHT), 6: (2, 3.0, -0.98 * _HEIGHT)}[
                layer
            ]
            mlp.W_in[source, 0], mlp.b_in[0], mlp.W_out[0, 2] = 1.0, -threshold, height
    return NativeModel(net, name="planted sinks")


def planted_texts() -> Tensor:
    """Two texts ``[2, 12]`` of the planted model, with the trigger at positions 4 and 10."""
    turned = (FIRST, *_CHAIN[6:], *_CHAIN[:6])
    return torch.tensor([TEXT, turned])
