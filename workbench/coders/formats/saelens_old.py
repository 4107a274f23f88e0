"""``cfg.json`` of SAELens before version 6, brought to the form of version 6; what would change numbers unseen is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from workbench.coders.formats.saelens import VERSION
from workbench.errors import Refused

_RENAMED = {
    "hook_point": "hook_name", "hook_point_layer": "hook_layer", "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}  # fmt: skip
_FIELDS = (
    "architecture", "d_in", "d_sae", "d_out", "dtype", "device", "apply_b_dec_to_input", "normalize_activations",
    "reshape_activations", "k", "rescale_acts_by_decoder_norm",
)  # fmt: skip


def is_old(cfg: dict[str, Any]) -> bool:
    """Whether SAELens itself would take this for a file from before version 6."""
    metadata = cfg.get("metadata") if isinstance(cfg.get("metadata"), dict) else {}
    version = cfg.get("sae_lens_version") or (metadata or {}).get("sae_lens_version")
    head = str(version or "0").split(".")[0]
    return not head.isdigit() or int(head) < 6


def upgraded(cfg: dict[str, Any], where: Path) -> dict[str, Any]:
    """The same facts as SAELens 6 writes them; everything that is no property of the coder goes to ``metadata``."""
    old = {_RENAMED.get(name, name): value for name, value in cfg.items()}
    old.setdefault("architecture", "standard")
    old.setdefault("apply_b_dec_to_input", True)
    old.setdefault("dtype", "float32")
    old.setdefault("device", "cpu")
    old.setdefault("prepend_bos", True)
    if "reshape_activations" not in old:
        old["reshape_activations"] = "hook_z" if "hook_z" in str(old.get("hook_name") or "") else "none"
    rule = old.get("normalize_activations")
    if rule is None or isinstance(rule, bool):
        old["normalize_activations"] = "expected_average_only_in" if rule else "none"
    _activation(old, where)
    version = old.pop("sae_lens_version", None)
    metadata = {name: value for name, value in old.items() if name not in _FIELDS and name != "metadata"}
    if version is not None:
        metadata.setdefault("sae_lens_training_version", version)
    metadata.pop("finetuning_scaling_factor", None)
    found = {name: old[name] for name in _FIELDS if name in old}
    return {**found, "metadata": {**metadata, **(old.get("metadata") or {}), "sae_lens_version": VERSION}}


def _activation(old: dict[str, Any], where: Path) -> None:
    """The architecture that an activation function of old files is now."""
    name, more = old.pop("activation_fn", "relu"), dict(old.pop("activation_fn_kwargs", None) or {})
    if name not in ("relu", "topk"):
        raise Refused(f"{where} has the activation function {name!r}; relu and topk are read")
    if name == "topk" or old["architecture"] == "topk":
        k, signed = more.pop("k", old.get("k")), more.pop("signed", False)
        more.pop("use_sparse_activations", None)
        if k is not None:
            old["k"] = k
        old["architecture"] = "abstopk" if signed else "topk"
    if more:
        raise Refused(
            f"{where} has the activation option {sorted(more)[0]!r} = {more[sorted(more)[0]]!r}, which is not modelled"
        )
