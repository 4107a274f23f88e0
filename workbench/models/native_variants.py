"""Any self-attention variant of the catalogue as the mixer of a native model."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from workbench.catalogue import Learned, Variant, variants
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap
from workbench.patterns.arranged import BatchMap, LastRowsMap

if TYPE_CHECKING:
    from workbench.models.native_config import NativeConfig


def runnable(causal: bool) -> list[str]:
    """Names of the variants that a native model can be built with; with ``causal`` those that never look ahead."""
    return [v.name for v in variants() if v.recipe is not None and (v.causal or not causal)]


def variant_of(config: NativeConfig) -> Variant:
    """The variant that a configuration names; raises if there is none, or if it looks ahead in a causal model."""
    known = runnable(config.causal)
    if config.mixer in known:
        return variants()[config.mixer]
    found = next((v for v in variants() if v.name == config.mixer), None)
    if found is None:
        raise UnknownName("mixer", config.mixer, ("softmax", "gated-softmax", *known))
    if found.recipe is None:
        raise WorkbenchError(
            f"{found.name} takes more than one sequence or belongs to another kind of layer; call the operator itself"
        )
    raise WorkbenchError(f"{found.name} looks ahead: a native model runs it with causal=False")


class VariantMixer(nn.Module):
    """The operator of a variant, with its learned arguments: ``W_<name> [D, ...]`` and ``b_<name>`` for what is projected from
    the layer's input (a hook point ``hook_<name>`` each), and the parameters by their names.

    Operators see whole sequences of real tokens. Padding is taken out before and put back as zeros, example by example; a step
    with a cache computes all rows again and returns the last.
    """

    keeps_inputs = True

    def __init__(self, config: NativeConfig) -> None:
        super().__init__()
        variant = variant_of(config)
        if config.scale is not None:
            raise WorkbenchError(f"scale belongs to the softmax mixers; {variant.name} scales as its operator says")
        recipe = variant.recipe
        assert recipe is not None
        self.variant, self.recipe, self.causal, self.grid = variant, recipe, config.causal, config.grid
        self.ignores, self.steps = recipe.ignores, recipe.steps
        self.exactness = "exact" if variant.value_input is not None else "jacobian"
        self.sizes = {"H": config.heads, "G": config.kv_heads or config.heads, "E": config.head_width}
        for name, learned in recipe.learned.items():
            axes = self._axes(learned.axes)
            self.register_parameter(f"W_{name}", nn.Parameter(torch.randn(config.width, *axes) * config.width**-0.5))
            self.register_parameter(f"b_{name}", nn.Parameter(torch.full(axes, learned.bias)))
            setattr(self, f"hook_{name}", HookPoint())
        for name, parameter in recipe.parameters.items():
            self.register_parameter(name, nn.Parameter(parameter.init(self._axes(parameter.axes))))

    def _axes(self, letters: str) -> tuple[int, ...]:
        parts = re.findall(r"[HGE]|\d+", letters)
        if "".join(parts) != letters:
            raise WorkbenchError(f"axes are letters H, G, E and numbers; got {letters!r} in {self.variant.name}")
        return tuple(self.sizes[part] if part in self.sizes else int(part) for part in parts)

    def forward(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Mask, xk: Tensor | None = None
    ) -> tuple[Tensor, AttentionMap]:
        """As every mixer, with q and x of all positions that the mask's offset counts; ``xk`` is the input of keys where it
        differs from x."""
        lo, keys = mask.offset, mask.keys
        xk = x if xk is None else xk
        if keys is None:
            z, amap = self._whole(x, xk, q, k, v)
        else:
            places = [row.nonzero()[:, 0] for row in keys]
            parts: list[Tensor] = []
            found: list[AttentionMap] = []
            for b, at in enumerate(places):
                one = slice(b, b + 1)
                part, some = self._whole(x[one, at], xk[one, at], q[one, :, at], k[one, :, at], v[one, :, at])
                parts.append(part.new_zeros(1, *q.shape[1:3], v.shape[3]).index_copy(2, at, part))
                found.append(some)
            z = torch.cat(parts)
            amap = BatchMap(found, places, q.shape[2])
        if lo:
            return z[:, :, lo:], LastRowsMap(amap, lo)
        return z, amap

    def arguments(self, x: Tensor, xk: Tensor, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
        """What the operator gets for sequences: the layer's input x ``[B, N, D]`` (of keys ``xk``), queries, keys, values."""
        given: dict[str, Any] = {"q": q, "k": k, "v": v, "mask": Mask(causal=self.causal)}
        for name, learned in self.recipe.learned.items():
            given[name] = self._learned(name, learned, xk if learned.axes.startswith("G") else x)
        given |= {name: getattr(self, name) for name in self.recipe.parameters}
        if self.recipe.prepare is not None:
            plain = x.mean(2) if x.ndim == 4 else x
            given = self.recipe.prepare({**given, "grid": self.grid, "x": plain})
        return given

    def _whole(self, x: Tensor, xk: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, AttentionMap]:
        out, amap = self.variant(**self.arguments(x, xk, q, k, v))
        z = out if self.recipe.finish is None else self.recipe.finish(out)
        if z.shape != (*q.shape[:3], v.shape[3]):
            raise Refused(f"{self.variant.name} returned {list(z.shape)} for values {list(v.shape)}")
        return z, amap

    def _learned(self, name: str, learned: Learned, x: Tensor) -> Tensor:
        """``[B, N, D]``, or ``[B, N, heads, D]`` with an input per head, to ``[B, heads, N, ...]``."""
        weight, bias = getattr(self, f"W_{name}"), getattr(self, f"b_{name}")
        if x.ndim == 4 and weight.shape[1] == x.shape[2]:
            made = torch.einsum("bnhd,dh...->bnh...", x, weight) + bias
        else:
            made = torch.tensordot(x.mean(2) if x.ndim == 4 else x, weight, 1) + bias
        made = learned.activation(made) if learned.activation is not None else made
        return getattr(self, f"hook_{name}")(made).transpose(1, 2)
