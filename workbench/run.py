"""What one forward pass left behind: an immutable record."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import metadata
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from workbench.errors import UnknownName
from workbench.sites import Site

if TYPE_CHECKING:
    from workbench.maps import AttentionMap
    from workbench.models.protocol import Tokens


@dataclass(frozen=True)
class Provenance:
    """Where numbers come from: enough to tell whether two results are comparable."""

    model: str
    revision: str = ""
    dtype: str = ""
    device: str = "cpu"
    attention: str = ""
    """Attention implementation that computed the output (``sdpa``, ``eager``, ``native`` ...)."""
    kernel: str = ""
    """Form of the statistics kernel that ran (``reference``, ``cpu``, ``triton``), empty if none did."""
    versions: Mapping[str, str] = field(default_factory=dict)

    def dict(self) -> dict[str, Any]:
        return asdict(self)


def versions() -> dict[str, str]:
    """Versions of the packages whose release can change a number."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    names = ("attention-workbench", "torch", "transformers", "transformer-lens", "numpy")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


class Activations(Mapping["Site | str", Tensor]):
    """Tensors by site. ``acts["blocks.1.attn.hook_z"]`` and ``acts[Site("z", 1)]`` are the same; ``acts["...[3]"]``
    selects head 3 of a stored site. Hook names that are no site (a bridge has some) are keys as they are."""

    def __init__(self, tensors: Mapping[Site, Tensor] | Mapping[Site | str, Tensor]) -> None:
        self._tensors = dict[Site | str, Tensor](tensors.items())

    def __getitem__(self, key: Site | str) -> Tensor:
        if key in self._tensors:
            return self._tensors[key]
        site = Site.parse(key)
        if site in self._tensors:
            return self._tensors[site]
        if site.head is not None and site.whole in self._tensors:
            return self._tensors[site.whole].select(site.head_axis, site.head)
        raise UnknownName("activation", site, self._tensors) from None

    def __iter__(self) -> Iterator[Site | str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return "Activations(" + ", ".join(f"{s}: {list(t.shape)}" for s, t in self._tensors.items()) + ")"


class Maps(Mapping["int | str", "AttentionMap"]):
    """Attention maps by layer. Keys are layer numbers; two-stack models use ``"encoder.0"``, ``"cross.0"`` ..."""

    def __init__(self, maps: Mapping[int | str, AttentionMap]) -> None:
        self._maps = dict(maps)

    def __getitem__(self, key: int | str) -> AttentionMap:
        if key not in self._maps:
            raise UnknownName("captured layer", key, self._maps)
        return self._maps[key]

    def __iter__(self) -> Iterator[int | str]:
        return iter(self._maps)

    def __len__(self) -> int:
        return len(self._maps)

    def __repr__(self) -> str:
        return "Maps(" + ", ".join(f"{k}: {m!r}" for k, m in self._maps.items()) + ")"

    def _repr_html_(self) -> str:
        from workbench.summaries import maps_html

        return maps_html(self)


@dataclass(frozen=True)
class Run:
    """Result of ``Model.run``.

    ``logits`` is ``[B, T, V]`` (``[B, 1, V]`` with ``logits="last"``, ``None`` for models without a head or with
    ``logits=None``); ``output`` is the last hidden state ``[B, T, D]`` where the model has one to give. ``acts`` holds
    what was read, ``maps`` what was captured. Maps hold detached tensors; ``acts`` and ``logits`` keep their graph when
    gradients are enabled.
    """

    tokens: Tokens
    logits: Tensor | None = None
    output: Tensor | None = None
    acts: Activations = field(default_factory=lambda: Activations({}))
    maps: Maps = field(default_factory=lambda: Maps({}))
    provenance: Provenance = field(default_factory=lambda: Provenance("unknown"))
    cache: Any = None
    """The model's own key-value cache after this run, to be passed to the next ``run(..., cache=)``."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "acts", self.acts if isinstance(self.acts, Activations) else Activations(self.acts))
        object.__setattr__(self, "maps", self.maps if isinstance(self.maps, Maps) else Maps(self.maps))

    def __repr__(self) -> str:
        read = f", {len(self.acts)} sites read" if self.acts else ""
        return f"Run({self.provenance.model}, {self.tokens!r}, {len(self.maps)} layers captured{read})"

    def _repr_html_(self) -> str:
        from workbench.summaries import run_html

        return run_html(self)


@dataclass(frozen=True)
class Generation:
    """Result of ``generate``: S tokens after a prompt of T.

    ``tokens`` ``[B, T + S]``, prompt and generated, False in its mask on padding and after the end of a text; ``prompt`` is T.
    ``logits`` ``[B, S, V]`` if asked for. ``maps[layer]`` has a row per step, that of the query which produced the token:
    ``[B, H, S, T + S - 1]`` with offset T - 1.
    """

    tokens: Tokens
    prompt: int
    logits: Tensor | None = None
    maps: Maps = field(default_factory=lambda: Maps({}))
    provenance: Provenance = field(default_factory=lambda: Provenance("unknown"))

    @property
    def new(self) -> Tensor:
        """The generated tokens, ``[B, S]``."""
        return self.tokens.ids[:, self.prompt :]

    def __repr__(self) -> str:
        return f"Generation({self.provenance.model}, {self.tokens!r}, of them {self.new.shape[1]:,} generated)"

    def _repr_html_(self) -> str:
        from workbench.summaries import run_html

        return run_html(self)


EMPTY: Mapping[Any, Any] = MappingProxyType({})
