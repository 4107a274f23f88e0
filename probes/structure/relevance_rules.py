"""How gradients are changed so that gradient times input becomes layer-wise relevance propagation.

A rule changes the backward pass alone: every function here hands on the value that the model computed, bit for bit.

- A norm divides by a size that is taken as given: norm(x) = w (x - mean) / size + b is linear in x (``folding`` finds w).
- An activation is its secant: f(x) = (f(x) / x) x, the quotient taken as given.
- Factors of a product get equal shares: of the gated MLP act(g) u one half each, and in ``attnlrp`` of z = A v too, so that
  values get half; scores are the products q k, whose factors get half of A's half. Softmax keeps its gradient.
- ``relp`` takes the pattern A as given instead: values get all, queries and keys nothing.
- A gate on heads is taken as given (the signal takes all): a sigmoid is 1/2 at zero and has no secant there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import Refused, UnknownName
from workbench.models.families import submodule
from workbench.models.hf import HFModel
from workbench.models.layers import attention_layers
from workbench.models.native import NativeModel
from workbench.models.protocol import Edit, Model
from workbench.models.taps import Globals, places
from workbench.probes.heads.weights import folding
from workbench.sites import Site

RULES = ("attnlrp", "relp", "gradient")


@dataclass(frozen=True)
class _Block:
    """Paths of a block's norms and of its MLP's activation, and whether the MLP multiplies that with a second projection."""

    norms: tuple[str, ...]
    activation: str
    gated: bool = False


_LLAMA = _Block(("input_layernorm", "post_attention_layernorm"), "mlp.act_fn", gated=True)
_QWEN3 = _Block((*_LLAMA.norms, "self_attn.q_norm", "self_attn.k_norm"), "mlp.act_fn", gated=True)
_BLOCKS = {
    "LlamaDecoderLayer": _LLAMA,
    "MistralDecoderLayer": _LLAMA,
    "Qwen2DecoderLayer": _LLAMA,
    "Qwen3DecoderLayer": _QWEN3,
    "GPT2Block": _Block(("ln_1", "ln_2"), "mlp.act"),
}
_NATIVE = _Block(("ln1", "ln2"), "mlp.act")


@contextmanager
def propagating(model: Model, rule: str) -> Iterator[dict[Site | str, Edit]]:
    """Edits for ``model.run`` that apply a rule; norms and activations follow it inside of the block, in this thread.

    Serves native models of softmax and gated softmax, and Hugging Face models of the families Llama, Mistral, Qwen2, Qwen3
    and GPT-2. Others are refused, because a product or a norm that is not known would be propagated wrongly.
    """
    if rule not in RULES:
        raise UnknownName("rule", rule, RULES)
    blocks, final = _parts(model)
    if rule == "gradient":
        yield {}
        return
    hooks: dict[nn.Module, Callable[..., Any]] = {final: _norm(final)}
    edits: dict[Site | str, Edit] = {}
    for layer, (block, made) in enumerate(blocks):
        for path in made.norms:
            norm = submodule(block, path)
            if norm is not None:
                hooks[norm] = _norm(norm)
        for kind in ("q", "k"):
            edits[Site(kind, layer)] = torch.detach if rule == "relp" else _quarter
        if rule == "attnlrp":
            edits[Site("v", layer)] = _half
        activation = submodule(block, made.activation) if getattr(block, "mlp", None) is not None else None
        if activation is not None:
            hooks[activation] = _secant
        if made.gated:
            edits[Site("mlp_post", layer)] = _half
        if isinstance(model, NativeModel) and model.net.config.mixer == "gated-softmax":
            edits[Site("gate", layer)] = torch.detach
    here = threading.get_ident()
    placed = []
    try:
        for module, act in hooks.items():
            placed.append(module.register_forward_hook(_only_in(here, act)))
        yield edits
    finally:
        for handle in placed:
            handle.remove()


def _parts(model: Model) -> tuple[list[tuple[nn.Module, _Block]], nn.Module]:
    """The blocks with their description, and the last norm."""
    if isinstance(model, NativeModel):
        config = model.net.config
        if config.mixer not in ("softmax", "gated-softmax") or config.grid is not None:
            what = "images" if config.grid is not None else f"mixer {config.mixer!r}"
            raise Refused(f"{model.name}: relevance has rules for softmax attention over tokens, none for {what}")
        blocks: Any = model.net.blocks
        return [(block, _NATIVE) for block in blocks], model.net.ln_final
    if not isinstance(model, HFModel):
        raise Refused(f"relevance has rules for native and Hugging Face models; got a {type(model).__name__}")
    layers = attention_layers(model.model)
    found = places(model.model, layers)
    for place in found:
        name = type(place.block).__name__
        if name not in _BLOCKS:
            raise Refused(f"{model.family}: relevance has no rules for a {name}; it has for {', '.join(_BLOCKS)}")
    final = Globals(model.model, layers).modules.get(("final_norm", ""))
    if final is None:
        raise Refused(f"{model.family}: the norm before its W_U is not known")
    return [(place.block, _BLOCKS[type(place.block).__name__]) for place in found], final


def _only_in(thread: int, act: Callable[..., Any]) -> Callable[..., Any]:
    """Runs of the same model in other threads keep their gradients."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return act(args[0], output) if threading.get_ident() == thread and output.requires_grad else None

    return hook


def _norm(norm: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Asked before any hook is there, since a norm's linear part is found by running it. In the blocks that are served only
    the native model's absent norm has no weight."""
    weight = next(iter(norm.parameters()), None)
    if weight is None:
        return lambda x, output: output
    fold = folding(norm, weight.numel())

    def act(x: Tensor, output: Tensor) -> Tensor:
        plain = fold.linear(x)
        least = torch.finfo(x.dtype).tiny
        size = plain.norm(dim=-1, keepdim=True) / (output - fold.shift).norm(dim=-1, keepdim=True).clamp(min=least)
        return _As.apply(output.detach(), plain / size.detach().clamp(min=least))

    return act


def _secant(x: Tensor, output: Tensor) -> Tensor:
    slope = torch.where(x == 0, torch.zeros_like(x), output / x).detach()
    return _As.apply(output.detach(), x * slope)


def _half(x: Tensor) -> Tensor:
    return _Scaled.apply(x, 0.5)


def _quarter(x: Tensor) -> Tensor:
    return _Scaled.apply(x, 0.25)


class _Scaled(torch.autograd.Function):
    """x, with its gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


class _As(torch.autograd.Function):
    """A value that gradients pass as if it were another tensor."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, stands_for: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, grads[0]
