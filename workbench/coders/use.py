"""Does a coder fit what it is used on? What its files say about where it was trained, against a model, a site and a context."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from workbench.errors import WorkbenchError
from workbench.models.protocol import Model
from workbench.sites import Site

Sites = str | Site | Sequence[str | Site]


def coder_warnings(
    coder: Any,
    model: Model,
    site: Sites | None = None,
    context: int | None = None,
    prepend_bos: bool | None = None,
) -> list[str]:
    """What speaks against using ``coder`` on ``model``, one sentence each; empty if nothing is known against it.

    ``site``: where it is to read, if not at its own site. ``context``: tokens of the longest input. ``prepend_bos``: whether
    inputs begin with the tokenizer's BOS token; if it is left out, whether ``model.tokens`` puts one there. Compared with
    ``coder.about``: model, reads, context, prepend_bos, and what SAELens writes besides.
    """
    about: Mapping[str, Any] = coder.about
    facts = (about.get("saelens") or {}).get("metadata") or {}
    checks = (
        _model(about, model),
        _sites(about, model, site),
        _width(coder, model, site if site is not None else about.get("reads")),
        _context(about, context),
        _bos(about, model, prepend_bos),
        _dtype(coder),
        _left_out(facts),
    )
    return [line for lines in checks for line in lines]


def check_use(
    coder: Any,
    model: Model,
    site: Sites | None = None,
    context: int | None = None,
    prepend_bos: bool | None = None,
    *,
    stacklevel: int = 3,
) -> None:
    """``warnings.warn`` for every line of ``coder_warnings``."""
    for line in coder_warnings(coder, model, site, context, prepend_bos):
        warnings.warn(line, stacklevel=stacklevel)


def _listed(given: Any) -> list[Any]:
    return [] if given is None else [given] if isinstance(given, str | Site) else list(given)


def _model(about: Mapping[str, Any], model: Model) -> list[str]:
    names = _listed(about.get("model"))
    short = {str(name).rstrip("/").split("/")[-1].lower() for name in names}
    if not names or model.name.rstrip("/").split("/")[-1].lower() in short:
        return []
    return [f"the coder was trained on {' and '.join(map(str, names))} and is used on {model.name}"]


def _sites(about: Mapping[str, Any], model: Model, site: Sites | None) -> list[str]:
    own = [str(one) for one in _listed(about.get("reads"))]
    wanted = [str(one) for one in _listed(site)]
    if wanted and own and wanted != own:
        return [f"the coder was trained to read {', '.join(own)} and is used at {', '.join(wanted)}"]
    beyond = [text for text in own if (layer := _layer(text)) is not None and layer >= model.shape.layers]
    return [f"the coder reads {beyond[0]}; {model.name} has layers 0 to {model.shape.layers - 1}"] if beyond else []


def _layer(text: str) -> int | None:
    found = _site(text)
    return None if found is None else found.layer


def _site(text: str) -> Site | None:
    try:
        return Site.parse(text)
    except WorkbenchError:
        return None


def _width(coder: Any, model: Model, site: Any) -> list[str]:
    sites, widths = _listed(site), getattr(coder, "reads", None)
    if not sites or widths is None or len(sites) != len(widths):
        return []
    for text, width in zip(map(str, sites), widths, strict=True):
        found = _site(text)
        if found is None or found.kind in ("mlp_pre", "mlp_post", "q", "k", "v"):
            continue
        shape = model.shape
        heads = 1 if found.head is not None else shape.heads
        due = heads * shape.head_width if found.kind == "z" else shape.width
        if width != due:
            return [f"the coder reads {width} numbers at {text}; {model.name} has {due} there"]
    return []


def _context(about: Mapping[str, Any], context: int | None) -> list[str]:
    known = about.get("context")
    if not isinstance(known, int) or context is None or context <= known:
        return []
    return [f"the coder was trained on contexts of {known} tokens and is used on {context}"]


def _bos(about: Mapping[str, Any], model: Model, prepend_bos: bool | None) -> list[str]:
    known = about.get("prepend_bos")
    if not isinstance(known, bool):
        return []
    used = _begins_with_bos(model) if prepend_bos is None else prepend_bos
    if used is None or used == known:
        return []
    said = {True: "with a BOS token in front", False: "without a BOS token in front"}
    return [f"the coder was trained on texts {said[known]}; here they are read {said[used]}"]


def _begins_with_bos(model: Model) -> bool | None:
    """Whether texts begin with BOS as the model tokenizes them; None if it has no tokenizer or no such token."""
    bos = getattr(model.tokenizer, "bos_token_id", None)
    if model.tokenizer is None or bos is None:
        return None
    try:
        ids = model.tokens("a").ids
    except Exception:
        return None
    return bool(ids.shape[1] and int(ids[0, 0]) == bos)


def _dtype(coder: Any) -> list[str]:
    dtype = next((p.dtype for p in coder.parameters()), torch.float32)
    if dtype not in (torch.bfloat16, torch.float16):
        return []
    name = str(dtype).removeprefix("torch.")
    return [f"the coder's weights are {name}, and it rounds activations to it; coder.float() computes in float32"]


def _left_out(facts: Mapping[str, Any]) -> list[str]:
    """Positions, tokens and ways of loading that SAELens trained with and nothing here repeats."""
    found = []
    positions = facts.get("seqpos_slice")
    if positions and any(one is not None for one in positions):
        found.append(f"the coder was trained on the positions {positions} of each text only (seqpos_slice)")
    if facts.get("exclude_special_tokens"):
        found.append(
            "the coder was trained without special tokens (exclude_special_tokens); its features on them mean nothing"
        )
    if facts.get("model_from_pretrained_kwargs"):
        found.append(
            f"the coder's model was loaded with {facts['model_from_pretrained_kwargs']}; load it in the same way"
        )
    return found
