"""Cross-layer transcoders: features that read one MLP's input and write into the outputs of that MLP and of all later ones.

With x_l what the MLP of layer l reads and y_l what it writes (Ameisen et al. 2025, "Circuit Tracing", equations 1 and 2; Lindsey
et al. 2024, "Sparse Crosscoders"):

    p_l   = x_l W_enc[l] + b_enc[l]                     f_l = activation(p_l) >= 0
    y^_l' = sum over l <= l' of f_l W_dec[l -> l'] + b_dec[l']   (+ x_l' W_skip[l'])
    loss  = sum_l |y_l - y^_l|^2 + what the kind adds

A feature that the stream carries through several MLPs is one feature here; per-layer transcoders need one in every layer.
The price is memory: there are L (L + 1) / 2 decoders of F x D, 0.8 million numbers per feature for L = 26 and D = 2,304, and
training keeps four of each. A start above ``DECODER_LIMIT`` bytes of decoders is refused with the number.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from workbench.coders.coder import Progress, Terms
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.kernels.sparse_decode import sparse_decode

ARCHITECTURE = "workbench-cross-layer"
DECODER_LIMIT = 2**33
"""Bytes of decoders above which a start is refused, unless ``limit`` says otherwise."""
WEIGHTS = "sae_weights.safetensors"


class CrossLayer(nn.Module, ABC):
    """The base of all kinds: L layers with F features each, X ``[..., L, D]`` to codes ``[..., L, F]`` to Y ``[..., L, D']``.

    ``W_enc [L, D, F]``, ``b_enc [L, F]``, ``W_dec[l] [F, L - l, D']`` (its entry j writes into layer l + j), ``b_dec [L, D']``,
    ``W_skip [L, D, D']`` or None. ``about`` says what it was trained on (``reads`` and ``writes``: L site texts each).
    """

    kind: ClassVar[str]

    def __init__(
        self,
        layers: int,
        width: int,
        features: int,
        *,
        width_out: int | None = None,
        skip: bool = False,
        seed: int = 0,
        limit: int = DECODER_LIMIT,
    ) -> None:
        for name, value in (("layers", layers), ("width", width), ("features", features)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise WorkbenchError(f"{name} of a cross-layer transcoder is a positive whole number; got {value!r}")
        super().__init__()
        out = width if width_out is None else width_out
        check_memory(layers, features, out, limit)
        self.layers, self.features, self.width, self.width_out = layers, features, width, out
        self.about: dict[str, Any] = {}
        generator = torch.Generator().manual_seed(seed)

        def uniform(*shape: int, bound: float) -> nn.Parameter:
            return nn.Parameter((torch.rand(*shape, generator=generator) * 2 - 1) * bound)

        self.W_enc = nn.Parameter(torch.randn(layers, width, features, generator=generator) * width**-0.5)
        self.b_enc = nn.Parameter(torch.zeros(layers, features))
        self.W_dec = nn.ParameterList(
            uniform(features, layers - source, out, bound=(layers * out) ** -0.5) for source in range(layers)
        )
        self.b_dec = nn.Parameter(torch.zeros(layers, out))
        self.W_skip = nn.Parameter(torch.zeros(layers, width, out)) if skip else None

    # ------------------------------------------------------------ what every kind defines

    @property
    @abstractmethod
    def options(self) -> dict[str, Any]:
        """The kind's own numbers, as its constructor takes them."""

    @abstractmethod
    def activation(self, pre: Tensor, layer: int | slice = slice(None)) -> Tensor:
        """Codes of pre-activations ``[..., L, F]``, or of one layer's ``[..., F]``, in the form that inference uses."""

    @abstractmethod
    def objective(self, x: Tensor, y: Tensor, now: Progress) -> Terms:
        """Training loss of X ``[N, L, D]`` against Y ``[N, L, D']``: squared errors summed over L and D', mean over N, and what
        the kind adds. ``active`` and ``now.silent`` are ``[L, F]``."""

    def settle(self, x: Tensor) -> None:
        """Fix, at the end of training, what inference needs to know of the data X ``[N, L, D]``; most kinds need nothing."""

    # ------------------------------------------------------------ codes and outputs

    def pre(self, layer: int, x: Tensor) -> Tensor:
        """Pre-activations ``[..., F]`` of one layer's input ``[..., D]``."""
        self._check_layer(layer)
        if x.shape[-1] != self.width:
            raise WorkbenchError(f"layer {layer} reads vectors of width {self.width}; got {list(x.shape)}")
        return x @ self.W_enc[layer] + self.b_enc[layer]

    def pre_all(self, x: Tensor) -> Tensor:
        """Pre-activations ``[..., L, F]`` of X ``[..., L, D]``."""
        if x.ndim < 2 or tuple(x.shape[-2:]) != (self.layers, self.width):
            raise WorkbenchError(f"X is [..., L, D] = [..., {self.layers}, {self.width}]; got {list(x.shape)}")
        return torch.einsum("...ld,ldf->...lf", x, self.W_enc) + self.b_enc

    def encode(self, layer: int, x: Tensor) -> Tensor:
        """Codes ``[..., F]`` of one layer's input ``[..., D]``."""
        return self.activation(self.pre(layer, x), layer)

    def encode_all(self, x: Tensor) -> Tensor:
        """Codes ``[..., L, F]`` of X ``[..., L, D]``."""
        return self.activation(self.pre_all(x))

    def decode(self, f: Tensor) -> Tensor:
        """Y ``[..., L, D']`` of codes ``[..., L, F]``, without the skip term."""
        if f.ndim < 2 or tuple(f.shape[-2:]) != (self.layers, self.features):
            raise WorkbenchError(f"codes are [..., L, F] = [..., {self.layers}, {self.features}]; got {list(f.shape)}")
        return self._sum([f[..., source, :] @ self.W_dec[source].flatten(1) for source in range(self.layers)])

    def decode_sparse(self, values: Tensor, indices: Tensor) -> Tensor:
        """``decode`` of codes given as values and features ``[N, L, k]``; index -1 is an empty place."""
        parts = [
            sparse_decode(values[:, source], indices[:, source], self.W_dec[source].flatten(1))
            for source in range(self.layers)
        ]
        return self._sum(parts)

    def decode_at(self, target: int, codes: Sequence[Tensor]) -> Tensor:
        """The output ``[..., D']`` of one layer from the codes ``[..., F]`` of layers 0 to ``target``, without the skip term."""
        self._check_layer(target)
        if len(codes) != target + 1:
            raise WorkbenchError(
                f"layer {target} is written by the layers 0 to {target}; got codes of {len(codes)} layers"
            )
        parts = [f @ self.decoder(source, target) for source, f in enumerate(codes)]
        return torch.stack(parts).sum(0) + self.b_dec[target]

    def skip(self, layer: int, x: Tensor) -> Tensor:
        """The skip term ``[..., D']`` of one layer's input, zeros where there is none."""
        self._check_layer(layer)
        return x.new_zeros(*x.shape[:-1], self.width_out) if self.W_skip is None else x @ self.W_skip[layer]

    def forward(self, x: Tensor) -> Tensor:
        """Y ``[..., L, D']`` of X ``[..., L, D]``, with the skip term."""
        return self.decode(self.encode_all(x)) + self.skipped(x)

    def skipped(self, x: Tensor) -> Tensor:
        """The skip terms of all layers, ``[..., L, D']``."""
        if self.W_skip is None:
            return x.new_zeros(*x.shape[:-1], self.width_out)
        return torch.einsum("...ld,lde->...le", x, self.W_skip)

    def _sum(self, parts: Sequence[Tensor]) -> Tensor:
        """``parts[l] [..., (L - l) D']`` added up by the layer they write into, plus the biases."""
        padded = [
            nn.functional.pad(part.unflatten(-1, (self.layers - source, self.width_out)), (0, 0, source, 0))
            for source, part in enumerate(parts)
        ]
        return torch.stack(padded).sum(0) + self.b_dec

    # ------------------------------------------------------------ directions

    def encoder(self, layer: int) -> Tensor:
        """Reading directions of one layer, the columns of ``[D, F]``."""
        self._check_layer(layer)
        return self.W_enc[layer]

    def decoder(self, source: int, target: int) -> Tensor:
        """What the features of layer ``source`` write into the output of layer ``target``, the rows of ``[F, D']``."""
        self._check_layer(source)
        self._check_layer(target)
        if target < source:
            raise WorkbenchError(
                f"features of layer {source} write into layer {source} and later ones; got layer {target}"
            )
        return self.W_dec[source][:, target - source]

    def decoder_norms(self) -> Tensor:
        """Norm of every feature's concatenated decoders, ``[L, F]``."""
        return torch.stack([weight.flatten(1).norm(dim=1) for weight in self.W_dec])

    def _check_layer(self, layer: int) -> None:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < self.layers:
            raise UnknownName("layer of this cross-layer transcoder", layer, range(self.layers))

    # ------------------------------------------------------------ scaling and files

    @torch.no_grad()
    def rescaled(self, x_scale: Tensor, y_scale: Tensor) -> None:
        """Take raw activations from now on, after training on ``x_scale[l] x_l`` and ``y_scale[l] y_l`` (both ``[L]``)."""
        self.W_enc.mul_(x_scale[:, None, None])
        for source, weight in enumerate(self.W_dec):
            weight.div_(y_scale[source:, None])
        self.b_dec.div_(y_scale[:, None])
        if self.W_skip is not None:
            self.W_skip.mul_((x_scale / y_scale)[:, None, None])

    def save(self, folder: str | Path) -> Path:
        """Write ``cfg.json`` and ``sae_weights.safetensors`` into the new folder; ``CrossLayer.load`` reads it."""
        from safetensors.torch import save_file

        from workbench.results import new_folder

        cfg = {
            "architecture": ARCHITECTURE, "kind": self.kind, "layers": self.layers, "d_in": self.width, "d_out": self.width_out,
            "d_sae": self.features, "skip": self.W_skip is not None, "dtype": str(self.W_enc.dtype).removeprefix("torch."),
            "options": self.options, "about": self.about,
        }  # fmt: skip
        with new_folder(Path(folder)) as part:
            (part / "cfg.json").write_text(json.dumps(cfg, indent=1, allow_nan=False) + "\n")
            save_file({k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}, part / WEIGHTS)
        return Path(folder)

    @staticmethod
    def load(folder: str | Path, *, limit: int = DECODER_LIMIT) -> CrossLayer:
        """The cross-layer transcoder in a folder that ``save`` wrote."""
        from workbench.coders.cross_layer_kinds import make_cross_layer

        folder = Path(folder)
        cfg = read_cfg(folder, ARCHITECTURE)
        state = read_weights(folder / WEIGHTS)
        found = make_cross_layer(
            cfg["kind"], cfg["layers"], cfg["d_in"], cfg["d_sae"], width_out=cfg["d_out"], skip=cfg["skip"], limit=limit,
            **cfg["options"],
        )  # fmt: skip
        found = found.to(state["W_enc"].dtype)
        assign(found, state, folder / WEIGHTS)
        found.about = dict(cfg["about"])
        return found


def check_memory(layers: int, features: int, width: int, limit: int = DECODER_LIMIT) -> int:
    """Bytes of the float32 decoders of L layers; refused with the number above ``limit``."""
    numbers = layers * (layers + 1) // 2 * features * width
    if 4 * numbers > limit:
        fitting = max(1, limit // (4 * numbers // features))
        raise Refused(
            f"{layers} layers have {layers * (layers + 1) // 2} decoders of {features} x {width}: {numbers:,} numbers, "
            f"{4 * numbers / 2**30:.1f} GiB in float32 and four times that while training; the limit is {limit / 2**30:.1f} GiB. "
            f"At most {fitting} features fit; take fewer layers or features, or raise limit="
        )
    return 4 * numbers


def read_cfg(folder: Path, architecture: str) -> dict[str, Any]:
    """``cfg.json`` of a folder; refuses a missing or damaged one and another architecture."""
    if not (folder / "cfg.json").is_file():
        raise WorkbenchError(f"{folder} holds no coder: it has no cfg.json")
    try:
        cfg: dict[str, Any] = json.loads((folder / "cfg.json").read_text())
    except ValueError as error:
        raise WorkbenchError(f"{folder / 'cfg.json'} is damaged: {error}") from None
    if cfg.get("architecture") != architecture:
        raise WorkbenchError(
            f"{folder} holds the architecture {cfg.get('architecture')!r}, not {architecture!r}; wb.load_coder reads others"
        )
    return cfg


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; refuses a missing or damaged one."""
    from safetensors.torch import load_file

    if not path.is_file():
        raise WorkbenchError(f"no weights {path}")
    try:
        return load_file(path)
    except Exception as error:
        raise WorkbenchError(f"{path} is damaged: {type(error).__name__}: {error}") from None


def assign(module: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load ``state``; refuses missing, unknown and misshapen tensors and NaN."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        lines = " ".join(line.strip() for line in str(error).splitlines()[1:])
        raise WorkbenchError(f"{path} does not fit its cfg.json: {lines}") from None
    bad = [name for name, value in state.items() if not math.isfinite(float(value.double().sum()))]
    if bad:
        raise WorkbenchError(f"{path} holds NaN or infinity in {', '.join(bad)}")
