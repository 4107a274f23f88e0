"""A small transformer, of tokens or of image patches, built on TransformerLens hook points, which takes any sequence mixer.

Every intermediate tensor has TransformerLens's name and passes a ``HookPoint``. Hook points that cost something
(``hook_q_input``, ``hook_k_input``, ``hook_v_input``, ``hook_result``) are computed only while a hook is attached, and the
output is computed through them only if a hook changes them or gradients are on; a look without gradients changes no bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap
from workbench.models.native_config import NativeCache, NativeConfig
from workbench.models.native_mixers import make_mixer

__all__ = ["Attention", "NativeCache", "NativeConfig", "NativeNet"]

OnMap = Callable[[int, AttentionMap], None]


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(width))
        self.hook_scale = HookPoint()
        self.hook_normalized = HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        scale = self.hook_scale((x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt())
        return self.hook_normalized(x / scale * self.w)


class NoNorm(nn.Module):
    """Identity in the place of a norm, so that names stay."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hook_normalized = HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        return self.hook_normalized(x)


def _norm(config: NativeConfig) -> nn.Module:
    return RMSNorm(config.width) if config.norm == "rms" else NoNorm(config.width)


class Attention(nn.Module):
    """Projections and rotary positions around a mixer. ``W_Q [H, D, E]``, ``W_K W_V [G, D, E]``, ``W_O [H, E, D]``; what the
    mixer has no use for is absent, weight and hook point."""

    hook_z: HookPoint
    hook_result: HookPoint

    def __init__(self, config: NativeConfig, layer: int) -> None:
        super().__init__()
        h, g, d, e = config.heads, config.kv_heads or config.heads, config.width, config.head_width
        self.config, self.layer = config, layer
        mixer: Any = make_mixer(config)
        self.mixer = mixer
        used = [name for name in ("q", "k", "v") if name not in mixer.ignores]
        for name, heads in {"q": h, "k": g, "v": g}.items():
            weight = nn.Parameter(torch.randn(heads, d, e) * d**-0.5) if name in used else None
            self.register_parameter(f"W_{name.upper()}", weight)
            has_bias = config.bias and weight is not None
            self.register_parameter(f"b_{name.upper()}", nn.Parameter(torch.zeros(heads, e)) if has_bias else None)
        self.W_O = nn.Parameter(torch.randn(h, e, d) * (h * e * 2 * config.layers) ** -0.5)
        rotated = [f"rot_{name}" for name in used if name != "v" and config.positions == "rotary"]
        for name in (*used, *rotated, "z", "result"):
            setattr(self, f"hook_{name}", HookPoint())

    def forward(
        self,
        xq: Tensor,
        xk: Tensor,
        xv: Tensor,
        mask: Mask,
        rotary: tuple[Tensor, Tensor] | None,
        past: tuple[Tensor, ...] | None,
        on_map: OnMap | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """``x*``: ``[B, T, D]``, or ``[B, T, H or G, D]`` where each head has an input of its own."""
        q, k, v = self._made("q", xq), self._made("k", xk), self._made("v", xv)
        if rotary is not None:
            q, k = self._turned("q", q, rotary), self._turned("k", k, rotary)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        kept: tuple[Tensor, ...] = (k, v)
        if self.mixer.keeps_inputs:
            if past is not None:
                q, xq, xk = (
                    torch.cat([old, new], axis) for old, new, axis in zip(past[2:], (q, xq, xk), (2, 1, 1), strict=True)
                )
            kept = (k, v, q, xq, xk)
        z, amap = self.mixer(xq, q, k, v, mask, xk)
        z = self.hook_z(z.transpose(1, 2))
        if on_map is not None:
            on_map(self.layer, amap)
        out = z.flatten(2) @ self.W_O.flatten(0, 1)
        if self.hook_result.fwd_hooks:
            result = torch.einsum("bthe,hed->bthd", z, self.W_O)
            new = self.hook_result(result)
            out = new.sum(2) if _replaces(new, result) else out
        return out, kept

    def _made(self, name: str, x: Tensor) -> Tensor:
        """The projection of x ``[B, T, H or G, E]``; zeros without memory where the mixer has no use for it."""
        weight = getattr(self, f"W_{name.upper()}")
        if weight is None:
            heads = self.config.heads if name == "q" else self.config.kv_heads or self.config.heads
            return x.new_zeros(1).expand(*x.shape[:2], heads, self.config.head_width)
        return getattr(self, f"hook_{name}")(_project(x, weight, getattr(self, f"b_{name.upper()}")))

    def _turned(self, name: str, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        return (
            x if getattr(self, f"W_{name.upper()}") is None else getattr(self, f"hook_rot_{name}")(_rotate(x, *rotary))
        )


class MLP(nn.Module):
    def __init__(self, config: NativeConfig) -> None:
        super().__init__()
        d, m = config.width, config.mlp_width
        self.W_in = nn.Parameter(torch.randn(d, m) * d**-0.5)
        self.b_in = nn.Parameter(torch.zeros(m))
        self.W_out = nn.Parameter(torch.randn(m, d) * (m * 2 * config.layers) ** -0.5)
        self.b_out = nn.Parameter(torch.zeros(d))
        self.act = nn.GELU() if config.activation == "gelu" else nn.ReLU()
        self.hook_pre, self.hook_post = HookPoint(), HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        return self.hook_post(self.act(self.hook_pre(x @ self.W_in + self.b_in))) @ self.W_out + self.b_out


class Block(nn.Module):
    hook_resid_pre: HookPoint
    hook_q_input: HookPoint
    hook_k_input: HookPoint
    hook_v_input: HookPoint
    hook_attn_out: HookPoint
    hook_resid_post: HookPoint

    def __init__(self, config: NativeConfig, layer: int) -> None:
        super().__init__()
        self.ln1, self.attn = _norm(config), Attention(config, layer)
        self.heads, self.kv_heads = config.heads, config.kv_heads or config.heads
        for name in ("resid_pre", "q_input", "k_input", "v_input", "attn_out", "resid_post"):
            setattr(self, f"hook_{name}", HookPoint())
        self.mlp: MLP | None = None
        if config.mlp_width:
            self.ln2, self.mlp = _norm(config), MLP(config)
            self.hook_resid_mid, self.hook_mlp_in, self.hook_mlp_out = HookPoint(), HookPoint(), HookPoint()

    def forward(
        self,
        x: Tensor,
        mask: Mask,
        rotary: tuple[Tensor, Tensor] | None,
        past: tuple[Tensor, ...] | None,
        on_map: OnMap | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        x = self.hook_resid_pre(x)
        inputs = []
        shared = None
        for point, n in (
            (self.hook_q_input, self.heads),
            (self.hook_k_input, self.kv_heads),
            (self.hook_v_input, self.kv_heads),
        ):
            if point.fwd_hooks:
                split = x[:, :, None].expand(-1, -1, n, -1)
                new = point(split)
                if _replaces(new, split):
                    inputs.append(self.ln1(new))
                    continue
            shared = self.ln1(x) if shared is None else shared
            inputs.append(shared)
        out, kv = self.attn(*inputs, mask, rotary, past, on_map)
        x = x + self.hook_attn_out(out)
        if self.mlp is not None:
            x = self.hook_resid_mid(x)
            x = x + self.hook_mlp_out(self.mlp(self.ln2(self.hook_mlp_in(x))))
        return self.hook_resid_post(x), kv


class NativeNet(nn.Module):
    """The network. ``net(ids)`` gives logits ``[B, T, V]``; parameters have TransformerLens's names.

    ``W_E [V, D]`` (``[channels * patch^2, D]`` for images, which are passed in the place of ids and give ``[B, V]``),
    ``W_pos [context, D]`` (learned positions), ``blocks.{l}.attn.W_*``, ``blocks.{l}.mlp.W_*``, ``ln_final.w``, ``W_U [D, V]``
    (``W_E`` transposed if ``tied``).
    """

    def __init__(self, config: NativeConfig) -> None:
        super().__init__()
        self.config = config
        inputs = config.vocab if config.grid is None else config.channels * config.patch**2
        self.W_E = nn.Parameter(torch.randn(inputs, config.width) * config.width**-0.5)
        known = config.positions_known
        self.W_pos = nn.Parameter(torch.randn(known, config.width) * 0.02) if config.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.ln_final = _norm(config)
        self.W_U = None if config.tied else nn.Parameter(torch.randn(config.width, config.vocab) * config.width**-0.5)
        self.hook_embed = HookPoint()
        if self.W_pos is not None:
            self.hook_pos_embed = HookPoint()
        self.hook_dict: dict[str, HookPoint] = {}
        for name, module in self.named_modules():
            if isinstance(module, HookPoint):
                module.name = name
                self.hook_dict[name] = module

    @property
    def steps(self) -> bool:
        """Whether tokens can be added one by one, with a cache."""
        blocks: Any = self.blocks
        return all(block.attn.mixer.steps for block in blocks)

    @property
    def unembed(self) -> Tensor:
        """``W_U [D, V]``."""
        return self.W_E.T if self.W_U is None else self.W_U

    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        *,
        cache: NativeCache | None = None,
        on_map: OnMap | None = None,
        hidden: bool = False,
    ) -> Any:
        """Logits ``[B, T, V]`` (``[B, V]`` for images); with ``hidden=True`` the pair (normalised last hidden state
        ``[B, T, D]``, new cache)."""
        if self.config.grid is not None:
            ids = self._patches(ids)
        past = cache.length if cache is not None else 0
        real = ids.new_ones(ids.shape[:2], dtype=torch.bool) if mask is None else mask
        seen = real if cache is None else torch.cat([cache.mask, real], 1)
        padded = not bool(seen.all())
        spec = Mask(causal=self.config.causal, keys=seen if padded else None, offset=past)
        positions = (
            (seen.cumsum(1) - 1).clamp(min=0)[:, past:] if padded else torch.arange(past, past + ids.shape[1])[None]
        )
        positions = positions.to(ids.device)
        x = self.hook_embed(self.W_E[ids] if self.config.grid is None else ids @ self.W_E)
        if self.W_pos is not None:
            x = x + self.hook_pos_embed(self.W_pos[positions].expand_as(x))
        rotary = _angles(positions, self.config, x.dtype) if self.config.positions == "rotary" else None
        new = []
        for layer, block in enumerate(self.blocks):
            x, kv = block(x, spec, rotary, cache.layers[layer] if cache is not None else None, on_map)
            new.append(kv)
        x = self.ln_final(x)
        if hidden:
            return x, NativeCache(tuple(new), seen)
        return self.logits(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Of the normalised last hidden state ``[B, T, D]``: ``[B, T, V]``, or ``[B, V]`` for images."""
        return (hidden if self.config.grid is None else hidden.mean(1)) @ self.unembed

    def _patches(self, pixels: Tensor) -> Tensor:
        """Images ``[B, channels, rows * patch, columns * patch]`` to patches ``[B, rows * columns, channels * patch^2]``."""
        c = self.config
        assert c.grid is not None
        wanted = (c.channels, c.grid[0] * c.patch, c.grid[1] * c.patch)
        if not pixels.is_floating_point() or pixels.ndim != 4 or tuple(pixels.shape[1:]) != wanted:
            raise WorkbenchError(
                f"this model reads images, floating point {['B', *wanted]}; got {pixels.dtype} {list(pixels.shape)}"
            )
        parts = pixels.to(self.W_E.dtype).unflatten(3, (-1, c.patch)).unflatten(2, (-1, c.patch))
        return parts.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _replaces(new: Tensor, old: Tensor) -> bool:
    """Whether a hook changed its tensor, or was handed it with a graph that has to lead through it."""
    return new is not old or old.requires_grad


def _project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``[B, T, D]`` or ``[B, T, N, D]`` with ``W [N, D, E]`` and ``b [N, E]`` to ``[B, T, N, E]``."""
    if x.ndim == 4:
        out = torch.einsum("btnd,nde->btne", x, weight)
    else:
        n, d, e = weight.shape
        out = (x @ weight.transpose(0, 1).reshape(d, n * e)).unflatten(-1, (n, e))
    return out if bias is None else out + bias


def _angles(positions: Tensor, config: NativeConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``[B, T, 1, E/2]`` of the rotary angles (arXiv 2104.09864, eq. 15)."""
    half = config.head_width // 2
    rates = config.theta ** (-torch.arange(half, device=positions.device, dtype=torch.float64) / half)
    angles = positions[..., None].double() * rates
    return angles.cos()[:, :, None].to(dtype), angles.sin()[:, :, None].to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i+E/2}) of every head."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
