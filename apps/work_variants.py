"""The same input through attention variants: their maps, their outputs, and whether each map is what its output is made of."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.catalogue import Variant, nearest_grid, variants
from workbench.errors import WorkbenchError
from workbench.maps import AttentionMap
from workbench.models.native_config import NativeConfig
from workbench.models.native_variants import VariantMixer
from workbench.results import Result, axis, wrapped

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

HEADS, WIDTH = 4, 8
LONGEST = 512
FACTS = ("family", "domain", "sign", "row_sum", "value_space", "exactness")


@dataclass(frozen=True)
class Passed:
    """An input that went through a variant: ``output`` ``[B, H, N, E]`` and ``amap``. ``error`` is the largest difference
    between the output and the map times the values that it multiplies; None where that cannot be told (``unchecked`` says why).
    ``shared``: the input was that of ``common_input``; else that of the variant's own example."""

    variant: Variant
    output: Tensor
    amap: AttentionMap
    error: float | None
    unchecked: str
    shared: bool
    seconds: float


def common_input(seed: int, tokens: int) -> dict[str, Tensor]:
    """Layer input x ``[1, N, H*E]`` and q, k, v ``[1, H, N, E]`` with H = 4 and E = 8, standard normal, float32."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {"x": drawn(1, tokens, HEADS * WIDTH)} | {name: drawn(1, HEADS, tokens, WIDTH) for name in "qkv"}


@torch.no_grad()
def passed(name: str, seed: int = 0, tokens: int = 64, *, causal: bool | None = None) -> Passed:
    """``common_input(seed, tokens)`` through a variant, with parameters of its own drawn from the same seed.

    ``causal``: whether a token sees itself and those before it alone; by default as the variant does. Variants that are no
    self-attention layer (``in models`` False in ``wb.variants().frame()``), and those that look ahead where ``causal`` is
    asked for, get their own example instead (``shared`` False).
    """
    if isinstance(tokens, bool) or not isinstance(tokens, int) or not 4 <= tokens <= LONGEST:
        raise WorkbenchError(f"tokens is a whole number from 4 to {LONGEST}; got {tokens!r}")
    variant = variants()[name]
    ahead = not variant.causal if causal is None else not causal
    shared = variant.recipe is not None and (variant.causal or ahead)
    if shared:
        grid = nearest_grid(tokens)
        whole = (int(grid[0]), int(grid[1]))
        if ahead and whole[0] * whole[1] != tokens:
            raise WorkbenchError(f"{tokens} tokens fill no grid; {whole[0] * whole[1]} do")
        torch.manual_seed(seed)
        mixer = VariantMixer(
            NativeConfig(
                layers=1, heads=HEADS, width=HEADS * WIDTH, head_width=WIDTH, vocab=2, mixer=name, positions="none",
                causal=not ahead, grid=whole if ahead else None,
            )
        )  # fmt: skip
        given = common_input(seed, tokens)
        arguments = mixer.arguments(given["x"], given["x"], given["q"], given["k"], given["v"])
    else:
        arguments = variant.example(seed, tokens, torch.float32)
    began = time.perf_counter()
    output, amap = variant(**arguments)
    seconds = time.perf_counter() - began
    error, unchecked = None, ""
    if variant.value_input is None:
        unchecked = "its output is linear in no argument: the map is its derivative"
    elif arguments.get(variant.value_input) is None:
        unchecked = "it makes its values itself"
    else:
        error = identity_error(amap, arguments[variant.value_input], output)
    if shared and variant.recipe is not None and variant.recipe.finish is not None:
        output = variant.recipe.finish(output)
    return Passed(variant, output.detach(), amap, error, unchecked, shared, seconds)


def identity_error(amap: AttentionMap, values: Tensor, output: Tensor) -> float:
    """Largest difference between an output and the map times the values that it multiplies: by the map's rows, so that no
    operator's own product is checked against itself; by ``matvec`` where every channel has weights of its own."""
    made = amap.matvec(values) if amap.channelwise else AttentionMap.matvec(amap, values)
    return float((made - output).abs().max())


@dataclass(frozen=True)
class Comparison(Result):
    """Two variants: ``maps`` name -> ``[H, Q, K]`` of the first sequence (of a map over something else than tokens, its own
    rows), ``outputs`` name -> ``[H, N, E]``; ``facts`` what the table says of each. ``difference`` is the largest
    absolute difference of the outputs, ``relative`` the norm of the difference over that of the first output; None where the
    inputs or shapes differ."""

    names: tuple[str, str]
    maps: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    facts: Mapping[str, Mapping[str, Any]]
    difference: float | None
    relative: float | None

    def frame(self) -> pd.DataFrame:
        """One row per variant: name, paper, what its map says of itself, the error of the identity and the seconds it took."""
        import pandas as pd

        return pd.DataFrame([{"variant": name, **self.facts[name]} for name in self.names])

    def numbers(self) -> pd.DataFrame:
        """One row per number of the outputs: ``head, token, channel`` and a column per variant."""
        import pandas as pd

        first, second = (self.outputs[name] for name in self.names)
        head, token, channel = torch.meshgrid(*(torch.arange(n) for n in first.shape), indexing="ij")
        columns = {"head": head, "token": token, "channel": channel, self.names[0]: first, self.names[1]: second}
        return pd.DataFrame({name: values.flatten().numpy() for name, values in columns.items()})

    def plot(self, ax: Axes | None = None) -> Axes:
        """Output of the first against output of the second, a dot per number; nothing but names where they cannot be compared."""
        ax = axis(ax, 4.2, 4.0)
        first, second = (self.outputs[name] for name in self.names)
        if self.difference is not None:
            ax.plot(first.flatten().numpy(), second.flatten().numpy(), ".", markersize=2)
            ax.axline((0, 0), slope=1, color="0.5", linewidth=1)
        ax.set(xlabel=wrapped(self.names[0], 3.2), ylabel=wrapped(self.names[1], 3.2), title="outputs")
        return ax


@torch.no_grad()
def compared(variant: str, other: str, seed: int, tokens: int = 64) -> Comparison:
    """Both variants on the same input, each causal if both can be; what cannot take it gets its own example (``passed``)."""
    records = [variants()[variant], variants()[other]]
    causal = all(record.causal for record in records)
    found = [passed(record.name, seed, tokens, causal=causal) for record in records]
    names = (variant, other if other != variant else f"{other} (again)")
    first, second = (one.output[0] for one in found)
    same = all(one.shared for one in found) and first.shape == second.shape
    gap = (second - first).double() if same else None
    return Comparison(
        names,
        {name: _rows(one.amap) for name, one in zip(names, found, strict=True)},
        {name: one.output[0].float().contiguous() for name, one in zip(names, found, strict=True)},
        {name: _facts(one) for name, one in zip(names, found, strict=True)},
        None if gap is None else float(gap.abs().max()),
        None if gap is None else float(gap.norm() / first.double().norm().clamp(min=1e-300)),
    )


def comparison_from(saved: Any) -> Comparison:
    """A comparison that was read back from its folder (``load_result``)."""
    labels, (first, second) = saved.labels, saved.labels["names"]
    maps, outputs = (
        {name: saved.tensors[f"{part}.{name}"] for name in (first, second)} for part in ("maps", "outputs")
    )
    return Comparison((first, second), maps, outputs, labels["facts"], labels["difference"], labels["relative"])


def _rows(amap: AttentionMap) -> Tensor:
    return amap.rows(0, amap.shape[2])[0].detach().float().contiguous()


def _facts(one: Passed) -> dict[str, Any]:
    own = one.variant
    told = {name: getattr(one.amap, name) for name in FACTS if name != "family"}
    return {
        "paper": own.paper,
        "family": own.family,
        **told,
        "causal": own.causal,
        "map": type(one.amap).__name__,
        "error": one.error,
        "unchecked": one.unchecked,
        "shared": one.shared,
        "seconds": one.seconds,
        "note": own.note,
    }
