"""The small sparse autoencoder of the discrete method, and the code of a vector: its strongest feature."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.errors import Refused, WorkbenchError


class Coder:
    """A ReLU autoencoder f = ReLU((x - b) W_e + b_e), y = f W_d + b with unit rows in W_d ``[F, D]``."""

    def __init__(self, width: int, features: int, generator: torch.Generator) -> None:
        decoder = torch.randn(features, width, generator=generator)
        self.W_d = decoder / decoder.norm(dim=1, keepdim=True)
        self.W_e = self.W_d.T.clone()
        self.b_e, self.b = torch.zeros(features), torch.zeros(width)

    def parameters(self) -> list[Tensor]:
        return [self.W_d, self.W_e, self.b_e, self.b]


def encode(coder: Coder, x: Tensor) -> Tensor:
    """Feature activations ``[..., F]``."""
    return torch.relu((x - coder.b) @ coder.W_e + coder.b_e)


def codes_of(coder: Coder, x: Tensor, silent: float = 0.0) -> Tensor:
    """The strongest feature of every vector, ``[...]``, or feature 0 where none is active, as published. Vectors whose
    strongest activation is below ``silent`` * sqrt(width) share one further code, F: they say nothing."""
    strongest = encode(coder, x).max(-1)
    codes = strongest.indices
    return torch.where(strongest.values < silent * x.shape[-1] ** 0.5, coder.b_e.shape[0], codes) if silent else codes


def trained_before(name: str, width: int) -> Coder:
    """The coder in a folder, or the bundled one of that name; refuses other kinds and another width."""
    from workbench.coders.bundled import coder_folder
    from workbench.coders.folder import load_coder

    found = load_coder(coder_folder(name))
    kind = getattr(found, "kind", type(found).__name__)
    if kind not in ("discrete", "relu") or not found.centred:
        raise Refused(f"{name} is a {kind} coder; the strongest feature is a code in discrete and ReLU autoencoders")
    if found.d_in != width or found.d_out != width:
        raise WorkbenchError(
            f"{name} reads width {found.d_in}; outputs of heads here have width {width} "
            "(pooling='mean' gives that of the model)"
        )
    coder = Coder(width, found.features, torch.Generator())
    coder.W_d, coder.W_e = found.W_dec.detach().float(), found.W_enc.detach().float()
    coder.b_e, coder.b = found.b_enc.detach().float(), found.b_dec.detach().float()
    return coder


@torch.enable_grad()
def train(x: Tensor, features: int, sparsity: float, epochs: int, rate: float, generator: torch.Generator) -> Coder:
    """Full-batch Adam on mean((y - x)^2) + sparsity * mean(|f|), decoder rows projected to norm 1 after every step."""
    coder = Coder(x.shape[1], features, generator)
    optimiser = torch.optim.Adam([p.requires_grad_() for p in coder.parameters()], lr=rate)
    for _ in range(epochs):
        f = encode(coder, x)
        loss = (f @ coder.W_d + coder.b - x).pow(2).mean() + sparsity * f.abs().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            coder.W_d /= coder.W_d.norm(dim=1, keepdim=True).clamp(min=1e-12)
    for parameter in coder.parameters():
        parameter.requires_grad_(False)
    return coder
