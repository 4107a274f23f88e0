"""Folders of dictionary_learning: ``config.json`` and ``ae.pt`` (https://github.com/saprmarks/dictionary_learning).

``ae.pt`` is a pickle, the only form these coders have. It is read with torch's reader for tensors alone, which runs no code
(``tensor_files.read_pickled_tensors``); a file with anything else in it is refused.

Their classes and our kinds: AutoEncoder and AutoEncoderNew are ``relu`` (the second does not take its bias off the input),
GatedAutoEncoder ``gated``, AutoEncoderTopK ``topk``, BatchTopKSAE ``batchtopk``, MatryoshkaBatchTopKSAE ``matryoshka``,
JumpReluAutoEncoder ``threshold`` (not centred). Decoder rows stay as they are in the file: ``AutoEncoder.from_pretrained`` scales
them to norm 1 unless it is told not to, which changes features, not outputs.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench.coders.coder import Coder
from workbench.coders.folder import told
from workbench.coders.formats.saelens import kinds_in_files
from workbench.coders.tensor_files import check_tensors, filled, read_json, read_pickled_tensors
from workbench.errors import Refused, UnknownName, WorkbenchError

_LINEAR = {"encoder.weight": ("F", "D"), "encoder.bias": ("F",), "decoder.weight": ("D", "F")}
_PLAIN = {"W_enc": ("D", "F"), "b_enc": ("F",), "W_dec": ("F", "D"), "b_dec": ("D",)}
_FORMS: dict[str, dict[str, tuple[str | int, ...]]] = {
    "AutoEncoder": {**_LINEAR, "bias": ("D",)},
    "AutoEncoderNew": {**_LINEAR, "decoder.bias": ("D",)},
    "GatedAutoEncoder": {
        "encoder.weight": ("F", "D"), "decoder.weight": ("D", "F"), "decoder_bias": ("D",), "r_mag": ("F",), "gate_bias": ("F",),
        "mag_bias": ("F",),
    },
    "AutoEncoderTopK": {**_LINEAR, "b_dec": ("D",), "k": (), "threshold": ()},
    "BatchTopKSAE": {**_LINEAR, "b_dec": ("D",), "k": (), "threshold": ()},
    "MatryoshkaBatchTopKSAE": {**_PLAIN, "k": (), "threshold": (), "group_sizes": ("groups",)},
    "JumpReluAutoEncoder": {**_PLAIN, "threshold": ("F",)},
}  # fmt: skip
_KINDS = {
    "AutoEncoder": "relu", "AutoEncoderNew": "relu", "GatedAutoEncoder": "gated", "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batchtopk", "MatryoshkaBatchTopKSAE": "matryoshka", "JumpReluAutoEncoder": "threshold",
}  # fmt: skip
_RENAMED = {
    "encoder.bias": "b_enc", "bias": "b_dec", "decoder.bias": "b_dec", "decoder_bias": "b_dec", "gate_bias": "b_enc",
    "mag_bias": "b_mag",
}  # fmt: skip
_SITES = (
    (re.compile(r"^resid_post_layer_(\d+)$"), "blocks.{}.hook_resid_post"),
    (re.compile(r"^resid_pre_layer_(\d+)$"), "blocks.{}.hook_resid_pre"),
    (re.compile(r"^mlp_out_layer_(\d+)$"), "blocks.{}.hook_mlp_out"),
    (re.compile(r"^attention_out_layer_(\d+)$"), "blocks.{}.hook_attn_out"),
)


def read_dictionary_learning(folder: Path) -> Coder:
    """The coder of a folder with ``config.json`` and ``ae.pt``."""
    config = read_json(folder / "config.json")
    trainer, buffer = config.get("trainer"), config.get("buffer") or {}
    if not isinstance(trainer, dict) or "dict_class" not in trainer:
        raise WorkbenchError(f"{folder / 'config.json'} does not say which dict_class its trainer has")
    name = trainer["dict_class"]
    if name not in _FORMS:
        raise UnknownName(f"dict_class of {folder / 'config.json'}", name, _FORMS)
    tensors = read_pickled_tensors(folder / "ae.pt")
    where = folder / "ae.pt"
    counts = {"k", "group_sizes"} & set(tensors)
    plain = {key: value for key, value in tensors.items() if key not in counts}
    form = {key: size for key, size in _FORMS[name].items() if key not in ("k", "group_sizes")}
    if "encoder.bias" not in plain and "encoder.bias" in form and name == "AutoEncoderTopK":
        raise WorkbenchError(f"{where} has no encoder.bias")
    known = {"D": trainer.get("activation_dim"), "F": trainer.get("dict_size")}
    sizes = {letter: size for letter, size in known.items() if isinstance(size, int)}
    # files from before thresholds were kept for TopK have none
    check_tensors(plain, form, where, sizes, optional=("threshold",) if name == "AutoEncoderTopK" else ())
    options = _options(name, trainer, tensors, where)
    coder = filled(
        kinds_in_files()[_KINDS[name]],
        _state(name, plain, where),
        centred=name not in ("AutoEncoderNew", "JumpReluAutoEncoder"),
        options=options,
    )
    site = _site(trainer)
    return told(
        coder, "dictionary_learning", model=trainer.get("lm_name"), reads=site, writes=site, context=buffer.get("ctx_len"),
        dict_class=name, submodule=trainer.get("submodule_name"), layer=trainer.get("layer"),
    )  # fmt: skip


def _state(name: str, tensors: dict[str, Tensor], where: Path) -> dict[str, Tensor]:
    state = {_RENAMED.get(key, key): value for key, value in tensors.items()}
    if "encoder.weight" in state:
        state["W_enc"], state["W_dec"] = state.pop("encoder.weight").t(), state.pop("decoder.weight").t().contiguous()
    if name == "AutoEncoderTopK":
        state.pop("threshold", None)  # of another way to encode, which encode() does not take by itself
    elif name == "JumpReluAutoEncoder":
        state["theta"] = state.pop("threshold")
    elif "threshold" in state:
        if float(state["threshold"]) < 0:
            raise Refused(f"{where} was saved before its threshold was measured (it is {float(state['threshold'])})")
        state["threshold"] = state["threshold"].to(torch.float32)
    return state


def _options(name: str, trainer: dict[str, Any], tensors: dict[str, Tensor], where: Path) -> dict[str, Any]:
    if name not in ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        return {}
    said, held = trainer.get("k"), tensors.get("k")
    k = said if held is None else int(held)
    if not isinstance(k, int) or (said is not None and said != k):
        raise WorkbenchError(f"{where} has k = {k} and its config.json {said}")
    if name != "MatryoshkaBatchTopKSAE":
        return {"k": k}
    sizes = tensors.get("group_sizes", torch.tensor(trainer.get("group_sizes", [])))
    ends = sizes.cumsum(0).tolist()
    if not ends or min(sizes.tolist()) < 1:
        raise WorkbenchError(f"{where} has the group sizes {sizes.tolist()}")
    return {"k": k, "prefixes": tuple(end / ends[-1] for end in ends)}


def _site(trainer: dict[str, Any]) -> list[str] | None:
    """The site that a submodule's usual name means; nothing is guessed from others."""
    said = str(trainer.get("submodule_name") or "")
    for pattern, hook in _SITES:
        match = pattern.match(said)
        if match:
            return [hook.format(match[1])]
    return None
