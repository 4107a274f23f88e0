"""Recorder of FNet: the real part of the Fourier transform over tokens and channels.

The transform along the channels mixes no tokens and belongs to the values (``fourier_values`` of the module's input);
what is left is one map for all of them, cosines over their real parts and sines over their imaginary ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from workbench.errors import Refused
from workbench.models.recorders.base import Recorder
from workbench.patterns.fourier import FourierMap

if TYPE_CHECKING:
    from workbench.models.layers import AttentionLayer
    from workbench.models.session import Session


class Fourier(Recorder):
    mixer = "Fourier transform over tokens and channels"
    missing = "mixing of channels (it is in the values: fourier_values of the input); editing pattern"
    sites = frozenset({"z"})
    state = True

    @classmethod
    def heads(cls, module: Any) -> tuple[int, int, int]:
        return 1, 1, 0

    @classmethod
    def causal(cls, module: Any) -> bool:
        return False

    @classmethod
    def check(cls, layer: AttentionLayer, session: Session) -> None:
        if session.real(layer) is not None and session.wants_map(layer):
            raise Refused(
                f"layer {layer.key} of {session.family}: {layer.name} takes padding for text, on either side; "
                "run the texts one at a time"
            )

    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = forward(*args, **kwargs)
        z = output[0]
        if self.session.wants_map(self.layer):
            with torch.no_grad():
                b, n, _ = z.shape
                found = FourierMap(b, 1, n, dtype=z.dtype, device=z.device)
                self.session.on_built(self.layer, found)
        if not self.session.touches(self.layer, "z"):
            return output
        return (self.session.on_output(self.layer, z[:, :, None])[:, :, 0], *output[1:])
