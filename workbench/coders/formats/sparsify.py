"""Folders of sparsify: ``cfg.json`` and ``sae.safetensors`` (https://github.com/EleutherAI/sparsify).

Autoencoders take b_dec off the input, transcoders (``transcode``) do not; ``skip_connection`` adds x W_skip^T. ``activation`` is
``topk`` (ours: ``topk``) or ``groupmax`` (``groupmax``); older files may be ``signed`` (``abstopk``). The folder's name is the
module that was hooked, ``layers.5`` or ``layers.5.mlp``, and is read as the site where it is one of these.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from workbench.coders.coder import Coder
from workbench.coders.folder import told
from workbench.coders.formats.saelens import kinds_in_files
from workbench.coders.tensor_files import check_tensors, filled, read_json, read_safetensors
from workbench.errors import Refused, WorkbenchError


def read_sparsify(folder: Path) -> Coder:
    """The coder of one hookpoint."""
    cfg = read_json(folder / "cfg.json")
    where = folder / "sae.safetensors"
    width, k = _whole(cfg, "d_in", folder), _whole(cfg, "k", folder)
    tensors = read_safetensors(where)
    skip, across = bool(cfg.get("skip_connection")), bool(cfg.get("transcode"))
    form: dict[str, tuple[str | int, ...]] = {
        "encoder.weight": ("F", "D"), "encoder.bias": ("F",), "W_dec": ("F", "D"), "b_dec": ("D",),
        **({"W_skip": ("D", "D")} if skip else {}),
    }  # fmt: skip
    features = cfg.get("num_latents") or (cfg["expansion_factor"] * width if "expansion_factor" in cfg else None)
    check_tensors(tensors, form, where, {"D": width, **({} if features is None else {"F": features})})
    state = {
        "W_enc": tensors["encoder.weight"].t(), "b_enc": tensors["encoder.bias"], "W_dec": tensors["W_dec"],
        "b_dec": tensors["b_dec"], **({"W_skip": tensors["W_skip"].t().contiguous()} if skip else {}),
    }  # fmt: skip
    coder = filled(kinds_in_files()[_kind(cfg, folder)], state, centred=not across, options={"k": k})
    reads, writes = _sites(folder.name, across)
    return told(coder, "sparsify", reads=reads, writes=writes, hookpoint=folder.name)


def _whole(cfg: dict[str, Any], name: str, folder: Path) -> int:
    value = cfg.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise WorkbenchError(f"{folder / 'cfg.json'} has {name} = {value!r}, not a whole number from 1")
    return value


def _kind(cfg: dict[str, Any], folder: Path) -> str:
    activation = cfg.get("activation", "topk")
    if activation not in ("topk", "groupmax"):
        raise Refused(f"{folder / 'cfg.json'} has the activation {activation!r}; topk and groupmax are read")
    return "groupmax" if activation == "groupmax" else "abstopk" if cfg.get("signed") else "topk"


def _sites(name: str, across: bool) -> tuple[list[str] | None, list[str] | None]:
    match = re.match(r"^(?:.*\.)?layers\.(\d+)(\.mlp)?$", name)
    if match is None:
        return None, None
    out = [f"blocks.{match[1]}.hook_mlp_out" if match[2] else f"blocks.{match[1]}.hook_resid_post"]
    if not across:
        return out, out
    return ([f"blocks.{match[1]}.ln2.hook_normalized"], out) if match[2] else (None, None)
