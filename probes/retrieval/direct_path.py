"""The direct path from a head to a logit: W_O of every head, the unembedding of a token, and what the final norm does.

    logit of y  =  u_y . norm(residual stream),   residual stream = ... + sum over heads of z_h W_O^h + ...

``norm="none"`` leaves the norm out: u_y is the token's column of W_U, as in the authors' code of LOCOS (arXiv 2607.01002).
``norm="frozen"`` keeps the scale that the norm had at the very token (direct logit attribution): the norm is then linear, and
contributions are in logits. The gains of the norm are read off its inputs and outputs, so that any model which serves
``hook_resid_post`` and its output can be asked, and a norm that is neither RMS nor layer norm is refused.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.protocol import Model

NORMS = ("none", "frozen")
_FITS = 1e-2


class Norm(NamedTuple):
    """A final norm as a linear map: ``kind`` is ``none``, ``rms`` or ``layer``; ``gain`` ``[D]``."""

    kind: str
    gain: Tensor

    def through(self, unembedding: Tensor, stream: Tensor) -> Tensor:
        """The direction ``[B, D]`` in the residual stream ``[B, D]`` that raises the logits of ``unembedding`` ``[B, D]``, with
        the scale of the norm frozen."""
        direction = unembedding * self.gain
        if self.kind == "none":
            return direction
        if self.kind == "rms":
            return direction / stream.square().mean(-1, keepdim=True).sqrt()
        direction = direction - direction.mean(-1, keepdim=True)
        return direction / (stream - stream.mean(-1, keepdim=True)).square().mean(-1, keepdim=True).sqrt()


def output_weights(model: Model, layer: int) -> Tensor:
    """``W_O`` of a layer, ``[H, E, D]``."""
    return _weight(model, "W_O", layer)


def unembeddings(model: Model, tokens: Tensor) -> Tensor:
    """Columns of ``W_U`` for the tokens ``[B]``: ``[B, D]``."""
    table = _weight(model, "W_U", None)
    return table[:, tokens.to(table.device)].T


def norm_of(stream: Tensor, normalised: Tensor) -> Norm:
    """The final norm, from residual streams ``[N, D]`` and what it made of them ``[N, D]``; N of two or more."""
    x, y = (part.detach().double().cpu().flatten(0, -2) for part in (stream, normalised))
    if len(x) < 2:
        raise WorkbenchError("the final norm is read off two tokens or more; got one")
    centred = x - x.mean(-1, keepdim=True)
    scaled = {
        "none": x,
        "rms": x / x.square().mean(-1, keepdim=True).sqrt(),
        "layer": centred / centred.square().mean(-1, keepdim=True).sqrt(),
    }
    size = float(y.square().mean().sqrt())
    for kind, unit in scaled.items():
        if kind == "none":
            gain, shift = torch.ones_like(unit[0]), torch.zeros_like(unit[0])
        else:
            middle = unit.mean(0) if kind == "layer" else torch.zeros_like(unit[0])
            level = y.mean(0) if kind == "layer" else torch.zeros_like(unit[0])
            gain = ((unit - middle) * (y - level)).sum(0) / (unit - middle).square().sum(0).clamp(min=1e-300)
            shift = level - gain * middle
        if float((unit * gain + shift - y).square().mean().sqrt()) <= _FITS * size:
            return Norm(kind, gain)
    raise Refused(
        "the final norm is neither absent nor an RMS nor a layer norm, so that its scale cannot be frozen; use norm='none'"
    )


def check_norm(norm: str) -> None:
    if norm not in NORMS:
        raise UnknownName("treatment of the final norm", norm, NORMS)


def _weight(model: Model, name: str, layer: int | None) -> Tensor:
    weight: Any = getattr(model, "weight", None)
    if weight is None:
        raise Refused(
            f"{model.name} does not tell its weights: the direct path to the logits needs weight('W_O', layer)"
        )
    found = weight(name) if layer is None else weight(name, layer)
    assert isinstance(found, Tensor)
    return found.detach()
