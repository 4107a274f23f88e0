"""Tiny models of every kind, by name. A new implementation of the ``Model`` protocol adds one line to ``BUILDERS``.

A builder returns a ``Case``: the model, an input it accepts, and (for Hugging Face models) the wrapped module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers as hf
from random_nets import DECODER, VISION, D, F, G, H, L, V, decoder, ids, net, noise, plain
from sparse_nets import INTERFACE_NETS, SPARSE_NETS
from state_nets import STATE_NETS

from workbench.models.hf import HFModel
from workbench.models.protocol import Model

__all__ = ["DECODER", "VISION", "D", "F", "G", "H", "L", "V", "ids", "net"]


@dataclass(frozen=True)
class Case:
    """A model with an input for it. ``keys``: the layers its maps must have."""

    model: Model
    inputs: Any
    keys: tuple[int | str, ...]
    net: Any = None
    text: bool = True
    """Whether ``inputs`` are token ids alone."""
    state: bool = False
    """Whether some layers carry a state: maps may be signed, a run with a cache is not captured, and not every site is there."""
    signed: bool = False
    """Whether maps may be signed."""
    heeds_padding: bool = True
    """Whether padding before a text leaves the text alone."""


_BERT = {k: v for k, v in DECODER.items() if k != "num_key_value_heads"}
_GPT2 = {
    "vocab_size": V,
    "n_embd": D,
    "n_layer": L,
    "n_head": H,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_CLIP_TEXT = {k: v for k, v in _BERT.items() if k != "pad_token_id"}

NETS: dict[str, Callable[..., Any]] = {
    "llama": decoder("LlamaForCausalLM", "LlamaConfig"),
    "qwen2": decoder("Qwen2ForCausalLM", "Qwen2Config"),
    "qwen3": decoder("Qwen3ForCausalLM", "Qwen3Config", head_dim=8),
    "gemma2": decoder("Gemma2ForCausalLM", "Gemma2Config", head_dim=8, sliding_window=4, attn_logit_softcapping=5.0),
    "gemma3": decoder("Gemma3ForCausalLM", "Gemma3TextConfig", head_dim=8, sliding_window=4, sliding_window_pattern=2),
    "mistral": decoder("MistralForCausalLM", "MistralConfig", sliding_window=4),
    "gpt2": plain("GPT2LMHeadModel", "GPT2Config", **_GPT2),
    "gpt_neox": decoder("GPTNeoXForCausalLM", "GPTNeoXConfig", use_parallel_residual=False),
    "phi3": decoder("Phi3ForCausalLM", "Phi3Config"),
    "olmo2": decoder("Olmo2ForCausalLM", "Olmo2Config"),
    "opt": plain(
        "OPTForCausalLM",
        "OPTConfig",
        vocab_size=V,
        hidden_size=D,
        ffn_dim=F,
        num_hidden_layers=L,
        num_attention_heads=H,
        max_position_embeddings=64,
        word_embed_proj_dim=D,
    ),
    "gpt_oss": decoder(
        "GptOssForCausalLM",
        "GptOssConfig",
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=4,
    ),
    "deepseek_v3": decoder(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        num_key_value_heads=H,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=6,
        moe_intermediate_size=16,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
    ),
    "bert": plain("BertForMaskedLM", "BertConfig", **_BERT),
    "roberta": plain("RobertaForMaskedLM", "RobertaConfig", **_BERT),
    "t5": plain(
        "T5ForConditionalGeneration",
        "T5Config",
        vocab_size=V,
        d_model=D,
        d_kv=8,
        d_ff=F,
        num_layers=L,
        num_heads=H,
        decoder_start_token_id=0,
    ),
    "vit": plain("ViTForImageClassification", "ViTConfig", **VISION),
    "dinov2": plain("Dinov2Model", "Dinov2Config", **{k: v for k, v in VISION.items() if k != "intermediate_size"}),
    "clip": plain("CLIPModel", "CLIPConfig", text_config=_CLIP_TEXT, vision_config=VISION, projection_dim=16),
    "swin": plain(
        "SwinModel",
        "SwinConfig",
        image_size=32,
        patch_size=2,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
    ),
    "whisper": plain(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        vocab_size=V,
        d_model=D,
        encoder_layers=L,
        decoder_layers=L,
        encoder_attention_heads=H,
        decoder_attention_heads=H,
        encoder_ffn_dim=F,
        decoder_ffn_dim=F,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    ),
    "falcon": plain(
        "FalconForCausalLM",
        "FalconConfig",
        vocab_size=V,
        hidden_size=D,
        num_hidden_layers=L,
        num_attention_heads=H,
        num_kv_heads=G,
        new_decoder_architecture=True,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "falcon-alibi": plain(
        "FalconForCausalLM",
        "FalconConfig",
        vocab_size=V,
        hidden_size=D,
        num_hidden_layers=L,
        num_attention_heads=H,
        alibi=True,
        multi_query=True,
        parallel_attn=False,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "bloom": plain(
        "BloomForCausalLM",
        "BloomConfig",
        vocab_size=V,
        hidden_size=D,
        n_layer=L,
        n_head=H,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "mpt": plain("MptForCausalLM", "MptConfig", vocab_size=V, d_model=D, n_layers=L, n_heads=H, max_seq_len=64),
}
NETS |= {name: made for name, made in INTERFACE_NETS.items() if name != "bart"}
CONFORMING = ("diffllama", "longformer", "big_bird", "swinv2", "donut", "maskformer_swin", "swin2sr")
"""Those of ``SPARSE_NETS`` that run on any text (or image) and have all the sites that the suite asks for."""
RECORDED = ("falcon", "falcon-alibi", "bloom", "mpt")
EAGER_ONLY = ("gemma2", "gpt_oss", "bloom", "mpt")
"""Families that transformers runs eagerly by default."""


def inputs(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """What a model of this name is run on."""
    if name in ("vit", "dinov2"):
        return {"pixel_values": noise(2, 3, 16, 16).to(dtype)}
    if name == "swin2sr":
        return {"pixel_values": noise(2, 3, 16, 16).to(dtype)}
    if name in ("swin", "swinv2", "donut", "maskformer_swin"):
        return {"pixel_values": noise(2, 3, 32, 32).to(dtype)}
    if name == "clip":
        return {"input_ids": ids(2, 9), "pixel_values": noise(2, 3, 16, 16).to(dtype)}
    if name == "t5":
        return {"input_ids": ids(2, 9), "decoder_input_ids": ids(2, 5)}
    if name == "whisper":
        return {"input_features": noise(2, 8, 20).to(dtype), "decoder_input_ids": ids(2, 5)}
    return ids()


def keys(name: str) -> tuple[int | str, ...]:
    stacks = {
        "t5": ("encoder", "decoder", "cross"),
        "whisper": ("encoder", "decoder", "cross"),
        "clip": ("text", "vision"),
    }
    if name in stacks:
        return tuple(f"{stack}.{i}" for stack in stacks[name] for i in range(L))
    counts = {"swin": 4, "swinv2": 4, "donut": 4, "maskformer_swin": 4, "swin2sr": 4, "gemma3n": 4, "albert": 3}
    return (0, 2) if name == "nemotron_h" else tuple(range(counts.get(name, L)))


DTYPES = {"gemma2": torch.float32, "bloom": torch.float32, "mpt": torch.float32}
"""Their eager softmax in float32 turns float64's hidden scores to -inf, and rows that see nothing to NaN."""


@cache
def hugging_face(name: str, implementation: str | None = None, dtype: torch.dtype = torch.float64) -> Case:
    made = {**NETS, **STATE_NETS, **SPARSE_NETS}[name](implementation, dtype)
    given = inputs(name, dtype)
    return Case(
        HFModel(made, name=name),
        given,
        keys(name),
        made,
        text=isinstance(given, torch.Tensor),
        state=name in STATE_NETS,
        signed=name in STATE_NETS or name == "diffllama",
        heeds_padding=name not in ("recurrent_gemma", "rwkv"),
    )


def native(**options: Any) -> Case:
    from workbench.models.native import NativeModel
    from workbench.models.native_net import NativeConfig, NativeNet

    sizes = {"layers": L, "heads": H, "kv_heads": G, "width": D, "head_width": 8, "vocab": V, "mlp_width": F}
    torch.manual_seed(0)
    made = NativeNet(NativeConfig(**{**sizes, **options}, context=64)).double().eval()
    return Case(NativeModel(made), ids(), tuple(range(L)), made)


BRIDGED = ("gpt2", "llama", "qwen2", "gemma2", "mistral", "opt")


@cache
def bridged(name: str) -> Case:
    """In float32: a bridge does its softmax in it, whatever the type of the model."""
    from transformer_lens.model_bridge import TransformerBridge

    from workbench.models.bridge import BridgeModel

    made = NETS[name](dtype=torch.float32)
    made.config.architectures = [type(made).__name__]
    bridge = TransformerBridge.boot_transformers(name, hf_model=made, tokenizer=tokenizer())
    return Case(BridgeModel(bridge), ids(), tuple(range(L)), made)


def tokenizer() -> Any:
    """A word-level tokenizer that was loaded from a folder, as TransformerLens wants it."""
    import atexit
    import shutil
    import tempfile

    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{f"w{i}": i for i in range(3, V)}}
    plain = Tokenizer(models.WordLevel(vocab, unk_token="<eos>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<eos>"}
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    hf.PreTrainedTokenizerFast(tokenizer_object=plain, **names).save_pretrained(folder)
    return hf.AutoTokenizer.from_pretrained(folder)


BUILDERS: dict[str, Callable[[], Case]] = {
    **{
        f"hf-{name}": (lambda name=name: hugging_face(name, dtype=DTYPES.get(name, torch.float64)))
        for name in (*NETS, *STATE_NETS, *CONFORMING)
    },
    "native-softmax": native,
    "native-gated": lambda: native(mixer="gated-softmax"),
    "native-plain": lambda: native(positions="learned", norm="none", kv_heads=None, tied=True),
    "native-encoder": lambda: native(causal=False),
    **{f"bridge-{name}": (lambda name=name: bridged(name)) for name in BRIDGED},
}
