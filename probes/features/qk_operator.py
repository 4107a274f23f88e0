"""How a head makes a query or a key out of the stream: norm, projection, norm on the head, rotation, all linear once the sizes of
the norms are held.

    q(p) = ( (L(x(p)) / size(p) + shift) W_Q + b_Q ) through the norm on queries, through R_p

R_p is the rotation that the model itself applies at position p: of native models by their angles, of Hugging Face models by their
own function, called on a basis with the cosines and sines of the very run. Partial and scaled rotations are what they are there.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from workbench.errors import Refused
from workbench.models.hf import HFModel
from workbench.models.native import NativeModel
from workbench.models.protocol import Model
from workbench.probes.features.layer_weights import Norm, Projection, place_of

_ROTATE = "apply_rotary_pos_emb"


class Rotations:
    """The rotations of one layer in one run: rotated = q @ ``matrix(p)`` ``[E, E]``, None where nothing is rotated."""

    def __init__(self, model: Model, layer: int) -> None:
        self.model, self.layer = model, layer
        self._angles: list[tuple[Tensor, Tensor]] = []
        self._module: Any = None
        if isinstance(model, HFModel):
            place = place_of(model, layer)
            self._module = place.layer.module
            self._turned = bool(place.wiring and place.wiring.rotary)
        else:
            self._turned = isinstance(model, NativeModel) and model.net.config.positions == "rotary"

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside of the block, the cosines and sines that the layer is given by this thread's run are kept."""
        if self._module is None or not self._turned:
            yield
            return
        here = threading.get_ident()

        def see(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found = kwargs.get("position_embeddings")
            if threading.get_ident() == here and isinstance(found, tuple) and len(found) == 2:
                self._angles[:] = [(found[0].detach(), found[1].detach())]

        handle = self._module.register_forward_pre_hook(see, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def matrix(self, position: int, like: Tensor) -> Tensor | None:
        """The rotation at a position, for heads as wide as ``like`` ``[..., E]``."""
        if not self._turned:
            return None
        width = like.shape[-1]
        basis = torch.eye(width, dtype=like.dtype, device=like.device)
        if isinstance(self.model, NativeModel):
            half = width // 2
            rates = self.model.net.config.theta ** (-torch.arange(half, dtype=torch.float64) / half)
            angle = (position * rates).to(like.device)
            cos, sin = angle.cos().to(like), angle.sin().to(like)
            a, b = basis.chunk(2, dim=-1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        where = f"layer {self.layer} of {self.model.name}"
        turn = inspect.unwrap(type(self._module).forward).__globals__.get(_ROTATE)
        if turn is None or not self._angles:
            raise Refused(
                f"{where} rotates its queries and keys, and how is not known: it has no {_ROTATE} and angles to ask"
            )
        cos, sin = (part[:, position : position + 1].to(like) for part in self._angles[0])
        try:
            turned = turn(basis[None, :, None], basis[None, :, None], cos, sin)[0]
        except (TypeError, RuntimeError) as error:
            raise Refused(f"{where}: its {_ROTATE} cannot be asked for its rotation: {error}") from error
        return turned[0, :, 0]


class Side:
    """What one head of a layer makes of the stream at one position, as a function of parts of the stream."""

    def __init__(
        self, before: Norm, projection: Projection, x: Tensor, head: int, turn: Tensor | None, where: str
    ) -> None:
        """``before``: the norm in front of the layer; ``x`` ``[D]``: the stream at the position, whose sizes are held;
        ``turn``: the rotation there."""
        self.before, self.turn = before, turn
        self.weight = projection.weight[head].to(x)
        self.size = self.before.sizes(x[None], where)[0]
        normed = self.before.fold.linear(x) * self.size + self.before.fold.shift.to(x)
        bias = projection.bias.to(x)
        every = torch.einsum("d,hde->he", normed, projection.weight.to(x)) + bias
        self.scale, self.centred, self.shift = None, False, None
        if projection.norm is not None:
            norm = projection.norm
            given = every.flatten()[None] if projection.joint else every[head][None]
            size = norm.sizes(given, where)[0]
            if projection.joint and norm.fold.centred:
                raise Refused(f"{where}: a norm over all heads that takes their mean away mixes heads")
            scale, shift = norm.fold.scale.to(x), norm.fold.shift.to(x)
            scale, shift = (part.view(every.shape)[head] if projection.joint else part for part in (scale, shift))
            self.scale, self.centred, self.shift = scale * size, norm.fold.centred, shift
        self.constant = self._turned(self._normed(self.before.fold.shift.to(x) @ self.weight + bias[head]))
        if self.shift is not None:
            self.constant = self.constant + self._turned(self.shift)

    def of_stream(self, parts: Tensor) -> Tensor:
        """Parts ``[A, D]`` of the stream as parts ``[A, E]`` of the query or key; ``constant`` ``[E]`` is what remains."""
        return self.of_normed(self.before.fold.linear(parts) * self.size)

    def of_normed(self, parts: Tensor) -> Tensor:
        """The same for parts of the normed stream, its shift left out."""
        return self._turned(self._normed(parts @ self.weight))

    def _normed(self, made: Tensor) -> Tensor:
        if self.scale is None:
            return made
        made = made - made.mean(-1, keepdim=True) if self.centred else made
        return made * self.scale

    def _turned(self, made: Tensor) -> Tensor:
        return made if self.turn is None else made @ self.turn
