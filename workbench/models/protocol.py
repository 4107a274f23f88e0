"""What a model must answer, whoever made it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from workbench.errors import WorkbenchError

if TYPE_CHECKING:
    import pandas as pd

    from workbench.captures import Capture
    from workbench.run import Run
    from workbench.sites import Site

Edit = Callable[[Tensor], Tensor]
"""An edit receives the tensor of its site and returns its replacement (same shape); ``None`` returned is an error."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model: L layers, H query heads, G kv heads, D model width, E head width, V vocabulary, and the longest
    input it accepts (``None`` if positions are unbounded). ``causal`` tells whether position q sees keys k > q, ``trained``
    the tokens of the longest input in training, where that is known and shorter than what the model accepts."""

    layers: int
    heads: int
    kv_heads: int
    width: int
    head_width: int
    vocab: int | None
    context: int | None
    causal: bool = True
    trained: int | None = None


@dataclass(frozen=True)
class Tokens:
    """Token ids ``[B, T]`` and which of them are real (``mask`` ``[B, T]`` bool, False on padding).

    ``labels[b][t]`` is the text of a token for display. ``inputs`` carries further tensors of the model's own forward
    (``pixel_values``, ``decoder_input_ids`` ...); models without token ids have an empty ``ids`` of shape ``[B, 0]``.
    """

    ids: Tensor
    mask: Tensor
    labels: tuple[tuple[str, ...], ...] = ()
    inputs: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or self.ids.dtype not in (torch.int64, torch.int32):
            raise WorkbenchError(f"token ids are integers of shape [B, T]; got {self.ids.dtype} {list(self.ids.shape)}")
        if self.mask.shape != self.ids.shape or self.mask.dtype != torch.bool:
            raise WorkbenchError(
                f"token mask is bool {list(self.ids.shape)}; got {self.mask.dtype} {list(self.mask.shape)}"
            )

    def __repr__(self) -> str:
        texts, length = self.ids.shape
        inputs = "".join(f", {name} {list(tensor.shape)}" for name, tensor in self.inputs.items())
        return f"Tokens({texts} x {length:,}, {int(self.mask.sum()):,} real{inputs})"

    @classmethod
    def of(cls, ids: Tensor, tokenizer: Any = None) -> Tokens:
        """Tokens without padding; labels from ``tokenizer.convert_ids_to_tokens`` where there is one."""
        ids = torch.as_tensor(ids)
        ids = ids[None] if ids.ndim == 1 else ids
        labels = (
            tuple(tuple(map(str, tokenizer.convert_ids_to_tokens(row))) for row in ids.tolist()) if tokenizer else ()
        )
        return cls(ids, torch.ones_like(ids, dtype=torch.bool), labels)


@dataclass(frozen=True)
class LayerRecord:
    """What is known about one attention layer before anything runs."""

    layer: int | str
    mixer: str
    """``softmax``, ``softmax + window 128``, ``softmax + sink`` ..., or the class name if it is not modelled."""
    route: str
    """How the map is obtained: ``attention interface``, ``recorder``, ``native``, or ``none``."""
    exactness: str
    """``exact``, ``jacobian``, ``approximation``, or ``none``."""
    missing: str = ""
    """What cannot be captured, and why; empty if nothing is missing."""


@dataclass(frozen=True)
class Manifest:
    """Per layer: the mixer, the capture route, its exactness, what cannot be captured and why."""

    model: str
    layers: tuple[LayerRecord, ...]
    sites: tuple[str, ...] = ()

    def frame(self) -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame([vars(record) for record in self.layers])

    def _repr_html_(self) -> str:
        from workbench.fragments import facts, table_view

        return table_view(self.frame(), f"Manifest of {self.model}", facts({"sites": ", ".join(self.sites)}))


@runtime_checkable
class Model(Protocol):
    """The protocol of every wrapped model; ``tests/conformance/test_models.py`` is its suite."""

    name: str
    shape: Shape
    tokenizer: Any

    def tokens(self, texts: str | Sequence[str]) -> Tokens:
        """Tokenize; several texts are padded to one length."""
        ...

    def run(
        self,
        tokens: str | Sequence[str] | Tensor | Tokens | Mapping[str, Tensor],
        read: Iterable[Site | str] = (),
        edit: Mapping[Site | str, Edit | Tensor] = {},
        maps: Capture | None = None,
        *,
        logits: str | None = "all",
        cache: Any = None,
    ) -> Run:
        """One forward pass, as the model always runs, in the caller's gradient mode.

        ``read``: sites whose tensors are returned. ``edit``: site -> replacement tensor or function of the tensor; alive
        for this run only. ``maps``: what attention to capture. ``logits``: ``"all"``, ``"last"`` or ``None``.
        ``cache``: ``True`` to obtain a key-value cache in ``Run.cache``, or such a cache to continue from.
        """
        ...

    def manifest(self) -> Manifest:
        """What can be captured, layer by layer."""
        ...
