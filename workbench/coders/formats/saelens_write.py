"""A coder as a folder of SAELens: the architecture whose inference is the coder's, and the rest where SAELens leaves it alone."""

from __future__ import annotations

import copy
import json
import re
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
    SPARSITY,
    TRANSCODERS,
    VERSION,
    WEIGHTS,
    source,
)
from workbench.coders.kinds.normalised import Normalised
from workbench.coders.tensor_files import digest
from workbench.errors import Refused, WorkbenchError

_SITE = re.compile(r"^(?P<hook>.*?)(?:\[(?P<head>\d+)\])?$")


def write_saelens(coder: Coder, folder: Path) -> None:
    """Write into the existing folder."""
    from safetensors.torch import save_file

    came = source(coder)
    own: dict[str, Tensor] = {}
    if came.tensors and digest(coder) == came.digest:
        cfg, tensors = _with_metadata(came.cfg, coder), came.tensors
    else:
        cfg = facts(coder)
        tensors, own = weights(_inner(coder), cfg["architecture"])
    bad = [
        name
        for name, value in {**tensors, **own}.items()
        if not bool(torch.isfinite(value).all()) and name != "log_threshold"
    ]
    if bad:
        raise WorkbenchError(f"the coder's {bad[0]} holds NaN or infinity; it is not saved")
    # single numbers go with the settings, which other tools keep when they save the coder again
    single = {name: float(own.pop(name)) for name in list(own) if own[name].ndim == 0}
    cfg["metadata"]["workbench"] = {**_record(coder), **({"numbers": single} if single else {})}
    try:
        text = json.dumps(cfg, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise WorkbenchError(f"what the coder says about itself is no JSON: {error}; look at coder.about") from None
    (folder / CFG).write_text(text + "\n")
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, folder / WEIGHTS)
    if own:
        save_file({name: value.detach().cpu().contiguous() for name, value in own.items()}, folder / OWN)
    if came.log_sparsity is not None:
        save_file({"sparsity": came.log_sparsity}, folder / SPARSITY)


def facts(coder: Coder) -> dict[str, Any]:
    """``cfg.json`` of a coder, without our own record: what it was read from, brought up to date."""
    inner, came = _inner(coder), dict(coder.about.get("saelens") or {})
    name = architecture(inner)
    dtype = str(inner.W_dec.dtype).removeprefix("torch.")
    rule = came.get("normalize_activations", "none")
    if isinstance(coder, Normalised):
        rule = coder.options["rule"]
    elif rule not in BEFORE:
        rule = "none"
    cfg = {
        **came,
        "architecture": name,
        "d_in": inner.d_in,
        "d_sae": inner.features,
        "dtype": came["dtype"] if str(came.get("dtype")).removeprefix("torch.") == dtype else dtype,
        "device": came.get("device", "cpu"),
        "apply_b_dec_to_input": inner.centred,
        "normalize_activations": rule,
        "reshape_activations": came.get("reshape_activations", "hook_z" if _whole_z(inner) else "none"),
        **_fields(coder, name, came),
    }
    return _with_metadata(cfg, coder)


def architecture(coder: Coder) -> str:
    """The architecture of SAELens with the coder's inference, or one of our own, which SAELens refuses."""
    if len(coder.reads) > 1 or len(coder.writes) > 1:
        return "workbench-crosscoder"
    family = ARCHITECTURES.get(coder.kind)
    if family is None:
        return "workbench-coder"
    skip, square = coder.W_skip is not None, coder.d_in == coder.d_out
    across = coder.about.get("writes", coder.about.get("reads")) != coder.about.get("reads")
    if skip or not square or across:
        if (family, skip) in TRANSCODERS and not coder.centred:
            return TRANSCODERS[family, skip]
        if skip or not square:
            return "workbench-transcoder"
    return family


def weights(coder: Coder, architecture: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of the architecture under SAELens's names, and those that only our kind has."""
    state = {name: value.detach() for name, value in coder.state_dict().items()}
    if architecture.startswith("workbench-"):
        return state, {}
    if "W_skip" in state:
        state["W_skip"] = state["W_skip"].t()
    own: dict[str, Tensor] = {}
    if architecture == "gated":
        state["b_gate"] = state.pop("b_enc")
    elif architecture in ("matching_pursuit", "temporal"):
        del state["b_enc"]
        tied = architecture == "matching_pursuit" or bool(coder.options["tied"])
        if tied and not torch.equal(state.pop("W_enc"), state["W_dec"].t()):
            raise Refused(f"the encoder of a {coder.kind} coder is its decoder; W_enc is no longer W_dec transposed")
    elif architecture.startswith("jumprelu"):
        if coder.kind in ("batchtopk", "matryoshka"):
            state["threshold"] = state["threshold"].to(state["b_enc"].dtype).expand(coder.features)
        elif coder.kind == "threshold":
            state["threshold"] = state.pop("theta")
        else:
            own["log_threshold"] = state.pop("log_threshold")
            state["threshold"] = own["log_threshold"].exp()
    elif coder.kind == "p-anneal":
        own = {name: state.pop(name) for name in ("last_p", "factor")}
    return state, own


def _fields(coder: Coder, name: str, came: dict[str, Any]) -> dict[str, Any]:
    """The settings that only this architecture has."""
    options = _inner(coder).options
    if name in ACROSS:
        return {"d_out": coder.d_out}
    if name in ("topk", "abstopk"):
        return {"k": options["k"], "rescale_acts_by_decoder_norm": False}
    if name == "matching_pursuit":
        return dict(options)
    if name == "temporal":
        found = {
            "n_heads": options["heads"], "n_attn_layers": options["layers"], "bottleneck_factor": options["bottleneck"],
            "kval_topk": options["k"] if options["k"] is not None else came.get("kval_topk"), "tied_weights": options["tied"],
            "sae_diff_type": "topk" if options["k"] is not None else came.get("sae_diff_type", "relu"),
            "activation_normalization_factor": came.get("activation_normalization_factor", 1.0),
        }  # fmt: skip
        return (
            {**found, "activation_normalization_factor": coder.options["factor"]}
            if isinstance(coder, Normalised)
            else found
        )
    if name.startswith("workbench-"):
        return {"reads": list(coder.reads), "writes": list(coder.writes), "skip": coder.W_skip is not None}
    return {}


def _with_metadata(cfg: dict[str, Any], coder: Coder) -> dict[str, Any]:
    """``cfg`` with what ``about`` says, under SAELens's names."""
    cfg = copy.deepcopy(cfg)
    metadata = cfg.setdefault("metadata", {})
    reads, writes = _site(coder.about.get("reads")), _site(coder.about.get("writes"))
    known = {
        "model_name": coder.about.get("model"),
        "hook_name": reads[0],
        "hook_head_index": reads[1],
        "context_size": coder.about.get("context"),
        "prepend_bos": coder.about.get("prepend_bos"),
        **({"hook_name_out": writes[0], "hook_head_index_out": writes[1]} if writes != reads else {}),
    }
    metadata.update({name: value for name, value in known.items() if value is not None})
    metadata.setdefault("sae_lens_version", VERSION)
    return cfg


def _record(coder: Coder) -> dict[str, Any]:
    """What SAELens has no place for: enough to make the same coder again."""
    inner = _inner(coder)
    about = {name: value for name, value in coder.about.items() if name != "saelens"}
    return {"format": 1, "kind": inner.kind, "options": inner.options, "about": about}


def _inner(coder: Coder) -> Coder:
    return coder.inner if isinstance(coder, Normalised) else coder


def _site(said: Any) -> tuple[str | None, int | None]:
    """A site's hook and head."""
    if isinstance(said, list | tuple) and len(said) == 1:
        said = said[0]
    match = _SITE.match(said) if isinstance(said, str) else None
    return (None, None) if match is None else (match["hook"], None if match["head"] is None else int(match["head"]))


def _whole_z(coder: Coder) -> bool:
    hook, head = _site(coder.about.get("reads"))
    return hook is not None and hook.endswith("_z") and head is None
