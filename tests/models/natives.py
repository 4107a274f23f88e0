"""Small native models for tests, and their forward pass in plain matrix products."""

from dataclasses import replace

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from workbench.models.native import NativeModel
from workbench.models.native_net import NativeConfig, NativeNet

CONFIG = NativeConfig(layers=2, heads=4, kv_heads=2, width=16, head_width=6, vocab=23, mlp_width=24, context=64)
VARIANTS = {
    "grouped": CONFIG,
    "gated": replace(CONFIG, mixer="gated-softmax"),
    "biased": replace(CONFIG, bias=True),
    "learned": replace(CONFIG, positions="learned", kv_heads=None, tied=True, activation="relu"),
    "bare": replace(CONFIG, positions="none", norm="none", mlp_width=0),
    "both ways": replace(CONFIG, causal=False),
}
DATA = torch.tensor([[3, 9, 4, 4, 17, 22, 1], [5, 2, 2, 8, 11, 0, 19]])


def make(config: NativeConfig = CONFIG, dtype: torch.dtype = torch.float64, tokenizer=None) -> NativeModel:
    torch.manual_seed(0)
    net = NativeNet(config)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if name.endswith(("W_gate", "b_gate", "b_in", "b_out", "b_Q", "b_K", "b_V", "ln1.w")):
                weight.normal_()
    return NativeModel(net.to(dtype).eval(), tokenizer, name="tiny")


def words(side: str = "right") -> PreTrainedTokenizerFast:
    vocab = {
        "<pad>": 0,
        "<bos>": 1,
        "<unk>": 2,
        **{w: i + 3 for i, w in enumerate(["a", "b", "c", "d", "e", "f", "g"])},
    }
    plain = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", bos_token="<bos>", unk_token="<unk>", padding_side=side
    )


def by_hand(net: NativeNet, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits and effective patterns with nothing but matrix products, one head at a time."""
    c = net.config
    time = len(ids)
    x = net.W_E[ids]
    if net.W_pos is not None:
        x = x + net.W_pos[:time]

    def norm(layer, x):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * layer.w if c.norm == "rms" else x

    def turn(x):
        if c.positions != "rotary":
            return x
        half = c.head_width // 2
        out = torch.empty_like(x)
        for t in range(time):
            for i in range(half):
                angle = torch.tensor(t * c.theta ** (-i / half), dtype=x.dtype)
                out[t, i] = x[t, i] * angle.cos() - x[t, i + half] * angle.sin()
                out[t, i + half] = x[t, i + half] * angle.cos() + x[t, i] * angle.sin()
        return out

    patterns = []
    for block in net.blocks:
        normed, attn = norm(block.ln1, x), block.attn
        out, maps = torch.zeros_like(x), []
        for h in range(c.heads):
            g = h // (c.heads // (c.kv_heads or c.heads))
            b_q, b_k, b_v = (attn.b_Q[h], attn.b_K[g], attn.b_V[g]) if c.bias else (0, 0, 0)
            q, k = turn(normed @ attn.W_Q[h] + b_q), turn(normed @ attn.W_K[g] + b_k)
            v = normed @ attn.W_V[g] + b_v
            s = q @ k.T / c.head_width**0.5
            if c.causal:
                s = s.masked_fill(torch.ones(time, time).triu(1).bool(), float("-inf"))
            p = s.softmax(-1)
            if c.mixer == "gated-softmax":
                p = p * torch.sigmoid(normed @ attn.mixer.W_gate[:, h] + attn.mixer.b_gate[h])[:, None]
            maps.append(p)
            out = out + p @ v @ attn.W_O[h]
        x = x + out
        patterns.append(torch.stack(maps))
        if block.mlp is not None:
            m = block.mlp
            x = x + m.act(norm(block.ln2, x) @ m.W_in + m.b_in) @ m.W_out + m.b_out
    return norm(net.ln_final, x) @ net.unembed, patterns
