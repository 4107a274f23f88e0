"""A coder from a folder of SAELens, with the numbers that SAELens computes from it.

Architectures become our kinds; what changes numbers and is not modelled is refused. Facts are kept: ``about["saelens"]`` is the
whole ``cfg.json`` of a folder that SAELens wrote, and is written back.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench.coders.coder import Coder
from workbench.coders.formats.saelens import (
    ACROSS,
    ARCHITECTURES,
    BEFORE,
    CFG,
    OWN,
    RUNTIME,
    SCALER,
    SPARSITY,
    WEIGHTS,
    Source,
    forms,
    kinds_in_files,
)
from workbench.coders.formats.saelens_old import is_old, upgraded
from workbench.coders.kinds.normalised import Normalised
from workbench.coders.tensor_files import check_tensors, digest, filled, read_json, read_safetensors
from workbench.errors import Refused, UnknownName, WorkbenchError

_GENERIC = {
    "standard": "relu", "transcoder": "relu", "skip_transcoder": "relu", "gated": "gated", "topk": "topk", "abstopk": "abstopk",
    "jumprelu": "threshold", "jumprelu_transcoder": "threshold", "jumprelu_skip_transcoder": "threshold",
    "batchtopk": "batchtopk", "matryoshka_batchtopk": "matryoshka", "matching_pursuit": "matching-pursuit",
    "temporal": "temporal",
}  # fmt: skip
"""The kind that an architecture is if nothing more is known."""


def read_saelens(folder: Path, input_scale: float | None = None) -> Coder:
    """The coder in ``folder``. ``input_scale`` is the factor on activations that a training with
    ``normalize_activations="expected_average_only_in"`` used; it is folded into the weights."""
    whole = read_json(folder / CFG)
    ours = _ours(whole)
    cfg = _without_ours(whole)
    given = json.loads(json.dumps(cfg))
    if is_old(cfg):
        cfg = upgraded(cfg, folder / CFG)
        given = json.loads(json.dumps(cfg))
    architecture = cfg.get("architecture")
    if architecture not in _GENERIC:
        raise UnknownName(f"architecture of {folder / CFG}", architecture, _GENERIC)
    raw = read_safetensors(folder / WEIGHTS)
    tensors = _tensors(raw, cfg, folder)
    exact = all(name in tensors and torch.equal(value, tensors[name]) for name, value in raw.items()) and all(
        raw[name].dtype == tensors[name].dtype for name in raw if name in tensors
    )
    own = read_safetensors(folder / OWN) if ours and (folder / OWN).is_file() else {}
    numbers = ours.get("numbers") or {}
    own |= {
        name: torch.tensor(float(value), dtype=raw["W_dec"].dtype) for name, value in numbers.items() if "W_dec" in raw
    }
    state, exact = _state(tensors, cfg, exact)
    coder = _coder(state, cfg, ours, own, folder)
    coder.about = _about(cfg, ours)
    coder = _normalised(coder, cfg, given, folder, input_scale)
    _keep_facts(coder, given, ours)
    log_sparsity = read_safetensors(folder / SPARSITY).get("sparsity") if (folder / SPARSITY).is_file() else None
    kept = {} if exact else {"tensors": raw, "cfg": given, "digest": digest(coder)}
    if log_sparsity is not None or kept:
        vars(coder)["source"] = Source(log_sparsity=log_sparsity, **kept)
    return coder


def _ours(cfg: dict[str, Any]) -> dict[str, Any]:
    metadata = cfg.get("metadata")
    found = metadata.get("workbench") if isinstance(metadata, dict) else None
    return found if isinstance(found, dict) else {}


def _without_ours(cfg: dict[str, Any]) -> dict[str, Any]:
    metadata = cfg.get("metadata")
    if not isinstance(metadata, dict):
        return dict(cfg)
    return {**cfg, "metadata": {name: value for name, value in metadata.items() if name != "workbench"}}


def _tensors(raw: dict[str, Tensor], cfg: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """The tensors of the architecture, checked, in the dtype that the settings name."""
    architecture, where = cfg["architecture"], folder / WEIGHTS
    tensors = dict(raw)
    sizes: dict[str, int] = {}
    for letter, name in (("D", "d_in"), ("F", "d_sae"), *([("O", "d_out")] if architecture in ACROSS else [])):
        size = cfg.get(name)
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise WorkbenchError(f"{folder / CFG} has {name} = {size!r}, not a whole number from 1")
        sizes[letter] = size
    if "log_threshold" in tensors and "jumprelu" in architecture:
        tensors["threshold"] = tensors.pop("log_threshold").exp()
    factor = tensors.pop("scaling_factor", tensors.pop("finetuning_scaling_factor", None))
    due = forms(architecture, tied=cfg.get("tied_weights", True), layers=cfg.get("n_attn_layers", 1))
    check_tensors(tensors, due, where, sizes)
    if factor is not None and not bool((factor == 1).all()):
        if tuple(factor.shape) != (sizes["F"],):
            raise WorkbenchError(
                f"{where}: scaling_factor has shape {list(factor.shape)} where [F={sizes['F']}] is due"
            )
        tensors["W_dec"] = tensors["W_dec"] * factor[:, None]
    name = str(cfg.get("dtype", "float32")).removeprefix("torch.")
    dtype = {
        "float32": torch.float32,
        "float64": torch.float64,
        "float16": torch.float16,
        "bfloat16": torch.bfloat16,
    }.get(name)
    if dtype is None:
        raise WorkbenchError(f"{folder / CFG} has dtype {name!r}, which is none of float32, float64, float16, bfloat16")
    return {name: value.to(dtype) for name, value in tensors.items()}


def _state(tensors: dict[str, Tensor], cfg: dict[str, Any], exact: bool) -> tuple[dict[str, Tensor], bool]:
    """The tensors under our names, and whether no number was rounded on the way."""
    state, architecture = dict(tensors), cfg["architecture"]
    if "W_skip" in state:
        state["W_skip"] = state["W_skip"].t().contiguous()
    if "b_gate" in state:
        state["b_enc"] = state.pop("b_gate")
    if architecture in ("matching_pursuit", "temporal"):
        if "W_enc" not in state:
            state["W_enc"] = state["W_dec"].t()
        state["b_enc"] = state["W_dec"].new_zeros(len(state["W_dec"]))
    if "topk_threshold" in state:
        state["threshold"] = state.pop("topk_threshold")
    default = architecture in ("batchtopk", "matryoshka_batchtopk")
    if cfg.get("rescale_acts_by_decoder_norm", default) and architecture in (
        "topk",
        "abstopk",
        "batchtopk",
        "matryoshka_batchtopk",
    ):
        # a choice by f |d|: the norms move from the decoder into the encoder
        norms = state["W_dec"].norm(dim=1)
        state["W_enc"], state["b_enc"] = state["W_enc"] * norms, state["b_enc"] * norms
        state["W_dec"] = state["W_dec"] / norms[:, None]
        exact = False
    return state, exact


def _coder(
    state: dict[str, Tensor], cfg: dict[str, Any], ours: dict[str, Any], own: dict[str, Tensor], folder: Path
) -> Coder:
    architecture, kinds = cfg["architecture"], kinds_in_files()
    centred = bool(cfg.get("apply_b_dec_to_input", True)) and architecture not in ACROSS
    kind = generic = _GENERIC[architecture]
    options, said = _options(cfg, folder), ours.get("kind", generic)
    found = _as_kind(said, architecture, state, own) if said != generic and said in kinds else None
    if found is not None:
        kind, state = said, found
    elif said != generic:
        why = "the weights are no longer those of such a coder" if said in kinds else "which is not known here"
        warnings.warn(f"{folder} says that it holds a {said} coder, {why}; read as {generic}", stacklevel=5)
    if kind == "threshold":
        state = {**state, "theta": state["threshold"]}
        del state["threshold"]
    if kind == said and ours:
        options = {**ours.get("options", {}), **({"k": options["k"]} if architecture == "topk" else {})}
    return filled(kinds[kind], state, centred=centred, options=options)


def _as_kind(
    kind: str, architecture: str, state: dict[str, Tensor], own: dict[str, Tensor]
) -> dict[str, Tensor] | None:
    """The weights as those of ``kind``, None if they are not."""
    family = architecture.replace("skip_", "").replace("_transcoder", "").replace("transcoder", "standard")
    if ARCHITECTURES.get(kind) != family:
        return None
    state = dict(state)
    threshold = state.get("threshold")
    if threshold is None:
        return {**state, **own}
    if kind in ("batchtopk", "matryoshka"):
        return {**state, "threshold": threshold[0].clone()} if bool((threshold == threshold[0]).all()) else None
    del state["threshold"]
    log = own.get("log_threshold", threshold.log())
    near = torch.isclose(log.exp().double(), threshold.double(), rtol=8 * torch.finfo(threshold.dtype).eps, atol=0.0)
    if log.shape != threshold.shape or not bool(near.all()):
        return None
    return {**state, "log_threshold": log.to(threshold.dtype)} if kind.startswith("jumprelu") else None


def _options(cfg: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The options of the generic kind that the settings tell."""
    architecture = cfg["architecture"]
    if architecture in ("topk", "abstopk", "batchtopk", "matryoshka_batchtopk"):
        k = cfg.get("k")
        if isinstance(k, bool) or not isinstance(k, int | float) or k <= 0:
            raise WorkbenchError(
                f"{folder / CFG} has k = {k!r}; a {architecture} coder says how many features are active"
            )
        widths = sorted({*cfg.get("matryoshka_widths", ()), cfg["d_sae"]})
        nested = {"prefixes": tuple(width / cfg["d_sae"] for width in widths)}
        return {"k": max(1, round(k)), **(nested if architecture.startswith("matryoshka") else {})}
    if architecture == "matching_pursuit":
        names = ("residual_threshold", "max_iterations", "stop_on_duplicate_support")
        return {name: cfg[name] for name in names if name in cfg}
    if architecture == "temporal":
        tied = bool(cfg.get("tied_weights", True))
        kept = cfg.get("kval_topk") if cfg.get("sae_diff_type", "topk") == "topk" else None
        return {
            "heads": cfg.get("n_heads", 8), "layers": cfg.get("n_attn_layers", 1), "bottleneck": cfg.get("bottleneck_factor", 64),
            "k": kept, "tied": tied, "bias": not tied or bool(cfg.get("apply_b_dec_to_input", True)),
        }  # fmt: skip
    return {}


def _about(cfg: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Where the coder belongs, under our names."""
    if ours:
        return dict(ours.get("about") or {})
    facts = cfg.get("metadata") or {}

    def site(name: str, index: str) -> str | None:
        head = facts.get(index)
        return facts.get(name) if head is None or not facts.get(name) else f"{facts[name]}[{head}]"

    reads = site("hook_name", "hook_head_index")
    writes = site("hook_name_out", "hook_head_index_out") or reads
    known = {
        "format": f"saelens {facts['sae_lens_version']}" if facts.get("sae_lens_version") else "saelens",
        "model": facts.get("model_name"),
        "reads": None if reads is None else [reads],
        "writes": None if writes is None else [writes],
        "context": facts.get("context_size"),
        "prepend_bos": facts.get("prepend_bos"),
    }
    return {name: value for name, value in known.items() if value is not None}


def _normalised(coder: Coder, cfg: dict[str, Any], given: dict[str, Any], folder: Path, scale: float | None) -> Coder:
    """The coder with the normalisation of its input, at run time or folded into the weights."""
    rule, architecture = cfg.get("normalize_activations", "none"), cfg["architecture"]
    if rule in RUNTIME and (rule != "constant_scalar_rescale" or architecture == "temporal"):
        factor = float(cfg.get("activation_normalization_factor", 1.0))
        return Normalised(coder, rule, factor=factor, undone=architecture not in ACROSS)
    if rule in BEFORE:
        if scale is None and rule == BEFORE[0] and (folder / SCALER).is_file():
            scale = read_json(folder / SCALER).get("scaling_factor")
        if scale is None:
            raise Refused(
                f"{folder} was trained on activations brought to another scale ({rule}), and does not say by which factor; "
                "load_coder(folder, input_scale=sqrt(d_in) / mean norm), or input_scale=1.0 to give scaled activations yourself"
            )
        if scale != 1.0:
            if rule != BEFORE[0] or architecture in ("matching_pursuit", "temporal"):
                raise Refused(f"{folder}: a factor cannot be folded into {architecture} weights trained with {rule}")
            given["normalize_activations"] = "none"
            with torch.no_grad():
                coder.W_enc.mul_(scale)
                coder.W_dec.div_(scale)
                coder.b_dec.div_(scale)
                if coder.W_skip is not None:
                    raise Refused(
                        f"{folder}: a factor cannot be folded into a skip transcoder; input_scale=1.0 leaves it as it is"
                    )
    elif rule != "none":
        raise Refused(f"{folder} normalises activations by {rule!r}, which is not modelled")
    return coder


def _keep_facts(coder: Coder, given: dict[str, Any], ours: dict[str, Any]) -> None:
    """Keep ``cfg.json`` where it says more than we would write from the coder."""
    from workbench.coders.formats.saelens_write import facts

    if not ours or facts(coder) != given:
        coder.about["saelens"] = given
