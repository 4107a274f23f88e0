"""Coders that SAELens has no architecture for: the same folder, with an ``architecture`` that begins with ``workbench-``."""

from __future__ import annotations

from pathlib import Path

import torch

from workbench.coders.coder import Coder
from workbench.coders.formats.saelens import CFG, WEIGHTS, kinds_in_files
from workbench.coders.tensor_files import filled, read_json, read_safetensors
from workbench.errors import UnknownName, WorkbenchError

ARCHITECTURES = ("workbench-crosscoder", "workbench-transcoder", "workbench-coder")


def read_own(folder: Path) -> Coder:
    """A crosscoder, or a coder of another kind that only we have."""
    cfg = read_json(folder / CFG)
    try:
        ours, centred = cfg["metadata"]["workbench"], bool(cfg["apply_b_dec_to_input"])
        kind, options, about = ours["kind"], ours["options"], dict(ours["about"])
        reads, writes, skip = [int(n) for n in cfg["reads"]], [int(n) for n in cfg["writes"]], bool(cfg["skip"])
        features = int(cfg["d_sae"])
    except (KeyError, TypeError, ValueError) as error:
        raise WorkbenchError(f"{folder / CFG} is damaged: {type(error).__name__}: {error}") from None
    kinds = kinds_in_files()
    if kind not in kinds:
        raise UnknownName(f"kind of coder in {folder / CFG}", kind, kinds)
    tensors = read_safetensors(folder / WEIGHTS)
    form = {"W_enc": (sum(reads), features), "W_dec": (features, sum(writes))}
    if skip != ("W_skip" in tensors) or any(
        name not in tensors or tuple(tensors[name].shape) != size for name, size in form.items()
    ):
        raise WorkbenchError(
            f"{folder / WEIGHTS} does not fit {CFG}: W_enc, W_dec or W_skip is missing or has another shape"
        )
    for name, value in tensors.items():
        if not bool(torch.isfinite(value).all()) and name != "log_threshold":
            raise WorkbenchError(f"{folder / WEIGHTS}: {name} holds NaN or infinity")
    coder = filled(kinds[kind], tensors, centred=centred, reads=reads, writes=writes, options=options)
    coder.about = about
    return coder
