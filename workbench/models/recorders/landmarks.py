"""Recorder of Nyströmformer: softmax through landmarks, and a convolution of the values along the tokens.

    M = F A^+ B + C      F [N, L] from landmarks to tokens, A^+ [L, L] the iterated pseudo-inverse of their softmax,
                         B [L, N] from tokens to landmarks, C a band

Where there are as many landmarks as positions the model takes plain softmax in the place of F A^+ B.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.errors import Refused
from workbench.maps import DenseMap
from workbench.models.recorders.state import work
from workbench.models.recorders.text import PRODUCTS, SOFTMAX, TextWatch
from workbench.patterns.algebra import ProductMap, SumMap
from workbench.patterns.toeplitz import ToeplitzMap

if TYPE_CHECKING:
    from workbench.models.layers import AttentionLayer
    from workbench.models.session import Session


class Nystroem(TextWatch):
    """The factors as executed. The band knows no mask, so that padded tokens act on the real ones near them: the map
    holds those weights, and its padded rows are zero. With landmarks, transformers runs no padded text at all: its mask
    is one over all pairs of tokens."""

    mixer = "Nyström softmax + convolution of values"
    missing = "editing pattern; padded texts (the mask of transformers does not fit the landmarks)"
    statistics = TextWatch.statistics - {"entropy"}

    @classmethod
    def named(cls, module: Any) -> str:
        full = module.num_landmarks == module.seq_len
        name = "softmax" if full else f"Nyström softmax ({module.num_landmarks} landmarks)"
        return name if module.conv_kernel_size is None else f"{name} + convolution of values"

    @classmethod
    def check(cls, layer: AttentionLayer, session: Session) -> None:
        module: Any = layer.module
        if session.real(layer) is not None and module.num_landmarks != module.seq_len and session.wants_map(layer):
            raise Refused(
                f"layer {layer.key} of {session.family}: {layer.name} runs no padded text, as the mask that transformers makes "
                "of padding does not fit its landmarks; run it without attention_mask"
            )

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.kernels: list[Tensor] = []
        self.inverse: Tensor | None = None
        self.full: AttentionMap | None = None

    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module, n = self.module, self.given["hidden_states"].shape[1]
        if module.num_landmarks != module.seq_len and n != module.seq_len:
            raise Refused(
                f"layer {self.layer.key} of {self.session.family}: {self.layer.name} makes its landmarks of "
                f"{module.seq_len} positions (segment_means_seq_len) and the input has {n}; pad it to {module.seq_len}"
            )
        return super().run(forward, args, kwargs)

    def seen(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if func in SOFTMAX:
            self.kernels.append(result)
        elif func in PRODUCTS and len(self.kernels) == 3 and args[0] is self.kernels[0]:
            self.inverse = args[1]
        elif func in PRODUCTS and not self.kernels and self.module.num_landmarks == self.module.seq_len:
            q, k = args[0], args[1].transpose(-1, -2)
            if self.session.wants_map(self.layer):
                mask, bias = self.session.masks.resolve(
                    self.layer, self.given.get("attention_mask"), q, k, "eager", {"is_causal": False}
                )
                self.full = self.session.softmax(self.layer, q, k, mask, scale=1.0, bias=bias)

    def build(self) -> None:
        n = self.given["hidden_states"].shape[1]
        parts: list[AttentionMap] = []
        if self.full is not None:
            parts.append(self.full)
        elif self.inverse is not None:
            first, second, inverse = work(self.kernels[0], self.kernels[2], self.inverse)
            shown = self.shown(n, first)
            left = ProductMap(
                DenseMap(first * shown[..., None], offset=0), DenseMap(inverse, offset=0, sign="signed", row_sum="free")
            )
            parts.append(ProductMap(left, DenseMap(second, offset=0)))
        if parts and self.module.conv_kernel_size is not None:
            (kernel,) = work(self.module.conv.weight[None, :, 0, :, 0].flip(-1))
            shown = self.shown(n, kernel)
            b, h = parts[0].shape[:2]
            band = ToeplitzMap(kernel, queries=n, keys=n, first=-(kernel.shape[2] // 2), left=shown.expand(b, h, n))
            parts.append(band)
        if parts:
            self.session.on_built(self.layer, parts[0] if len(parts) == 1 else SumMap(*parts, sign="signed"))
