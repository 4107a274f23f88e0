"""Coders in the place of a model's MLPs: one transcoder per layer, or one cross-layer transcoder.

A transcoder of layer l reads ``blocks.l.ln2.hook_normalized`` (what the MLP reads) or ``blocks.l.hook_resid_mid`` (the stream
before the norm) and writes ``blocks.l.hook_mlp_out``. A skip term is linear and stays a path of the frozen model.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workbench.coders.coder import Coder
from workbench.coders.cross_layer import CrossLayer
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.probes.features.frozen import FrozenMLP, FrozenModel

Coders = Mapping[int, Coder] | CrossLayer
NORMED, STREAM = "blocks.{l}.ln2.hook_normalized", "blocks.{l}.hook_resid_mid"
_READS = {NORMED: True, STREAM: False, "blocks.{l}.hook_mlp_in": False}
_WRITES = "blocks.{l}.hook_mlp_out"
_ROWS = 2**24
"""Numbers of a dense code that are held at a time."""


class Replacement(ABC):
    """``layers`` that have a coder, ``normed[l]`` whether it reads behind the norm."""

    layers: tuple[int, ...]
    normed: Mapping[int, bool]

    @abstractmethod
    def code(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """(pre-activations, code), both ``[T, F]``, of what the coder reads ``[T, D]``."""

    @abstractmethod
    def encoder(self, layer: int, features: Tensor) -> tuple[Tensor, Tensor]:
        """Reading directions ``[n, D]`` of features, and what their pre-activation is where x is 0, ``[n]``."""

    @abstractmethod
    def writers(self, layer: int) -> Sequence[tuple[int, Tensor]]:
        """(source layer, W_dec ``[F, D]``) of all that is written into the MLP output of a layer."""

    @abstractmethod
    def bias(self, layer: int) -> Tensor:
        """``b_dec [D]``."""

    @abstractmethod
    def skip(self, layer: int) -> Tensor | None:
        """``W_skip [D, D]``, None without."""

    def input(self, layer: int, mlp: FrozenMLP) -> Tensor:
        """What the coder of a layer reads, ``[T, D]``."""
        return mlp.norm(mlp.mid) if self.normed[layer] else mlp.mid


class _PerLayer(Replacement):
    def __init__(self, coders: Mapping[int, Coder], like: Tensor) -> None:
        self.layers = tuple(sorted(coders))
        self.coders, self.like = coders, like
        self.normed = {layer: _normed(coder.about.get("reads"), layer) for layer, coder in coders.items()}

    def code(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        coder = self.coders[layer]
        pre = coder.pre(x.to(coder.W_enc))
        return pre.to(self.like), coder.activate(pre).to(self.like)

    def encoder(self, layer: int, features: Tensor) -> tuple[Tensor, Tensor]:
        coder = self.coders[layer]
        rows = coder.W_enc.detach().T[features].to(self.like)
        start = coder.b_enc.detach()[features].to(self.like)
        return rows, start if coder.centre is None else start - rows @ coder.centre.detach().to(self.like)

    def writers(self, layer: int) -> Sequence[tuple[int, Tensor]]:
        return [(layer, self.coders[layer].W_dec.detach().to(self.like))] if layer in self.coders else []

    def bias(self, layer: int) -> Tensor:
        return self.coders[layer].b_dec.detach().to(self.like)

    def skip(self, layer: int) -> Tensor | None:
        weight = self.coders[layer].W_skip if layer in self.coders else None
        return None if weight is None else weight.detach().to(self.like)


class _AcrossLayers(Replacement):
    def __init__(self, coder: CrossLayer, like: Tensor) -> None:
        self.layers, self.coder, self.like = tuple(range(coder.layers)), coder, like
        reads = coder.about.get("reads") or [None] * coder.layers
        self.normed = {layer: _normed(reads[layer], layer) for layer in self.layers}

    def code(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        pre = self.coder.pre(layer, x.to(self.coder.W_enc))
        return pre.to(self.like), self.coder.activation(pre, layer).to(self.like)

    def encoder(self, layer: int, features: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.coder.encoder(layer).detach().T[features].to(self.like)
        return rows, self.coder.b_enc.detach()[layer][features].to(self.like)

    def writers(self, layer: int) -> Sequence[tuple[int, Tensor]]:
        return [(source, self.coder.decoder(source, layer).detach().to(self.like)) for source in range(layer + 1)]

    def bias(self, layer: int) -> Tensor:
        return self.coder.b_dec.detach()[layer].to(self.like)

    def skip(self, layer: int) -> Tensor | None:
        return None if self.coder.W_skip is None else self.coder.W_skip.detach()[layer].to(self.like)


@dataclass(frozen=True, eq=False)
class Active:
    """The active features of a prompt, by layer and then by position: ``layer position feature`` ``[n]``, their ``value`` and
    pre-activation ``pre``. ``errors[l] [T, D]`` is what the coders leave of the MLP output of a layer, None without MLP."""

    layer: Tensor
    position: Tensor
    feature: Tensor
    value: Tensor
    pre: Tensor
    errors: tuple[Tensor | None, ...]

    def __len__(self) -> int:
        return len(self.layer)

    def of(self, layer: int) -> slice:
        """The features of a layer."""
        ends = torch.searchsorted(self.layer, torch.tensor([layer, layer + 1]))
        return slice(int(ends[0]), int(ends[1]))


def replacement(frozen: FrozenModel, coders: Any) -> Replacement:
    """The coders as a replacement of this model's MLPs; refuses those of other sites, other widths and layers without MLP."""
    width, like = frozen.embedded.shape[1], frozen.embedded
    with_mlp = [layer for layer, mlp in enumerate(frozen.mlps) if mlp is not None]
    if isinstance(coders, CrossLayer):
        _named(coders.about, frozen.model.name)
        if list(range(coders.layers)) != with_mlp:
            raise Refused(
                f"this cross-layer transcoder is of {coders.layers} layers; {frozen.model.name} has MLPs in {with_mlp}"
            )
        if (coders.width, coders.width_out) != (width, width):
            raise Refused(
                f"this cross-layer transcoder maps width {coders.width} to {coders.width_out}; {frozen.model.name} has {width}"
            )
        for name, wanted in (("reads", [NORMED, *_READS]), ("writes", [_WRITES])):
            sites = coders.about.get(name) or [None] * coders.layers
            if len(sites) != coders.layers:
                raise Refused(f"this cross-layer transcoder {name} {len(sites)} sites and has {coders.layers} layers")
            for layer, site in enumerate(sites):
                _check_site(name, site, layer, wanted)
        return _AcrossLayers(coders, like)
    if not isinstance(coders, Mapping):
        raise WorkbenchError(
            f"coders are {{layer: transcoder}} or one cross-layer transcoder; got a {type(coders).__name__}"
        )
    if not coders and with_mlp:
        raise WorkbenchError(f"no coder given; {frozen.model.name} has MLPs in the layers {with_mlp}")
    for layer, coder in coders.items():
        if layer not in with_mlp or isinstance(layer, bool):
            raise UnknownName(f"layer with an MLP in {frozen.model.name}", layer, with_mlp)
        if not isinstance(coder, Coder):
            raise WorkbenchError(f"layer {layer} needs a transcoder; got a {type(coder).__name__}")
        _named(coder.about, frozen.model.name)
        for name, wanted in (("reads", list(_READS)), ("writes", [_WRITES])):
            _check_site(name, coder.about.get(name), layer, wanted)
        if coder.centred and not coder.about:
            raise Refused(
                f"the coder of layer {layer} takes its output bias off the input, as autoencoders do, and does not say what it "
                f"reads; attribution graphs take transcoders from {NORMED.format(l=layer)} to {_WRITES.format(l=layer)}"
            )
        if (coder.d_in, coder.d_out) != (width, width):
            raise Refused(
                f"the coder of layer {layer} maps width {coder.d_in} to {coder.d_out}; {frozen.model.name} has {width}"
            )
    return _PerLayer(coders, like)


@torch.no_grad()
def active_features(frozen: FrozenModel, coders: Replacement) -> Active:
    """Encode the prompt; refuses codes that hold NaN or infinity."""
    layers, positions, features, values, pres = [], [], [], [], []
    codes: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    for layer in coders.layers:
        mlp = frozen.mlps[layer]
        assert mlp is not None
        x = coders.input(layer, mlp)
        count = max(1, _ROWS // max(len(decoder) for _, decoder in coders.writers(layer)))
        where, found, before = [], [], []
        for start in range(0, len(x), count):
            pre, code = coders.code(layer, x[start : start + count])
            if not bool(torch.isfinite(code).all()):
                raise WorkbenchError(f"the code of layer {layer} holds NaN or infinity on this prompt")
            at = code.nonzero()
            found.append(code[at[:, 0], at[:, 1]])
            before.append(pre[at[:, 0], at[:, 1]])
            where.append(at + torch.tensor([start, 0], device=at.device))
        at, value = torch.cat(where), torch.cat(found)
        codes[layer] = (at[:, 0], at[:, 1], value)
        layers.append(torch.full((len(at),), layer))
        positions.append(at[:, 0].cpu())
        features.append(at[:, 1].cpu())
        values.append(value.cpu())
        pres.append(torch.cat(before).cpu())
    errors: list[Tensor | None] = []
    for layer, mlp in enumerate(frozen.mlps):
        if mlp is None:
            errors.append(None)
            continue
        left = mlp.written.clone()
        for source, decoder in coders.writers(layer):
            position, feature, value = codes[source]
            for part in range(0, len(position), 65536):
                of = slice(part, part + 65536)
                left.index_add_(0, position[of], decoder[feature[of]] * -value[of, None])
        if layer in coders.layers:
            left -= coders.bias(layer)
            skip = coders.skip(layer)
            if skip is not None:
                left -= coders.input(layer, mlp) @ skip
        errors.append(left)
    whole = torch.zeros(0, dtype=torch.int64)
    return Active(
        torch.cat([whole, *layers]),
        torch.cat([whole, *positions]),
        torch.cat([whole, *features]),
        torch.cat([frozen.embedded.new_zeros(0).cpu(), *values]),
        torch.cat([frozen.embedded.new_zeros(0).cpu(), *pres]),
        tuple(errors),
    )


def _normed(reads: Any, layer: int) -> bool:
    """Whether a coder reads behind the norm: yes if it does not say."""
    site = _one(reads)
    return True if site is None else next(n for form, n in _READS.items() if form.format(l=layer) == site)


def _check_site(name: str, given: Any, layer: int, wanted: Sequence[str]) -> None:
    site, known = _one(given), [form.format(l=layer) for form in dict.fromkeys(wanted)]
    if site is not None and site not in known:
        raise Refused(
            f"the coder of layer {layer} {name} {site}; attribution graphs take transcoders that {name[:-1]} {' or '.join(known)}"
        )


def _one(given: Any) -> str | None:
    if given is None or isinstance(given, str):
        return given
    sites = [str(site) for site in given] if isinstance(given, list | tuple) else [str(given)]
    return sites[0] if len(sites) == 1 else ", ".join(sites)


def _named(about: Mapping[str, Any], model: str) -> None:
    name = about.get("model")
    if name and name != model:
        warnings.warn(f"a coder was trained on {name!r} and is used on {model!r}", stacklevel=4)
