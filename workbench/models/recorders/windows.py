"""Attention in shifted windows of an image: Swin, Swin V2, Donut, MaskFormer, Swin2SR.

The attention module sees windows as examples of their own; the block around it rolls the image, cuts it and puts it together
again. ``Windows`` is that order, read off the block while it runs, and turns what the module sees into maps and tensors over the
image, row by row. Where a side is no multiple of the window the block pads the image with zeros, which take part like any
token: maps and sites then have all positions of the padded image.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from workbench.errors import Refused
from workbench.maps import DenseMap
from workbench.models.current import current
from workbench.models.recorders.base import Watch
from workbench.models.recorders.state import work

if TYPE_CHECKING:
    from workbench.models.layers import AttentionLayer
    from workbench.models.session import Session
    from workbench.sites import Site

_SOFTMAX = (torch.softmax, Tensor.softmax, torch.nn.functional.softmax)


class Windows:
    """``places`` int64 ``[N]``: which position of the image stands at each place of the windows laid end to end; ``size``: tokens
    of a window."""

    def __init__(self, places: Tensor, size: int) -> None:
        self.places, self.size = places, size
        self._back = places.argsort()

    def join(self, x: Tensor) -> Tensor:
        """``[B W, S, ...]`` as ``[B, N, ...]`` in the order of the image."""
        return x.reshape(-1, len(self.places), *x.shape[2:])[:, self._back]

    def split(self, x: Tensor) -> Tensor:
        """The inverse of ``join``."""
        return x[:, self.places].reshape(-1, self.size, *x.shape[2:])

    def spread(self, weights: Tensor) -> Tensor:
        """Patterns ``[B W, H, S, S]`` of windows as one of the image, ``[B, H, N, N]``."""
        n = len(self.places)
        parts = weights.unflatten(0, (-1, n // self.size)).transpose(1, 2).flatten(2)
        empty = parts.new_zeros(*parts.shape[:2], n * n)
        return empty.scatter(-1, self._pairs.expand_as(parts), parts).unflatten(-1, (n, n))

    def gather(self, pattern: Tensor, site: Site) -> Tensor:
        """The inverse of ``spread``; refuses a pattern that reaches out of its windows."""
        count = len(self.places) // self.size
        parts = pattern.flatten(2).gather(-1, self._pairs.expand(*pattern.shape[:2], -1))
        if int(parts.count_nonzero()) != int(pattern.count_nonzero()):
            raise Refused(f"the edit of {site} puts weight on tokens of other windows, which the model cannot reach")
        return parts.unflatten(-1, (count, self.size, self.size)).transpose(1, 2).flatten(0, 1)

    @property
    def _pairs(self) -> Tensor:
        """Places of all pairs of a window in the flattened pattern of the image."""
        within = self.places.view(-1, self.size)
        return (within[:, :, None] * len(self.places) + within[:, None, :]).flatten()


def windows_of(block: Any, sides: tuple[int, int]) -> Windows:
    """The windows of a block whose image has these sides; the block has fixed its own window and shift for them."""
    window, shift = int(block.window_size), int(block.shift_size)
    rows, columns = (-(-int(side) // window) * window for side in sides)
    device = next(block.parameters()).device
    places = torch.arange(rows * columns, device=device).view(rows, columns).roll((-shift, -shift), (0, 1))
    parts = places.view(rows // window, window, columns // window, window).transpose(1, 2)
    return Windows(parts.flatten(), window * window)


def is_windowed(block: nn.Module) -> bool:
    """Whether a block cuts its image into shifted windows."""
    named = inspect.signature(type(block).forward).parameters
    return "input_dimensions" in named and hasattr(block, "window_size") and hasattr(block, "shift_size")


@contextmanager
def gridding(layers: Sequence[AttentionLayer], model: nn.Module, session: Session) -> Iterator[None]:
    """Note the sides of the image of those of ``layers`` whose block works in windows while the model runs."""
    with ExitStack() as undo:
        for layer in layers:
            block = model.get_submodule(layer.block)
            if is_windowed(block):
                undo.callback(block.register_forward_pre_hook(_reader(layer.module, session), with_kwargs=True).remove)
        yield


def _reader(module: nn.Module, session: Session) -> Callable[..., None]:
    def read(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if current() is session:
            given = inspect.signature(block.forward).bind(*args, **kwargs).arguments
            session.grids[id(module)] = block, given["input_dimensions"]

    return read


class ShiftedWindows(Watch):
    """Softmax inside of windows, as executed: cosine or scaled scores, position bias and the mask of the shift included."""

    mixer = "softmax + shifted windows"
    missing = "editing pattern"
    sites = frozenset({"v", "z"})
    statistics = Watch.statistics | {"entropy"}

    @classmethod
    def heads(cls, module: Any) -> tuple[int, int, int]:
        return module.num_attention_heads, module.num_attention_heads, module.attention_head_size

    @classmethod
    def causal(cls, module: Any) -> bool:
        return False

    @classmethod
    def quadratic(cls, module: Any) -> bool:
        return False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        mine = current() is self.session  # and not what an edit runs
        if func in (torch.matmul, Tensor.matmul, Tensor.__matmul__) and self.met and mine:
            v = self.session.on_values(self.layer, args[1].transpose(1, 2)).transpose(1, 2)
            z = func(args[0], v, **(kwargs or {}))
            return self.session.on_output(self.layer, z.transpose(1, 2)).transpose(1, 2)
        result = func(*args, **(kwargs or {}))
        if func in _SOFTMAX and not self.met and mine:
            self.met = True
            if self.session.wants_map(self.layer):
                with torch.no_grad():
                    self.session.on_built(self.layer, DenseMap(*work(result)))
        return result
