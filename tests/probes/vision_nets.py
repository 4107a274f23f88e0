"""Tiny vision models with random weights, their inputs and the layers of their maps; and maps planted on a grid."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from random_nets import DECODER, VISION, net, noise

from workbench.models.hf import HFModel

__all__ = ["DECODER", "VISION", "by_hops", "llava", "vision"]

_DINO = {k: v for k, v in VISION.items() if k != "intermediate_size"}
_TEXT = {k: v for k, v in DECODER.items() if k not in ("num_key_value_heads", "pad_token_id")}
_NETS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("ViTForImageClassification", "ViTConfig", VISION | {"num_labels": 5}),
    "deit": ("DeiTModel", "DeiTConfig", VISION),
    "dinov2": ("Dinov2Model", "Dinov2Config", _DINO),
    "dinov2-registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", _DINO | {"num_register_tokens": 4}),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", VISION | {"num_register_tokens": 4}),
    "clip-vision": ("CLIPVisionModel", "CLIPVisionConfig", VISION),
    "clip": ("CLIPModel", "CLIPConfig", {"text_config": _TEXT, "vision_config": VISION, "projection_dim": 16}),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", VISION),
}


def vision(name: str) -> tuple[HFModel, dict[str, torch.Tensor], tuple[int | str, ...]]:
    """The model in float64, what it runs on, and the layers that look at the image: a 4 x 4 grid of patches of 4 pixels."""
    cls, config, options = _NETS[name]
    made = net(getattr(hf, cls), getattr(hf, config)(**options))
    inputs = {"pixel_values": noise(2, 3, 16, 16).double()}
    if name == "clip":
        return (
            HFModel(made, name=name),
            {"input_ids": torch.tensor([[1, 4, 2]] * 2), **inputs},
            ("vision.0", "vision.1"),
        )
    return HFModel(made, name=name), inputs, (0, 1)


def llava() -> tuple[HFModel, dict[str, torch.Tensor]]:
    """A LLaVA of random weights, and a text with its 16 image tokens from token 2 on."""
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION),
        text_config=hf.LlamaConfig(**DECODER),
        image_token_id=5,
        vision_feature_layer=-2,
        image_seq_length=16,
    )
    made = net(hf.LlavaForConditionalGeneration, config)
    ids = torch.tensor([[1, 7, *[5] * 16, 8, 9, 10]])
    return HFModel(made, name="llava"), {"input_ids": ids, "pixel_values": noise(1, 3, 16, 16).double()}


def by_hops(rows: int, cols: int, hops: int) -> torch.Tensor:
    """Rows ``[N, N]`` that spread evenly over the patches at one Chebyshev distance; on themselves where there is none."""
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(cols)).reshape(-1, 2)
    ring = ((places[:, None] - places).abs().amax(-1) == hops).double()
    alone = ring.sum(1) == 0
    ring[alone, alone] = 1.0
    return ring / ring.sum(1, keepdim=True)
