"""Generation by a Hugging Face model's own ``generate``, with its attention layers looked at step by step."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from workbench.captures import Capture
from workbench.errors import Refused, WorkbenchError
from workbench.maps import AttentionMap
from workbench.models.hf import HFModel
from workbench.models.inputs import forward_arguments, two_stacks
from workbench.models.interface import allowed_options, capturing
from workbench.models.layers import kernel_before, why_not
from workbench.models.protocol import Tokens
from workbench.models.recorders.gates import gate_of, gating
from workbench.models.requests import check_layers, kept
from workbench.models.steps import LayerSteps, Steps
from workbench.patterns.per_channel import ChannelGatedMap
from workbench.run import Generation, Maps

_OURS = (
    "inputs",
    "input_ids",
    "attention_mask",
    "max_new_tokens",
    "max_length",
    "return_dict_in_generate",
    "output_logits",
)
_ONE_TEXT_AT_A_TIME = ("greedy_search", "sample")


def hf_generate(
    model: HFModel, given: Tokens, steps: int, request: Capture | None, logits: bool, options: Mapping[str, Any]
) -> Generation:
    if two_stacks(model.model) or not given.ids.shape[1]:
        raise Refused(f"{model.name} generates from token ids alone; step through it with run(cache=...)")
    if not getattr(model.model, "can_generate", bool)():
        raise Refused(f"{model.family} does not generate text: it has no language head")
    _check_options(model.model, options)
    wanted = check_layers(request, _layers(model))
    run = Steps(model.family, given.ids.shape[1])
    for layer in model._layers:
        if layer.key in wanted and layer.route != "attention interface":
            why = why_not(layer.module) if layer.route == "none" else "computes its attention by itself"
            raise Refused(
                f"layer {layer.key} of {model.family}: {layer.name} {why}, so that steps cannot be captured; "
                "run with cache= step by step"
            )
        if layer.route == "attention interface" and request is not None:
            kernel = kernel_before(layer.module, model._implementation(layer))
            run.layers[id(layer.module)] = LayerSteps(layer, kernel, run.prompt, layer.key in wanted)
    arguments = forward_arguments(model.model, given, model.shape, None, model._device(), cached=True)
    arguments.pop("position_ids", None)  # generate makes its own for every step
    arguments.setdefault("attention_mask", torch.ones_like(arguments["input_ids"]))
    greedy = {} if {"do_sample", "generation_config"} & set(options) else {"do_sample": False}
    looked_at = [held.layer for held in run.layers.values() if held.wanted]
    with torch.no_grad(), gating(looked_at, run), capturing(model.model, run, switch=request is not None):
        try:
            found = model.model.generate(
                **{**arguments, **greedy, **options, "max_new_tokens": steps},
                return_dict_in_generate=True,
                output_logits=logits or None,
            )
        except WorkbenchError:
            raise
        except (ValueError, TypeError) as error:
            raise WorkbenchError(
                f"{model.family}.generate refused its options: {str(error).splitlines()[0]}"
            ) from error
    real = _real(found.sequences.cpu(), given, _ends(model.model, options))
    maps: dict[int | str, AttentionMap] = {}
    for held in run.layers.values():
        if held.wanted:
            layer = held.layer

            def read(call: Any, layer: Any = layer) -> dict[str, Any]:
                return allowed_options(model.family, layer, call.args, dict(call.options))

            amap: AttentionMap = run.map(held, real, model._implementation(layer), read)
            if gate_of(layer.module) is not None:
                amap = ChannelGatedMap(amap, torch.cat(held.gates, 1).transpose(1, 2))
            maps[layer.key] = kept(amap, request, layer.key)
            held.queries, held.keys, held.gates = [], [], []
    labelled = Tokens.of(found.sequences.cpu(), model.tokenizer)
    return Generation(
        tokens=Tokens(labelled.ids, real, labelled.labels),
        prompt=run.prompt,
        logits=torch.stack(found.logits, 1) if logits else None,
        maps=Maps({key: maps[key] for key in wanted}),
        provenance=model._provenance(maps),
    )


def _layers(model: HFModel) -> list[int | str]:
    """Keys of the layers that a step runs: those over text. Layers over images run once, for the prompt."""
    return [layer.key for layer in model._layers if layer.stack in ("", "text", "decoder")]


def _check_options(model: Any, options: Mapping[str, Any]) -> None:
    """Refuse what is ours to set, and ways of generating that go back on a text or take up several at once."""
    for name in _OURS:
        if name in options:
            raise WorkbenchError(
                f"{name} is set by tokens, steps and logits of generate(); leave it out of the options"
            )
    config = copy.deepcopy(options.get("generation_config") or model.generation_config)
    try:
        config.update(**{name: value for name, value in options.items() if name != "generation_config"})
    except ValueError as error:
        raise WorkbenchError(f"options of generate: {str(error).splitlines()[0]}") from error
    mode = str(getattr(mode := config.get_generation_mode(options.get("assistant_model")), "value", mode))
    if mode not in _ONE_TEXT_AT_A_TIME or options.get("custom_generate") is not None:
        raise Refused(
            f"{mode.replace('_', ' ')} reorders or takes back what is in the cache, so that rows of steps do not belong to one "
            "text; generate greedily or by sampling (num_beams=1, no assistant)"
        )
    if config.use_cache is False:
        raise Refused(
            "use_cache=False runs the whole text in every step; leave it out, or call model.run on the final text"
        )


def _ends(model: Any, options: Mapping[str, Any]) -> list[int]:
    """Tokens that end a text."""
    config = options.get("generation_config") or model.generation_config
    ends = options.get("eos_token_id", config.eos_token_id)
    return [] if ends is None else [int(end) for end in torch.as_tensor(ends).flatten()]


def _real(sequences: Tensor, given: Tokens, ends: list[int]) -> Tensor:
    """Which positions of the generated texts are real: those of the prompt, then all up to the token that ended it."""
    prompt = given.mask.repeat_interleave(len(sequences) // len(given.mask), 0)
    new = sequences[:, prompt.shape[1] :]
    ended = torch.isin(new, torch.tensor(ends, dtype=new.dtype)).int().cumsum(1)
    return torch.cat([prompt, (ended - torch.isin(new, torch.tensor(ends, dtype=new.dtype)).int()) == 0], 1)
