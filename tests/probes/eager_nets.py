"""A LLaVA whose patterns can be edited: attention as transformers computes it eagerly."""

from __future__ import annotations

import torch
import transformers as hf
from random_nets import DECODER, VISION, net, noise

from workbench.models.hf import HFModel


def eager_llava() -> tuple[HFModel, dict[str, torch.Tensor]]:
    """Random weights, and a text with its 16 image tokens from token 2 on."""
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION),
        text_config=hf.LlamaConfig(**DECODER),
        image_token_id=5,
        vision_feature_layer=-2,
        image_seq_length=16,
    )
    made = net(hf.LlavaForConditionalGeneration, config, implementation="eager")
    ids = torch.tensor([[1, 7, *[5] * 16, 8, 9, 10]])
    return HFModel(made, name="llava"), {"input_ids": ids, "pixel_values": noise(1, 3, 16, 16).double()}
