"""Keys chosen by an indexer in front of the attention interface (DeepSeek V3.2): the executed map and what chose it.

The layer's own softmax is seen at the attention interface like any other; its mask there is the model's mask and the choice in
one. The indexer is a submodule: what it ranks by is read while it runs, and the map of the layer is the softmax over the chosen
keys, whose ``native()`` is the indexer's scores.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from workbench.mixers.chosen import RoutedMap
from workbench.mixers.indexer import indexer_map
from workbench.models.current import current
from workbench.models.recorders.base import replaced_forward
from workbench.patterns.softmax import SoftmaxMap

if TYPE_CHECKING:
    from workbench.models.layers import AttentionLayer
    from workbench.models.session import Session

INDEXERS: dict[str, str] = {"DeepseekV32Attention": "indexer", "GlmMoeDsaAttention": "indexer"}
"""The submodule that chooses, by the class of the attention module."""
_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


def indexer_of(module: nn.Module) -> nn.Module | None:
    """The indexer of an attention module, None where it has none of its own."""
    name = next((INDEXERS[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in INDEXERS), None)
    return None if name is None else getattr(module, name)


class Choice:
    """What one call of an indexer ranked by and chose.

    ``mask``: the mask that the attention module was given, as it was. ``q`` ``[B, Q, I, D]``, ``k`` ``[B, 1, D, K]``, ``weights``
    ``[B, Q, 1, I]`` as the indexer multiplies them, and ``scale`` inside of its ReLU; ``indices`` ``[B, Q, S]`` of chosen keys.
    """

    def __init__(self, mask: Any, products: Sequence[tuple[Tensor, Tensor]], indices: Tensor, scale: float) -> None:
        (self.q, self.k), (self.weights, _) = products
        self.mask, self.indices, self.scale = mask, indices.long(), scale

    def map(self, executed: SoftmaxMap) -> RoutedMap:
        """The softmax over the chosen keys, from the one over all keys that the mask shows."""
        s = executed.scores
        keys = executed.shape[3]
        kept = torch.zeros(*self.indices.shape[:2], keys, dtype=torch.bool, device=self.indices.device)
        kept = kept.scatter_(-1, self.indices, True)[:, None]
        scores = indexer_map(
            self.q.transpose(1, 2), self.k[:, 0].transpose(1, 2), self.weights.squeeze(2).transpose(1, 2),
            mask=s.mask, scale=self.scale,
        )  # fmt: skip
        mask = replace(s.mask, dense=kept if s.mask.dense is None else kept & s.mask.dense)
        chosen = SoftmaxMap(s.q, s.k, mask=mask, scale=s.scale, bias=s.bias)
        return RoutedMap(chosen, scores, kept, whole=executed.row_sum == "1")


@contextmanager
def choosing(layers: Sequence[AttentionLayer], session: Session) -> Iterator[None]:
    """Put what the indexers of ``layers`` choose into ``session.choices`` while the model runs."""
    with ExitStack() as undo:
        for layer in layers:
            indexer = indexer_of(layer.module)
            if indexer is not None:
                reader = _Reader(layer.module, session)
                undo.callback(layer.module.register_forward_pre_hook(reader.see_mask, with_kwargs=True).remove)
                undo.enter_context(replaced_forward(indexer, session, reader.forward))
        yield


class _Reader:
    """Looks on while one attention module runs its indexer."""

    def __init__(self, module: nn.Module, session: Session) -> None:
        self.module, self.session = module, session
        self._mask: Any = None

    def see_mask(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if current() is self.session:
            self._mask = inspect.signature(module.forward).bind(*args, **kwargs).arguments.get("attention_mask")

    def forward(self, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        seen, indexer = _Products(), cast(Any, indexer_of(self.module))
        with seen:
            indices = plain(*args, **kwargs)
        scale = float(indexer.softmax_scale)
        self.session.choices[id(self.module)] = Choice(self._mask, seen.found, indices, scale)
        return indices


class _Products(TorchFunctionMode):
    """Notes the operands of the matrix products that are called by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS:
            self.found.append((args[0].detach(), args[1].detach()))
        return func(*args, **(kwargs or {}))
