"""How the blocks of each model family are wired: where TransformerLens's sites lie among Hugging Face's modules.

Keyed by the class of the block, since that class is what fixes the wiring. A family that is not listed still serves the
sites at the attention function (``rot_q``, ``rot_k``, ``v``, ``z``, the map) and the residual stream between blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Wiring:
    """Paths of modules inside a block; an empty path means that the family does not serve the site.

    ``out``: projection W_O. ``attn_out``, ``mlp_out``: module whose output is added to the residual stream, that is
    after a post-norm or layer scale where there is one. ``mid``: module whose *input* is the stream between attention
    and MLP. ``pre``: MLP's (gate) pre-activation, an output; ``post``: the input of the last MLP matrix. ``q`` ``k``
    ``v``: projections; or ``fused``: one projection, split as ``split`` says. ``rotary``: positions enter after the
    projections, so that q and rot_q differ. ``end``: in post-norm blocks, the norm whose input is ``resid_post``.
    """

    out: str
    attn_out: str = ""
    mid: str = ""
    mlp_out: str = ""
    pre: str = ""
    post: str = ""
    q: str = ""
    k: str = ""
    v: str = ""
    fused: str = ""
    split: str = ""
    rotary: bool = False
    end: str = ""
    attn_norm: str = ""
    mlp_norm: str = ""
    """With ``attn_norm``: the norms of pre-norm blocks whose outputs attention and MLP read."""
    adds_in_place: bool = False
    """The block adds to the MLP's output in place, so that what is read has to be a copy."""


_SEPARATE: dict[str, Any] = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"}
_LLAMA = Wiring(
    out="self_attn.o_proj",
    attn_out="self_attn.o_proj",
    mid="post_attention_layernorm",
    mlp_out="mlp",
    pre="mlp.gate_proj",
    post="mlp.down_proj",
    rotary=True,
    attn_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    **_SEPARATE,
)
_GEMMA = replace(
    _LLAMA,
    attn_out="post_attention_layernorm",
    mid="pre_feedforward_layernorm",
    mlp_out="post_feedforward_layernorm",
    mlp_norm="pre_feedforward_layernorm",
)
_OPT = Wiring(
    out="self_attn.out_proj",
    attn_out="self_attn.out_proj",
    mid="final_layer_norm",
    mlp_out="fc2",
    pre="fc1",
    post="fc2",
    **_SEPARATE,
)
_BERT = Wiring(
    out="attention.output.dense",
    attn_out="attention.output.dense",
    mid="attention.output.LayerNorm",
    mlp_out="output.dense",
    pre="intermediate.dense",
    post="output.dense",
    q="attention.self.query",
    k="attention.self.key",
    v="attention.self.value",
    end="output.LayerNorm",
)
_VIT = Wiring(
    out="attention.o_proj",
    attn_out="attention.o_proj",
    mid="layernorm_after",
    mlp_out="mlp",
    pre="mlp.fc1",
    post="mlp.fc2",
    q="attention.q_proj",
    k="attention.k_proj",
    v="attention.v_proj",
)
_NEOX = Wiring(
    out="attention.dense",
    attn_out="attention.dense",
    mid="post_attention_layernorm",
    mlp_out="mlp",
    pre="mlp.dense_h_to_4h",
    post="mlp.dense_4h_to_h",
    fused="attention.query_key_value",
    split="per head",
    rotary=True,
    attn_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
)
_BLOOM = Wiring(
    out="self_attention.dense",
    attn_out="self_attention.dense",
    mid="post_attention_layernorm",
    mlp_out="mlp.dense_4h_to_h",
    pre="mlp.dense_h_to_4h",
    post="mlp.dense_4h_to_h",
    fused="self_attention.query_key_value",
    split="per head",
    attn_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
)

WIRINGS: dict[str, Wiring] = {
    "LlamaDecoderLayer": _LLAMA,
    "MistralDecoderLayer": _LLAMA,
    "Qwen2DecoderLayer": _LLAMA,
    "Qwen3DecoderLayer": _LLAMA,
    "Phi3DecoderLayer": replace(_LLAMA, q="", k="", v="", fused="self_attn.qkv_proj", split="in a row", pre=""),
    "Gemma2DecoderLayer": _GEMMA,
    "Gemma3DecoderLayer": _GEMMA,
    "Olmo2DecoderLayer": replace(
        _LLAMA,
        attn_out="post_attention_layernorm",
        mid="mlp",
        mlp_out="post_feedforward_layernorm",
        attn_norm="",
        mlp_norm="",
    ),
    "GptOssDecoderLayer": replace(_LLAMA, pre="", post=""),
    "DeepseekV3DecoderLayer": replace(_LLAMA, q="", k="", v=""),
    "GPT2Block": Wiring(
        out="attn.c_proj",
        attn_out="attn.c_proj",
        mid="ln_2",
        mlp_out="mlp",
        pre="mlp.c_fc",
        post="mlp.c_proj",
        fused="attn.c_attn",
        split="in a row",
        attn_norm="ln_1",
        mlp_norm="ln_2",
    ),
    "GPTNeoXLayer": _NEOX,
    "OPTDecoderLayer": _OPT,
    "WhisperEncoderLayer": _OPT,
    "WhisperDecoderLayer": replace(_OPT, mid="encoder_attn_layer_norm"),
    "CLIPEncoderLayer": replace(_OPT, mid="layer_norm2", mlp_out="mlp", pre="mlp.fc1", post="mlp.fc2"),
    "BertLayer": _BERT,
    "RobertaLayer": _BERT,
    "ViTLayer": _VIT,
    "Dinov2Layer": replace(_VIT, attn_out="layer_scale1", mid="norm2", mlp_out="layer_scale2"),
    "T5Block": Wiring(
        out="layer.0.SelfAttention.o",
        attn_out="layer.0.SelfAttention.o",
        mid="layer.1.layer_norm",
        mlp_out="layer.-1.DenseReluDense.wo",
        post="layer.-1.DenseReluDense.wo",
        q="layer.0.SelfAttention.q",
        k="layer.0.SelfAttention.k",
        v="layer.0.SelfAttention.v",
    ),
    "SwinLayer": Wiring(out="", attn_out="", mid="layernorm_after", mlp_out="mlp", pre="mlp.fc1", post="mlp.fc2"),
    "FalconDecoderLayer": Wiring(
        out="self_attention.dense",
        attn_out="self_attention.dense",
        mid="post_attention_layernorm",
        mlp_out="mlp",
        pre="mlp.dense_h_to_4h",
        post="mlp.dense_4h_to_h",
        rotary=True,
        adds_in_place=True,
    ),
    "BloomBlock": _BLOOM,
    "MptBlock": Wiring(
        out="attn.out_proj",
        attn_out="attn.out_proj",
        mid="norm_2",
        mlp_out="ffn.down_proj",
        pre="ffn.up_proj",
        post="ffn.down_proj",
        fused="attn.Wqkv",
        split="in a row",
        attn_norm="norm_1",
        mlp_norm="norm_2",
    ),
}

_HYBRID = replace(_LLAMA, mid="pre_ff_layernorm", mlp_out="feed_forward", pre="feed_forward.gate_proj",
                  post="feed_forward.down_proj", mlp_norm="pre_ff_layernorm")  # fmt: skip
WIRINGS |= {
    "Qwen3NextDecoderLayer": replace(_LLAMA, q=""),
    "Qwen3_5DecoderLayer": replace(_LLAMA, q=""),
    "Qwen3_5MoeDecoderLayer": replace(_LLAMA, q=""),
    "OlmoHybridAttentionDecoderLayer": WIRINGS["Olmo2DecoderLayer"],
    "OlmoHybridLinearAttentionDecoderLayer": _LLAMA,
    "KimiLinearDecoderLayer": replace(_LLAMA, q="", k="", v="", rotary=False),
    "JambaAttentionDecoderLayer": replace(_HYBRID, rotary=False),
    "JambaMambaDecoderLayer": _HYBRID,
    "BambaDecoderLayer": _HYBRID,
    "NemotronHBlock": Wiring(
        out="mixer.o_proj", attn_out="mixer.o_proj", q="mixer.q_proj", k="mixer.k_proj", v="mixer.v_proj"
    ),
    "MambaBlock": Wiring(out="", attn_out="mixer"),
    "FalconMambaBlock": Wiring(out="", attn_out="mixer"),
    "Mamba2Block": Wiring(out="", attn_out="mixer"),
    "RecurrentGemmaDecoderLayer": Wiring(
        out="temporal_block.o_proj",
        attn_out="temporal_block.o_proj",
        mid="channel_pre_norm",
        mlp_out="mlp_block",
        pre="mlp_block.gate_proj",
        post="mlp_block.down_proj",
        q="temporal_block.q_proj",
        k="temporal_block.k_proj",
        v="temporal_block.v_proj",
        rotary=True,
    ),
    "RwkvBlock": Wiring(
        out="",
        attn_out="attention.output",
        mid="ln2",
        mlp_out="feed_forward",
        pre="feed_forward.key",
        post="feed_forward.value",
    ),
    "Lfm2DecoderLayer": replace(
        _OPT, mid="ffn_norm", mlp_out="feed_forward", pre="feed_forward.w1", post="feed_forward.w2", rotary=True
    ),
}
WIRINGS["Lfm2MoeDecoderLayer"] = WIRINGS["Lfm2DecoderLayer"]
_IN_PLACE_OF_ATTENTION = ("linear_attn", "mamba", "conv", "mixer", "temporal_block.linear_out")
"""Modules of hybrid blocks whose output is added to the stream where other blocks of the same model have attention."""

for _name in ("Gemma", "Olmo", "SmolLM3", "Arcee", "Ernie4_5", "SeedOss", "Mixtral", "Qwen2Moe", "Qwen3Moe"):
    WIRINGS[f"{_name}DecoderLayer"] = _LLAMA
WIRINGS["Olmo3DecoderLayer"] = WIRINGS["Olmo2DecoderLayer"]
WIRINGS["Starcoder2DecoderLayer"] = replace(_LLAMA, pre="mlp.c_fc", post="mlp.c_proj")
for _name in ("XLMRoberta", "Electra", "Camembert", "Ernie"):
    WIRINGS[f"{_name}Layer"] = _BERT
WIRINGS["Dinov2WithRegistersLayer"] = WIRINGS["Dinov2Layer"]

for _name in ("Longformer", "BigBird", "Nystromformer"):
    WIRINGS[f"{_name}Layer"] = _BERT
WIRINGS["FNetLayer"] = replace(_BERT, out="", attn_out="fourier.self", mid="fourier.output.LayerNorm", q="", k="", v="")
for _name in ("DeepseekV32", "GlmMoeDsa"):
    WIRINGS[f"{_name}DecoderLayer"] = WIRINGS["DeepseekV3DecoderLayer"]
WIRINGS["DiffLlamaDecoderLayer"] = _LLAMA

_STREAMS = ("Gemma3nTextDecoderLayer", "ReformerLayer")
"""Blocks that go on with several streams instead of one residual stream."""

_CROSS: dict[str, Wiring] = {
    "T5Block": Wiring(out="layer.1.EncDecAttention.o", attn_out="layer.1.EncDecAttention.o"),
    "WhisperDecoderLayer": Wiring(out="encoder_attn.out_proj", attn_out="encoder_attn.out_proj"),
}


def wiring_of(block: nn.Module, cross: bool = False) -> Wiring | None:
    """The wiring of a block's class, adapted to how this very block is configured; None for classes not listed."""
    name = type(block).__name__
    if cross:
        return _CROSS.get(name)
    wiring = WIRINGS.get(name)
    if wiring is None:
        return None
    if submodule(block, wiring.attn_out) is None:
        found = next((path for path in _IN_PLACE_OF_ATTENTION if submodule(block, path) is not None), "")
        return replace(wiring, out="", attn_out=found, q="", k="", v="") if found else wiring
    if name == "RwkvBlock" and getattr(block, "layer_id", None) == 0:
        return replace(wiring, attn_out="", mid="")  # the first block's stream starts behind a norm of its own
    config = getattr(block, "config", None)
    if name == "GPTNeoXLayer" and getattr(block, "use_parallel_residual", False):
        return replace(wiring, mid="")
    if name == "OPTDecoderLayer" and not getattr(block, "do_layer_norm_before", True):
        return replace(wiring, mid="self_attn_layer_norm", end="final_layer_norm")
    if name == "BloomBlock" and getattr(block, "apply_residual_connection_post_layernorm", False):
        return replace(wiring, mid="")
    if name == "FalconDecoderLayer":
        wiring = replace(wiring, rotary=not getattr(config, "alibi", False))
        if getattr(config, "parallel_attn", True) or getattr(config, "new_decoder_architecture", False):
            return replace(wiring, mid="")
    if wiring is WIRINGS["DeepseekV3DecoderLayer"] and submodule(block, wiring.pre) is None:
        return replace(wiring, pre="", post="")
    if name == "T5Block" and submodule(block, "layer.-1.DenseReluDense.wi") is not None:
        return replace(wiring, pre="layer.-1.DenseReluDense.wi")
    if name == "T5Block":
        return replace(wiring, pre="layer.-1.DenseReluDense.wi_0")
    return wiring


def has_stream(block: nn.Module) -> bool:
    """Whether a block's first input and output are the residual stream."""
    return type(block).__name__ not in _STREAMS


def submodule(block: nn.Module, path: str) -> nn.Module | None:
    """The module at ``path`` (``-1`` is the last entry of a list), None if the path is empty or leads nowhere."""
    if not path:
        return None
    found: Any = block
    for name in path.split("."):
        found = found[-1] if name == "-1" else getattr(found, name, None)
        if found is None:
            return None
    return found


def split_heads(wiring: Wiring, fused: Tensor, heads: int, kv_heads: int, width: int) -> dict[str, Tensor]:
    """q ``[B, T, H, E]``, k and v ``[B, T, G, E]`` as views of the output of a fused projection."""
    if wiring.split == "per head":
        parts = fused.unflatten(-1, (heads, 3, width))
        return {"q": parts[..., 0, :], "k": parts[..., 1, :], "v": parts[..., 2, :]}
    q, k, v = fused.split([heads * width, kv_heads * width, kv_heads * width], dim=-1)
    return {
        "q": q.unflatten(-1, (heads, width)),
        "k": k.unflatten(-1, (kv_heads, width)),
        "v": v.unflatten(-1, (kv_heads, width)),
    }


def join_heads(wiring: Wiring, parts: dict[str, Tensor]) -> Tensor:
    """The inverse of ``split_heads``."""
    if wiring.split == "per head":
        return torch.stack([parts["q"], parts["k"], parts["v"]], dim=-2).flatten(-3)
    return torch.cat([parts[name].flatten(-2) for name in ("q", "k", "v")], dim=-1)
