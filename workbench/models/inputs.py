"""From what a user passes to the keyword arguments of a Hugging Face forward, and the checks on the way."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import Refused, WorkbenchError
from workbench.models.protocol import Shape, Tokens
from workbench.models.requests import check_ids, check_length, tokenize

_IDS = ("input_ids", "attention_mask")


def given_tokens(model: Any, tokens: Any, tokenizer: Any, shape: Shape) -> Tokens:
    """``Tokens`` of a text, texts, ids, pixels, features, or a mapping of forward arguments; with the decoder's start token
    where a model of two stacks was given the input of the first alone (classifiers make the decoder's input themselves)."""
    given = _as_tokens(model, tokens, tokenizer, shape)
    starts = two_stacks(model) and (model.can_generate() or model.base_model is model)
    if not starts or {"decoder_input_ids", "decoder_inputs_embeds"} & set(given.inputs):
        return given
    start = getattr(model.config, "decoder_start_token_id", None)
    if start is None:
        raise WorkbenchError(f"{type(model).__name__} needs decoder_input_ids: pass a mapping of its inputs")
    begun = {"decoder_input_ids": torch.full((len(given.ids), 1), start, dtype=torch.int64)}
    return Tokens(given.ids, given.mask, given.labels, {**given.inputs, **begun})


def two_stacks(model: Any) -> bool:
    """Whether a model has a decoder with an input of its own."""
    names = forward_names(model) or set()
    return bool(getattr(model.config, "is_encoder_decoder", False)) and "decoder_input_ids" in names


def real_positions(given: Tokens, *, decoder: bool = False) -> Tensor:
    """Which new positions are real, ``[B, T]`` bool: of the ids or of the embeddings in their place, of the first stack or of
    the ``decoder``; ``[B, 0]`` where the input has neither."""
    if given.ids.shape[1] and not decoder:
        return given.mask
    prefix = "decoder_" if decoder else ""
    names = ("decoder_input_ids", "decoder_inputs_embeds") if decoder else ("inputs_embeds",)
    found = next((given.inputs[name] for name in names if name in given.inputs), None)
    if found is None:
        return torch.ones(len(given.ids), 0, dtype=torch.bool)
    mask = given.inputs.get(f"{prefix}attention_mask")
    if mask is None or mask.ndim != 2:
        return torch.ones(found.shape[:2], dtype=torch.bool)
    if mask.shape != found.shape[:2]:
        raise WorkbenchError(
            f"{prefix}attention_mask covers the new positions, {list(found.shape[:2])}; got {list(mask.shape)}"
        )
    return mask.bool().cpu()


def _as_tokens(model: Any, tokens: Any, tokenizer: Any, shape: Shape) -> Tokens:
    if isinstance(tokens, Tokens):
        return tokens
    if isinstance(tokens, str) or (
        isinstance(tokens, Sequence) and len(tokens) > 0 and all(isinstance(text, str) for text in tokens)
    ):
        return tokenize(tokenizer, tokens, shape)
    if isinstance(tokens, Mapping):
        return _from_mapping(model, tokens, tokenizer)
    if not isinstance(tokens, Tensor):
        try:
            tokens = torch.as_tensor(tokens)
        except (TypeError, ValueError, RuntimeError) as error:
            raise WorkbenchError(
                f"cannot run a {type(tokens).__name__}; pass a text, a list of texts, token ids [B, T], Tokens, or a mapping "
                "of the model's inputs"
            ) from error
    if tokens.is_floating_point():
        name = model.main_input_name
        if name == "input_ids":
            raise WorkbenchError(
                f"{type(model).__name__} takes token ids (integers); got {tokens.dtype} {list(tokens.shape)}"
            )
        return Tokens(
            torch.zeros(len(tokens), 0, dtype=torch.int64),
            torch.zeros(len(tokens), 0, dtype=torch.bool),
            (),
            {name: tokens},
        )
    return Tokens.of(tokens, tokenizer)


def _from_mapping(model: Any, given: Mapping[str, Any], tokenizer: Any) -> Tokens:
    accepted = forward_names(model)
    for name, value in given.items():
        if accepted is not None and name not in accepted:
            raise WorkbenchError(
                f"{type(model).__name__} takes no input {name!r}; it takes {', '.join(sorted(accepted))}"
            )
        if not isinstance(value, Tensor):
            raise WorkbenchError(f"input {name!r} is a tensor; got {type(value).__name__}")
    rest = {name: value for name, value in given.items() if name not in _IDS}
    if "input_ids" not in given:
        batch = len(next(iter(given.values()))) if given else 0
        if "attention_mask" in given:
            rest["attention_mask"] = given["attention_mask"]
        return Tokens(torch.zeros(batch, 0, dtype=torch.int64), torch.zeros(batch, 0, dtype=torch.bool), (), rest)
    plain = Tokens.of(given["input_ids"], tokenizer)
    mask = given.get("attention_mask")
    if mask is None:
        return Tokens(plain.ids, plain.mask, plain.labels, rest)
    if mask.ndim != 2:
        return Tokens(plain.ids, plain.mask, plain.labels, {**rest, "attention_mask": mask})
    return Tokens(plain.ids, mask.bool(), plain.labels, rest)


def forward_names(model: nn.Module) -> set[str] | None:
    """Names of the arguments of a model's forward; None if it takes any."""
    names = {n for n, p in inspect.signature(model.forward).parameters.items() if p.kind is not p.VAR_KEYWORD}
    return names or None


def forward_arguments(
    model: Any, given: Tokens, shape: Shape, past: Any, device: torch.device, *, cached: bool
) -> dict[str, Any]:
    """Arguments of one forward pass: ids, mask only where there is padding, positions that skip left padding, cache."""
    seen, two = cache_length(past), two_stacks(model)
    arguments: dict[str, Any] = {name: value.to(device) for name, value in given.inputs.items()}
    names = forward_names(model) or set()
    if not len(given.ids):
        raise WorkbenchError("the input is an empty batch")
    if not (given.ids.shape[1] or given.inputs) or any(0 in value.shape for value in given.inputs.values()):
        raise WorkbenchError("the input has no tokens")
    for ids in (given.ids, given.inputs.get("decoder_input_ids")):
        if ids is not None:
            check_ids(ids, shape)
    if given.ids.shape[1]:
        arguments["input_ids"] = given.ids.to(device)
    # The cache belongs to the stack that grows: the decoder where there are two.
    mask = _padding(arguments, "attention_mask", real_positions(given), None if two else past, shape, device)
    counts = "position_ids" in names and "position_ids" not in arguments and not _counts_padding_itself(model)
    if mask is not None and counts and not bool(mask[:, 0].all()):
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        arguments["position_ids"] = positions[:, seen:].to(device)
    if two:
        _padding(arguments, "decoder_attention_mask", real_positions(given, decoder=True), past, shape, device)
    if "use_cache" in names:
        arguments["use_cache"] = cached
    elif cached and "past_key_values" not in names:
        raise Refused(f"{type(model).__name__} keeps no key-value cache")
    if past is not None:
        arguments["past_key_values"] = fork(past)
    return arguments


def _padding(
    arguments: dict[str, Any], name: str, real: Tensor, past: Any, shape: Shape, device: torch.device
) -> Tensor | None:
    """Put the mask of cached and new positions among ``arguments`` if any of them is padding, and return it. A mask of more
    axes that the user made stays."""
    if not real.shape[1] or (name in arguments and arguments[name].ndim != 2):
        return None
    arguments.pop(name, None)
    check_length(cache_length(past) + real.shape[1], shape)
    mask = full_mask(real, past)
    if bool(mask.all()):
        return None
    if not bool(mask.any(1).all()):
        raise WorkbenchError("a row of the batch is nothing but padding")
    arguments[name] = mask.long().to(device)
    return mask


def _counts_padding_itself(model: nn.Module) -> bool:
    """Whether positions start behind a padding index (RoBERTa and its kin derive them from the ids)."""
    tables = (m for name, m in model.named_modules() if name.endswith("position_embeddings"))
    return any(getattr(table, "padding_idx", None) is not None for table in tables)


def check_eager(batch: int, heads: int, queries: int, keys: int, bytes_each: int, device: torch.device) -> None:
    """Refuse an eager run whose scores, which it builds in full, would not fit the memory that is free."""
    need, free = 3 * batch * heads * queries * keys * bytes_each, free_memory(device)
    if need > free:
        raise Refused(
            f"eager attention over {queries} x {keys} positions builds about {need / 1e9:.1f} GB per layer and "
            f"{free / 1e9:.1f} GB are free; load the model with attn_implementation='sdpa', or shorten the input"
        )


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 2**63


def cache_length(past: Any) -> int:
    """Positions in a key-value cache."""
    if past is None:
        return 0
    if not hasattr(past, "get_seq_length"):
        raise WorkbenchError(
            f"cache is True, the Run.cache of an earlier run, or a transformers cache; got {type(past).__name__}"
        )
    length = int(past.get_seq_length())
    if not length and any(getattr(layer, "get_seq_length", int)() for layer in getattr(past, "layers", ())):
        raise Refused(
            f"this {type(past).__name__} counts no tokens while its layers hold some, so that positions would start again; run "
            "the whole text without cache"
        )
    return length


def keeps_state_alone(model: Any) -> bool:
    """Whether a model has no key-value cache to give out: its forward takes none, or its state stays inside of its modules."""
    names = forward_names(model) or set()
    return "past_key_values" not in names or hasattr(model, "_setup_cache")


def full_mask(real: Tensor, past: Any) -> Tensor:
    """Mask of the cached and the new positions, ``[B, cached + T]``; a cache that did not come from us has no padding."""
    before = getattr(past, "_workbench_mask", None)
    if before is None:
        before = torch.ones(len(real), cache_length(past), dtype=torch.bool)
    if before.shape != (len(real), cache_length(past)):
        raise WorkbenchError(
            f"the cache holds {list(before.shape)} positions; the new tokens are a batch of {len(real)}"
        )
    return torch.cat([before, real.cpu()], dim=1)


def fork(past: Any) -> Any:
    """A cache that can be continued without changing ``past``: growing layers replace their tensors and are shared."""
    name = type(past).__name__
    if name == "EncoderDecoderCache":
        new = copy.copy(past)
        new.self_attention_cache = fork(past.self_attention_cache)
        new.cross_attention_cache = fork(past.cross_attention_cache)
        new.is_updated = dict(past.is_updated)
        return new
    if name == "DynamicCache":
        new = copy.copy(past)
        new.layers = [_fork_layer(layer) for layer in past.layers]
        return new
    return copy.deepcopy(past)


def _fork_layer(layer: Any) -> Any:
    """States, which a layer keeps in tables and writes in place, are copied."""
    new = copy.copy(layer)
    for name, table in vars(layer).items():
        if isinstance(table, dict):
            setattr(new, name, {key: x.clone() if isinstance(x, Tensor) else x for key, x in table.items()})
    return new
