"""The folder of SAELens 6, which is also ours: names of its files, which kind is which architecture, what a coder came from.

``cfg.json`` holds the architecture, its sizes and, under ``metadata``, where the coder belongs; SAELens keeps unknown metadata,
and ours stand there under ``workbench``. ``sae_weights.safetensors`` holds exactly the tensors of the architecture.
``workbench.safetensors`` holds what our kind has besides; SAELens does not look at it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from workbench.coders.catalogue import coder_kinds
from workbench.coders.coder import Coder
from workbench.coders.kinds.groupmax import GroupMax
from workbench.coders.kinds.matching_pursuit import MatchingPursuit
from workbench.coders.kinds.signed_topk import AbsTopK, RawTopK
from workbench.coders.kinds.temporal import Temporal
from workbench.coders.kinds.threshold import Threshold

CFG, WEIGHTS, OWN, SPARSITY, SCALER = (
    "cfg.json", "sae_weights.safetensors", "workbench.safetensors", "sparsity.safetensors", "activation_scaler.json",
)  # fmt: skip
VERSION = "6.0.0"
"""The version of SAELens whose ``cfg.json`` we write; without one it takes a file for an old one and drops metadata."""

ARCHITECTURES = {
    "relu": "standard", "p-anneal": "standard", "discrete": "standard",
    "gated": "gated",
    "topk": "topk",
    "batchtopk": "jumprelu", "matryoshka": "jumprelu", "jumprelu": "jumprelu", "jumprelu-tanh": "jumprelu",
    "threshold": "jumprelu",
    "abstopk": "abstopk", "matching-pursuit": "matching_pursuit", "temporal": "temporal",
}  # fmt: skip
"""The SAELens architecture whose inference is that of our kind."""

TRANSCODERS = {
    ("standard", False): "transcoder", ("standard", True): "skip_transcoder",
    ("jumprelu", False): "jumprelu_transcoder", ("jumprelu", True): "jumprelu_skip_transcoder",
}  # fmt: skip
"""By architecture of the activation and whether there is a skip term."""

ACROSS = tuple(TRANSCODERS.values())
RUNTIME = ("layer_norm", "constant_norm_rescale", "constant_scalar_rescale")
"""Normalisations that SAELens does on every row."""
BEFORE = ("expected_average_only_in", "covariance_whitening")
"""Normalisations that SAELens does while it trains and expects to be folded into the weights, or done by the caller."""


@dataclass(frozen=True, eq=False)
class Source:
    """What a coder was read from, where its weights do not say it: kept so that it can be written again bit by bit.

    ``tensors`` and ``cfg`` are those of the file if the coder's weights were made from them by rounding operations, ``digest`` is
    that of the weights so made: as long as it holds, the file's own are written.
    """

    log_sparsity: Tensor | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    cfg: dict[str, Any] = field(default_factory=dict)
    digest: str = ""


def source(coder: Coder) -> Source:
    """What ``coder`` was read from; empty if it was made here."""
    found = vars(coder).get("source")
    return found if isinstance(found, Source) else Source()


def kinds_in_files() -> dict[str, type[Coder]]:
    """All kinds that a file can hold, by name: those that are trained and those that only come from other tools."""
    others: tuple[type[Coder], ...] = (Threshold, AbsTopK, RawTopK, GroupMax, MatchingPursuit, Temporal)
    return {**coder_kinds(), **{kind.kind: kind for kind in others}}


def forms(architecture: str, *, tied: bool = True, layers: int = 1) -> dict[str, tuple[str | int, ...]]:
    """The tensors of an architecture and their shapes: D read, O written, F features (temporal coders: J key features)."""
    skip, out = "skip" in architecture, "O" if architecture in ACROSS else "D"
    weights: dict[str, tuple[str | int, ...]] = {"W_enc": ("D", "F"), "W_dec": ("F", out), "b_dec": (out,)}
    if architecture == "gated":
        return {**weights, "b_gate": ("F",), "b_mag": ("F",), "r_mag": ("F",)}
    if architecture in ("matching_pursuit", "temporal"):
        if architecture == "matching_pursuit" or tied:
            del weights["W_enc"]
        for layer in range(layers if architecture == "temporal" else 0):
            for name, out in (("k_ctx", "J"), ("q_target", "J"), ("v_ctx", "F"), ("c_proj", "F")):
                weights[f"attn_layers.{layer}.{name}.weight"] = (out, "F")
                weights[f"attn_layers.{layer}.{name}.bias"] = (out,)
        return weights
    weights["b_enc"] = ("F",)
    if skip:
        weights["W_skip"] = ("O", "D")
    if "jumprelu" in architecture:
        weights["threshold"] = ("F",)
    if "batchtopk" in architecture:
        weights["topk_threshold"] = ()
    return weights
