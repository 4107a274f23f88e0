"""What a capture will take, before it runs: bytes on disk from the model's sizes, seconds from captures that ran before."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.apps.screen import place, runs
from workbench.errors import WorkbenchError
from workbench.jobs.kinds.capture import block_size
from workbench.jobs.revisions import model_folder

if TYPE_CHECKING:
    from workbench.apps.screen.runs import Captured

_FLOAT = 4
_SERIES = 5
"""Numbers that are kept per head and token: received, entropy, distance, the top key and its weight."""


@dataclass(frozen=True)
class Sizes:
    """What a config says: layers, query heads, kv heads and head width; ``context`` the longest input, if it says so."""

    layers: int
    heads: int
    kv_heads: int
    width: int
    context: int | None


def sizes(model: str) -> Sizes | None:
    """The sizes of a model from its config, without loading it; None where the config does not say them."""
    folder = model_folder(model)
    if folder is None:
        return None
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WorkbenchError(f"{folder / 'config.json'} cannot be read: {error}") from None
    config = config.get("text_config") or config

    def first(*names: str) -> Any:
        return next((config[name] for name in names if isinstance(config.get(name), int)), None)

    layers = first("layers", "num_hidden_layers", "n_layer", "num_layers")
    heads = first("heads", "num_attention_heads", "n_head")
    if not layers or not heads:
        return None
    width = first("head_width", "head_dim") or (first("width", "hidden_size", "n_embd") or 64 * heads) // heads
    context = first("context", "max_position_embeddings", "n_positions")
    return Sizes(layers, heads, first("kv_heads", "num_key_value_heads") or heads, width, context)


def disk(of: Sizes, tokens: int, layers: int | None = None) -> int:
    """Bytes of a capture of ``tokens`` tokens: q and k, two block maps, and the numbers per token, in 32 bits."""
    blocks = -(-tokens // block_size(tokens))
    kept = tokens * (of.heads + of.kv_heads) * of.width
    maps = 2 * of.heads * blocks * blocks
    series = _SERIES * of.heads * tokens + of.heads * tokens
    return _FLOAT * (layers or of.layers) * (kept + maps + series)


def seconds(model: str, tokens: int) -> float | None:
    """Seconds of a capture of so many tokens, from those of this model on this machine; None before the first one.

    The time of the nearest length is scaled between its length and the square of it: an upper bound for longer ones, since
    only the attention grows with the square."""
    known = [
        (about["tokens"], about["seconds"]) for about in map(_about, runs.captured()) if about["model"] == _name(model)
    ]
    if not known:
        return None
    length, took = min(known, key=lambda pair: abs(pair[0] - tokens))
    ratio = tokens / max(1, length)
    return float(took * (ratio**2 if ratio > 1 else ratio))


def _about(run: Captured) -> dict[str, Any]:
    return {**runs.about(run), "model": _name(run.job.model or "")}


def _name(model: str) -> str:
    return model.rstrip("/").rsplit("/", 1)[-1]


def free() -> int:
    """Bytes that are free on the disk of the results folder."""
    import shutil

    at = place.store()
    while not at.exists():
        at = at.parent
    return shutil.disk_usage(at).free
