"""One causal attention call to be measured: its sizes, its random tensors, and the work that it is at least."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import peers
import torch
from machine import Way, seconds
from torch import Tensor

from workbench.kernels.mask import Mask

STATS = ("received", "entropy")
BOTH = ("sum", "max")
DENSITIES = (1.0, 0.5, 0.1)
"""Shares of blocks that block-sparse attention keeps."""
CODES = 32
"""Features that a token keeps in the sparse autoencoder's question."""


@dataclass(frozen=True)
class Setting:
    """Sizes of one causal attention call, and its random tensors."""

    tokens: int
    heads: int
    kv_heads: int
    width: int
    dtype: torch.dtype
    device: str
    block: int = 64
    free: float = 2**33
    """Bytes that a way may take; one that is known to need more is not run."""
    sdpa: str = ""
    """The only fused attention of torch to consider; empty: all of them."""

    def draw(self, seed: int, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=generator).to(self.device, self.dtype)

    @cached_property
    def q(self) -> Tensor:
        return self.draw(0, 1, self.heads, self.tokens, self.width)

    @cached_property
    def k(self) -> Tensor:
        return self.draw(1, 1, self.kv_heads, self.tokens, self.width)

    @cached_property
    def v(self) -> Tensor:
        return self.draw(2, 1, self.kv_heads, self.tokens, self.width)

    @property
    def pairs(self) -> float:
        """Visible (query, key) pairs of all heads."""
        return self.heads * self.tokens * (self.tokens + 1) / 2

    @property
    def attention(self) -> float:
        """Operations of q k^T and p v over the visible pairs."""
        return 4 * self.width * self.pairs

    @property
    def scores(self) -> float:
        return 2 * self.width * self.pairs

    @property
    def inputs(self) -> float:
        """Bytes of q, k and v read and the output written."""
        return (2 * self.heads + 2 * self.kv_heads) * self.tokens * self.width * self.dtype.itemsize

    @property
    def maps(self) -> float:
        """Bytes of one float32 block map."""
        return 4.0 * self.heads * (-(-self.tokens // self.block)) ** 2

    @property
    def rows(self) -> float:
        """Bytes of one float32 number per head and token."""
        return 4.0 * self.heads * self.tokens

    @cached_property
    def backend(self) -> peers.Backend:
        """The fastest fused attention of torch that runs on these tensors."""
        best: dict[str, tuple[float, peers.Backend]] = {}
        for backend in peers.backends(self.device):
            if self.sdpa not in ("", backend.name):
                continue
            call = bind(backend.run, self.q, self.k, self.v)
            try:
                call()
                best[backend.name] = (min(seconds(call, self.device) for _ in range(3)), backend)
            except Exception:  # what does not run here is not the fastest
                continue
        if not best:
            raise SystemExit(f"no fused attention of torch runs on {self.device} with {self.dtype}")
        return min(best.values(), key=lambda pair: pair[0])[1]


def bind(function: Callable[..., Any], *arguments: Any, **options: Any) -> Callable[[], Any]:
    return lambda: function(*arguments, **options)


def plain(at: Setting, backend: peers.Backend | None = None) -> Way:
    backend = backend or at.backend
    return Way(f"SDPA {backend.name}", bind(backend.run, at.q, at.k, at.v), at.attention, at.inputs)


def softmax(at: Setting, backend: peers.Backend | None = None) -> Way:
    """``plain`` where it is one of the answers, not only the floor."""
    return replace(plain(at, backend), read=lambda found: {"output": found[0]})


def optional(way: Way, why_not: str) -> Way:
    return replace(way, call=None, remark=why_not) if why_not else way


def too_large(at: Setting, dense: int, what: str) -> str:
    """Why a way that holds ``dense`` bytes per pair of a head is not run, empty if it fits."""
    need = float(dense) * at.heads * at.tokens**2
    return f"not run: {what} needs {need / 2**30:.0f} GiB, {at.free / 2**30:.0f} are free" if need > at.free else ""


def answers(found: Any) -> dict[str, Tensor]:
    """Result dataclasses and dicts as named numbers."""
    if isinstance(found, dict):
        return found
    named = {name: getattr(found, name, None) for name in ("output", "received", "entropy")}
    return {**{n: t for n, t in named.items() if t is not None}, **getattr(found, "blocks", {})}


def decay_of(at: Setting) -> Tensor:
    return -0.05 * at.draw(3, 1, at.heads, at.tokens).float().abs()


def delta_inputs(at: Setting) -> tuple[Tensor, ...]:
    """q, k, v, beta, log decay as a gated delta net has them: one head for each, keys of length 1."""
    q, k, v = at.q, peers.repeated(at.k, at.heads), peers.repeated(at.v, at.heads)
    unit = torch.nn.functional.normalize
    beta = at.draw(4, 1, at.heads, at.tokens).sigmoid()
    return unit(q, dim=-1), unit(k, dim=-1), v, beta, decay_of(at).to(at.dtype)


def kept_blocks(at: Setting, density: float) -> Mask:
    """A causal mask that keeps the diagonal and, at random, about ``density`` of the blocks below it."""
    side = -(-at.tokens // at.block)
    lower = torch.ones(side, side, dtype=torch.bool).tril()
    drawn = torch.rand(1, at.heads, side, side, generator=torch.Generator().manual_seed(5)) < density
    keep = (drawn | torch.eye(side, dtype=torch.bool)) & lower
    return Mask(causal=True, blocks=keep.to(at.device), side=at.block)


def bind_density(density: float) -> Callable[[Any], dict[str, Tensor]]:
    """The answers of attention over some blocks, under names of their own."""
    return lambda found: {f"{name} at {density}": value for name, value in answers(found).items()}


def code_sizes(at: Setting) -> tuple[int, int]:
    """Width of the activations and number of features."""
    return at.heads * at.width, 16 * at.heads * at.width


def code_inputs(at: Setting) -> tuple[Tensor, Tensor, Tensor]:
    """Activations ``[N, D]``, encoder ``[D, F]``, decoder ``[F, D]``."""
    d, f = code_sizes(at)
    return at.draw(6, at.tokens, d), at.draw(7, f, d).t() * d**-0.5, at.draw(8, f, d) * d**-0.5
