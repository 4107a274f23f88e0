"""Tiny models whose softmax is sparse, of low rank, a difference or in windows, and of FNet, which has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from random_nets import DECODER, D, F, H, L, V, decoder, net, plain

_BERT = {name: value for name, value in DECODER.items() if name != "num_key_value_heads"}
REFORMER: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": D,
    "feed_forward_size": F,
    "attention_head_size": 8,
    "num_attention_heads": H,
    "local_attn_chunk_length": 4,
    "lsh_attn_chunk_length": 4,
    "num_hashes": 2,
    "num_buckets": 4,
    "hash_seed": 0,
    "axial_pos_shape": [8, 8],
    "axial_pos_embds_dim": [16, 16],
    "max_position_embeddings": 64,
}
_WINDOWS: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}


def _maskformer_swin(implementation: str | None = None, dtype: torch.dtype = torch.float64) -> Any:
    """By its own name: the package does not list the model."""
    from transformers.models.maskformer.modeling_maskformer_swin import MaskFormerSwinModel

    return net(MaskFormerSwinModel, hf.MaskFormerSwinConfig(**_WINDOWS), dtype=dtype)


SPARSE_NETS: dict[str, Callable[..., Any]] = {
    "diffllama": decoder("DiffLlamaForCausalLM", "DiffLlamaConfig"),
    "longformer": plain("LongformerForMaskedLM", "LongformerConfig", **_BERT, attention_window=4),
    "big_bird": plain("BigBirdForMaskedLM", "BigBirdConfig", **_BERT, attention_type="original_full", sep_token_id=2),
    "big_bird-sparse": plain(
        "BigBirdForMaskedLM", "BigBirdConfig", **_BERT, block_size=2, num_random_blocks=2, sep_token_id=2
    ),
    "reformer": plain(
        "ReformerForMaskedLM", "ReformerConfig", **REFORMER, attn_layers=["local", "lsh"], is_decoder=False
    ),
    "reformer-causal": plain(
        "ReformerModelWithLMHead", "ReformerConfig", **REFORMER, attn_layers=["local", "lsh"], is_decoder=True
    ),
    "nystromformer": plain(
        "NystromformerForMaskedLM",
        "NystromformerConfig",
        **_BERT,
        num_landmarks=5,
        segment_means_seq_len=15,
        conv_kernel_size=3,
    ),
    "nystromformer-full": plain(
        "NystromformerForMaskedLM",
        "NystromformerConfig",
        **_BERT,
        num_landmarks=16,
        segment_means_seq_len=16,
        conv_kernel_size=5,
    ),
    "fnet": plain(
        "FNetForMaskedLM",
        "FNetConfig",
        vocab_size=V,
        hidden_size=D,
        num_hidden_layers=L,
        intermediate_size=F,
        max_position_embeddings=64,
    ),
    "swinv2": plain("Swinv2Model", "Swinv2Config", **_WINDOWS),
    "donut": plain("DonutSwinModel", "DonutSwinConfig", **_WINDOWS),
    "maskformer_swin": _maskformer_swin,
    "swin2sr": plain(
        "Swin2SRModel", "Swin2SRConfig", **{**_WINDOWS, "image_size": 16, "patch_size": 1, "num_heads": [2, 2]}
    ),
}
"""Families whose mixing a recorder has to read, beside those with states."""

INDEXED: dict[str, Any] = {
    "num_key_value_heads": H,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "index_n_heads": 3,
    "index_head_dim": 8,
    "index_topk": 4,
}
INTERFACE_NETS: dict[str, Callable[..., Any]] = {
    "deepseek_v32": decoder("DeepseekV32ForCausalLM", "DeepseekV32Config", **INDEXED, first_k_dense_replace=1),
    "glm_moe_dsa": decoder("GlmMoeDsaForCausalLM", "GlmMoeDsaConfig", **INDEXED, mlp_layer_types=["dense", "sparse"]),
    "gemma3n": decoder(
        "Gemma3nForCausalLM",
        "Gemma3nTextConfig",
        head_dim=8,
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        sliding_window=4,
        vocab_size_per_layer_input=V,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 4,
    ),
    "albert": plain(
        "AlbertForMaskedLM", "AlbertConfig", **{**_BERT, "num_hidden_layers": 3}, embedding_size=16, num_hidden_groups=2
    ),
    "bart": plain(
        "BartForCausalLM",
        "BartConfig",
        vocab_size=V,
        d_model=D,
        encoder_layers=L,
        decoder_layers=L,
        encoder_attention_heads=H,
        decoder_attention_heads=H,
        encoder_ffn_dim=F,
        decoder_ffn_dim=F,
        max_position_embeddings=64,
    ),
}
"""Families that go through the attention interface and do more than the interface sees."""
