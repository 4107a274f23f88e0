"""Tiny models of the families in which something else than softmax attention mixes the tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from random_nets import D, F, H, L, V, decoder, plain

_HYBRID: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"]}
_DELTA: dict[str, Any] = {
    **_HYBRID,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
    "linear_conv_kernel_dim": 3,
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
_SCAN = {
    "vocab_size": V,
    "hidden_size": D,
    "num_hidden_layers": L,
    "state_size": 4,
    "conv_kernel": 3,
    "expand": 2,
    "residual_in_fp32": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_SCAN2 = {
    "mamba_d_state": 4,
    "mamba_d_conv": 3,
    "mamba_expand": 2,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 4,
}


def _minimax(implementation: str | None = None, dtype: torch.dtype = torch.float64) -> Any:
    """With the decays of its lightning attention, which it makes in float32, in the type it runs in."""
    made = decoder(
        "MiniMaxForCausalLM",
        "MiniMaxConfig",
        head_dim=8,
        block_size=4,
        layer_types=_HYBRID["layer_types"],
        num_local_experts=2,
        num_experts_per_tok=1,
    )(implementation, dtype)
    lightning = made.model.layers[0].self_attn
    lightning.query_decay, lightning.key_decay, lightning.diagonal_decay = (
        torch.nn.Buffer(decay) for decay in lightning.decay_factors(lightning.slope_rate)
    )
    return made


STATE_NETS: dict[str, Callable[..., Any]] = {
    "qwen3_next": decoder("Qwen3NextForCausalLM", "Qwen3NextConfig", head_dim=8, **_DELTA, **_EXPERTS),
    "qwen3_5": decoder("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", head_dim=8, **_DELTA),
    "qwen3_5_moe": decoder("Qwen3_5MoeForCausalLM", "Qwen3_5MoeTextConfig", head_dim=8, **_DELTA, **_EXPERTS),
    "olmo_hybrid": decoder(
        "OlmoHybridForCausalLM",
        "OlmoHybridConfig",
        **{**_DELTA, "linear_num_key_heads": 4, "linear_allow_neg_eigval": True},
    ),
    "kimi_linear": decoder(
        "KimiLinearForCausalLM",
        "KimiLinearConfig",
        **_HYBRID,
        num_key_value_heads=H,
        linear_num_heads=4,
        linear_head_dim=8,
        linear_conv_kernel_dim=3,
        q_lora_rank=None,
        kv_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=6,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
    ),
    "minimax": _minimax,
    "mamba": plain("MambaForCausalLM", "MambaConfig", **_SCAN, time_step_rank=4),
    "falcon_mamba": plain("FalconMambaForCausalLM", "FalconMambaConfig", **_SCAN, time_step_rank=4),
    "jamba": decoder(
        "JambaForCausalLM",
        "JambaConfig",
        mamba_d_state=4,
        mamba_d_conv=3,
        mamba_expand=2,
        mamba_dt_rank=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=2,
        num_experts_per_tok=1,
    ),
    "mamba2": plain(
        "Mamba2ForCausalLM",
        "Mamba2Config",
        **_SCAN,
        num_heads=8,
        head_dim=8,
        n_groups=2,
        chunk_size=4,
        time_step_limit=(0.02, 0.3),
    ),
    "bamba": decoder("BambaForCausalLM", "BambaConfig", **_SCAN2, attn_layer_indices=[1]),
    "granitemoehybrid": decoder(
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeHybridConfig",
        **_SCAN2,
        layer_types=["mamba", "attention"],
        num_local_experts=2,
        num_experts_per_tok=1,
        shared_intermediate_size=16,
    ),
    "nemotron_h": decoder(
        "NemotronHForCausalLM",
        "NemotronHConfig",
        num_hidden_layers=4,
        layers_block_type=["mamba", "moe", "attention", "mlp"],
        head_dim=8,
        mamba_num_heads=8,
        mamba_head_dim=8,
        n_groups=2,
        ssm_state_size=4,
        conv_kernel=3,
        chunk_size=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16,
        n_group=1,
        topk_group=1,
    ),
    "recurrent_gemma": decoder(
        "RecurrentGemmaForCausalLM",
        "RecurrentGemmaConfig",
        head_dim=8,
        lru_width=D,
        attention_window_size=8,
        block_types=["recurrent", "attention"],
        conv1d_width=3,
    ),
    "rwkv": plain(
        "RwkvForCausalLM",
        "RwkvConfig",
        vocab_size=V,
        hidden_size=D,
        attention_hidden_size=2 * D,
        intermediate_size=F,
        num_hidden_layers=L,
        context_length=64,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "lfm2": decoder(
        "Lfm2ForCausalLM",
        "Lfm2Config",
        layer_types=["conv", "full_attention"],
        conv_L_cache=3,
        block_auto_adjust_ff_dim=False,
    ),
    "lfm2_moe": decoder(
        "Lfm2MoeForCausalLM",
        "Lfm2MoeConfig",
        layer_types=["conv", "full_attention"],
        conv_L_cache=3,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        num_dense_layers=1,
    ),
}
"""Families in which something else than softmax attention mixes the tokens, in some or in all layers."""
