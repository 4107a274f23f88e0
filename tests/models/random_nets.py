"""Sizes, inputs and random weights of the tiny models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

V, D, H, G, L, F = 61, 32, 4, 2, 2, 48
DECODER = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": L,
    "num_attention_heads": H,
    "num_key_value_heads": G,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": L,
    "num_attention_heads": H,
    "image_size": 16,
    "patch_size": 4,
}


def ids(batch: int = 2, length: int = 11, low: int = 3) -> torch.Tensor:
    return torch.randint(low, V, (batch, length), generator=torch.Generator().manual_seed(7))


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(8))


def net(cls: Any, config: Any, *, implementation: str | None = None, dtype: torch.dtype = torch.float64) -> Any:
    """A random model: weights far from their small initial values, so that patterns are not flat."""
    torch.manual_seed(0)
    made = cls._from_config(config, attn_implementation=implementation) if implementation else cls(config)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.2)
            elif "sink" in name or name.endswith("bias"):
                weight.normal_(0, 0.5)
    if getattr(made.config, "_experts_implementation", None) is not None:
        made.set_experts_implementation("eager")
    return made.to(dtype).eval()


def decoder(cls: str, config: str, **options: Any) -> Callable[..., Any]:
    def make(implementation: str | None = None, dtype: torch.dtype = torch.float64) -> Any:
        return net(
            getattr(hf, cls), getattr(hf, config)(**{**DECODER, **options}), implementation=implementation, dtype=dtype
        )

    return make


def plain(cls: str, config: str, **options: Any) -> Callable[..., Any]:
    def make(implementation: str | None = None, dtype: torch.dtype = torch.float64) -> Any:
        return net(getattr(hf, cls), getattr(hf, config)(**options), implementation=implementation, dtype=dtype)

    return make
