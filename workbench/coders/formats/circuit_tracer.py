"""Transcoders of circuit-tracer (https://github.com/safety-research/circuit-tracer): safetensors files and a ``config.yaml``.

One file per layer (``layer_0.safetensors`` ...): W_enc ``[F, D]``, W_dec ``[F, D]``, biases, maybe W_skip (x W_skip^T), and
thresholds of a JumpReLU or ``k`` of a TopK that has no ReLU. Cross-layer transcoders: ``W_enc_l.safetensors`` with W_enc_l
``[F, D]``, b_enc_l, b_dec_l and maybe threshold_l, and ``W_dec_l.safetensors`` with W_dec_l ``[F, L - l, D]``. ``config.yaml``
names the hooks; those of a layer are ``blocks.l.<hook>``, where ``mlp.hook_in`` is what the MLP reads, after its norm, and
``mlp.hook_out`` what it writes.

``circuit-tracer`` sets the features of the first token to 0 before it attributes; a coder here gives them as they are.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench.coders.coder import Coder
from workbench.coders.cross_layer import CrossLayer
from workbench.coders.folder import told
from workbench.coders.formats.saelens import kinds_in_files
from workbench.coders.tensor_files import check_tensors, filled, read_safetensors
from workbench.errors import Refused, WorkbenchError

_HOOKS = {
    "mlp.hook_in": "ln2.hook_normalized",
    "ln2.hook_normalized": "ln2.hook_normalized",
    "mlp.hook_out": "hook_mlp_out",
    "hook_mlp_out": "hook_mlp_out",
    "hook_mlp_in": "hook_mlp_in",
    "hook_resid_mid": "hook_resid_mid",
}
_LINE = re.compile(r"^(\w+):\s+([^\s#][^#]*?)\s*(?:#.*)?$")
NEVER = -1e4
"""log of a threshold that is 0 in every dtype: cross-layer transcoders keep logs, which a ReLU's threshold has none of."""


def read_transcoders(folder: Path) -> list[Coder]:
    """All layers of a set, in order; a gap is refused."""
    files = {
        int(found[1]): path
        for path in folder.glob("layer_*.safetensors")
        if (found := re.match(r"layer_(\d+)$", path.stem))
    }
    if not files:
        raise WorkbenchError(f"{folder} has no layer_0.safetensors, layer_1.safetensors ...")
    missing = sorted(set(range(max(files) + 1)) - set(files))
    if missing:
        raise WorkbenchError(f"{folder} has layers up to {max(files)} and no layer_{missing[0]}.safetensors")
    return [read_transcoder(files[layer]) for layer in range(len(files))]


def read_transcoder(path: Path) -> Coder:
    """One layer."""
    tensors, config = read_safetensors(path), _config(path.parent)
    activation = config.get("activation")
    if activation not in (None, "relu", "topk", "jump_relu", "jumprelu"):
        raise Refused(
            f"{path.parent / 'config.yaml'} has the activation {activation!r}; relu, topk and jump_relu are read"
        )
    count = tensors.pop("k", None)
    threshold = tensors.pop("activation_function.threshold", None)
    form: dict[str, tuple[str | int, ...]] = {
        "W_enc": ("F", "D"), "b_enc": ("F",), "W_dec": ("F", "O"), "b_dec": ("O",), "W_skip": ("O", "D"), "threshold": ("F",),
    }  # fmt: skip
    named = tensors if threshold is None else {**tensors, "threshold": threshold}
    check_tensors(named, form, path, optional=("W_skip", "threshold"))
    state = {**tensors, "W_enc": tensors["W_enc"].t()}
    if "W_skip" in state:
        state["W_skip"] = state["W_skip"].t().contiguous()
    kind, options = "relu", {}
    if activation == "topk" or (activation is None and count is not None):
        k = config.get("k") if count is None else int(count)
        if not isinstance(k, int):
            raise WorkbenchError(f"{path.parent / 'config.yaml'} says topk and not k")
        kind, options = "raw-topk", {"k": k}
    elif threshold is not None and activation != "relu":
        if bool((threshold < 0).any()):
            raise Refused(f"{path} has thresholds below 0, where negative features pass; that is not modelled")
        kind, state["theta"] = "threshold", threshold
    coder = filled(kinds_in_files()[kind], state, centred=False, options=options)
    layer = re.search(r"(\d+)$", path.stem)
    reads, writes = ([] if layer is None else [_site(config, name, int(layer[1]))] for name in ("input", "output"))
    return told(coder, "circuit_tracer", **_model(config), reads=_full(reads), writes=_full(writes))


def read_cross_layer(folder: Path) -> CrossLayer:
    """A cross-layer transcoder, as one with JumpReLU; thresholds of a ReLU are 0."""
    from workbench.coders.cross_layer import assign
    from workbench.coders.cross_layer_kinds import make_cross_layer

    layers = len(list(folder.glob("W_enc_*.safetensors")))
    parts: list[dict[str, Tensor]] = []
    sizes: dict[str, int] = {}
    for i in range(layers):
        encoder = read_safetensors(folder / f"W_enc_{i}.safetensors")
        decoder = read_safetensors(folder / f"W_dec_{i}.safetensors")
        form: dict[str, tuple[str | int, ...]] = {
            f"W_enc_{i}": ("F", "D"), f"b_enc_{i}": ("F",), f"b_dec_{i}": ("O",), f"threshold_{i}": ("F",),
        }  # fmt: skip
        sizes = check_tensors(encoder, form, folder / f"W_enc_{i}.safetensors", sizes, (f"threshold_{i}",))
        form = {f"W_dec_{i}": ("F", layers - i, "O")}
        sizes = check_tensors(decoder, form, folder / f"W_dec_{i}.safetensors", sizes)
        parts.append({name.removesuffix(f"_{i}"): value for name, value in {**encoder, **decoder}.items()})
    if len({"threshold" in part for part in parts}) > 1:
        raise WorkbenchError(f"{folder} has thresholds in some layers and not in others")
    if any(bool((part["threshold"] < 0).any()) for part in parts if "threshold" in part):
        raise Refused(f"{folder} has thresholds below 0, where negative features pass; that is not modelled")
    logs = [
        part["threshold"].log().clamp(min=NEVER) if "threshold" in part else torch.full_like(part["b_enc"], NEVER)
        for part in parts
    ]
    state = {
        "W_enc": torch.stack([part["W_enc"].t() for part in parts]), "b_enc": torch.stack([part["b_enc"] for part in parts]),
        "b_dec": torch.stack([part["b_dec"] for part in parts]), "log_threshold": torch.stack(logs),
        **{f"W_dec.{i}": part["W_dec"] for i, part in enumerate(parts)},
    }  # fmt: skip
    found = make_cross_layer("jumprelu", layers, sizes["D"], sizes["F"], width_out=sizes["O"], limit=2**60)
    found = found.to(state["W_enc"].dtype)
    assign(found, state, folder)
    config = _config(folder)
    reads, writes = ([_site(config, name, layer) for layer in range(layers)] for name in ("input", "output"))
    known = {"format": "circuit_tracer_clt", **_model(config), "reads": _full(reads), "writes": _full(writes)}
    found.about = {name: value for name, value in known.items() if value is not None}
    return found


def _config(folder: Path) -> dict[str, Any]:
    """The one-line settings of ``config.yaml``; nothing in it that is needed here is longer."""
    path = folder / "config.yaml"
    if not path.is_file():
        return {}
    text = path.read_text()
    lines = [match for line in text.splitlines() if (match := _LINE.match(line))]
    if not lines and text.strip():
        raise WorkbenchError(f"{path} holds no settings of the form name: value")
    found = {match[1]: match[2].strip("\"'") for match in lines}
    return {name: int(value) if value.isdigit() else value for name, value in found.items()}


def _model(config: dict[str, Any]) -> dict[str, Any]:
    return {"model": config.get("model_name"), "scan": config.get("scan") or config.get("scan_name")}


def _site(config: dict[str, Any], which: str, layer: int) -> str | None:
    hook = _HOOKS.get(str(config.get(f"feature_{which}_hook")))
    return None if hook is None else f"blocks.{layer}.{hook}"


def _full(sites: list[str | None]) -> list[str] | None:
    """The sites, or nothing where one is not known."""
    known = [site for site in sites if site is not None]
    return known if known and len(known) == len(sites) else None
