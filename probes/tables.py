"""Results that are numbers per head, per layer or per token: the shape most analyses have.

A measure is a named quantity. Undefined numbers are NaN, and ``undefined`` says why. ``low`` and ``high`` hold a 95%
interval and ``null`` what the measure would be by chance, for the measures that have them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from workbench.errors import UnknownName, WorkbenchError
from workbench.probes.bootstrap import interval
from workbench.results import Result, axis, head_map, wrapped
from workbench.run import Provenance

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

Layers = Mapping["int | str", Tensor]
_EXTRAS = ("low", "high", "null")


class Head(NamedTuple):
    """One head's number."""

    layer: int | str
    head: int
    value: float
    null: float


@dataclass(frozen=True)
class HeadTable(Result):
    """``values`` measure -> layer -> ``[H]``; ``low``, ``high`` and ``null`` likewise, of the measures that have them.

    ``units`` measure -> what one unit is, for axes; the first measure is the one that is drawn and ranked by default.
    ``undefined`` names a measure, a layer or a head and why it has no number.
    """

    title: str
    values: Mapping[str, Layers]
    units: Mapping[str, str]
    low: Mapping[str, Layers] = field(default_factory=dict)
    high: Mapping[str, Layers] = field(default_factory=dict)
    null: Mapping[str, Layers] = field(default_factory=dict)
    undefined: Mapping[str, str] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=lambda: Provenance("maps"))

    def __post_init__(self) -> None:
        _check_measures(self)
        wanted = {layer: (len(row),) for layer, row in next(iter(self.values.values())).items()}
        for name, part in _columns(self):
            if {layer: tuple(row.shape) for layer, row in part.items()} != wanted:
                raise WorkbenchError(
                    f"{name!r} of {self.title!r} is one number per head, {_sizes(wanted)}; got "
                    f"{_sizes({layer: tuple(row.shape) for layer, row in part.items()})}"
                )

    @classmethod
    def averaged(
        cls,
        title: str,
        each: Mapping[str, Layers],
        units: Mapping[str, str],
        *,
        null: Mapping[str, Layers] | None = None,
        single: Mapping[str, Layers] | None = None,
        undefined: Mapping[str, str] | None = None,
        provenance: Provenance | None = None,
    ) -> HeadTable:
        """A table of means over sequences with 95% intervals, its measures in the order of ``units``.

        ``each`` measure -> layer -> ``[N, H]``, a number per sequence; NaN is left out. ``null`` likewise or ``[H]``. ``single``:
        measures that are one number per head, ``[H]``, and have no interval.
        """
        means, low, high = _over_sequences(each)
        rows = means | {name: dict(part) for name, part in (single or {}).items()}
        nulls = {
            name: {layer: row if row.ndim == 1 else row.nanmean(0) for layer, row in part.items()}
            for name, part in (null or {}).items()
        }
        return cls(
            title=title,
            values={name: rows[name] for name in units if name in rows} | rows,
            units=units,
            low=low,
            high=high,
            null=nulls,
            undefined=undefined or {},
            provenance=provenance or Provenance("maps"),
        )

    @property
    def layers(self) -> tuple[int | str, ...]:
        """The layers, in the order of the model."""
        return tuple(next(iter(self.values.values())))

    def frame(self) -> pd.DataFrame:
        """One row per layer and head: ``layer, head``, then each measure with its ``_low _high _null`` where it has them."""
        import pandas as pd

        parts = []
        for layer, first in next(iter(self.values.values())).items():
            columns: dict[str, Any] = {"layer": layer, "head": range(len(first))}
            for name, part in _columns(self):
                columns[name] = _numbers(part[layer])
            parts.append(pd.DataFrame(columns))
        return pd.concat(parts, ignore_index=True)

    def top(self, measure: str | None = None, n: int | None = None) -> list[Head]:
        """The heads with a number, largest first."""
        name = self._measure(measure)
        null = self.null.get(name)
        found = [
            Head(layer, h, float(row[h]), float("nan") if null is None else float(null[layer][h]))
            for layer, row in self.values[name].items()
            for h in range(len(row))
            if not bool(row[h].isnan())
        ]
        return sorted(found, key=lambda head: -head.value)[:n]

    def plot(self, ax: Axes | None = None, measure: str | None = None) -> Axes:
        """Layer x head heat map of one measure."""
        name = self._measure(measure)
        rows = list(self.values[name].values())
        known = torch.cat([row[row.isfinite()].double().cpu() for row in rows])
        limits = (min(0.0, float(known.min())), None) if len(known) else (0.0, 1.0)
        title = f"{self.title}: {name.replace('_', ' ')}\n{self.provenance.model}"
        return head_map(ax, rows, self.layers, title=title, unit=self.units[name], limits=limits)

    def _measure(self, name: str | None) -> str:
        return _known(self.values, name)


@dataclass(frozen=True)
class LayerTable(Result):
    """``values`` measure -> ``[L]``, one number per layer; ``low``, ``high``, ``null`` likewise. See ``HeadTable``."""

    title: str
    layers: tuple[int | str, ...]
    values: Mapping[str, Tensor]
    units: Mapping[str, str]
    low: Mapping[str, Tensor] = field(default_factory=dict)
    high: Mapping[str, Tensor] = field(default_factory=dict)
    null: Mapping[str, Tensor] = field(default_factory=dict)
    undefined: Mapping[str, str] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=lambda: Provenance("maps"))

    def __post_init__(self) -> None:
        _check_measures(self)
        _check_shapes(self, (len(self.layers),))

    @classmethod
    def averaged(
        cls,
        title: str,
        each: Mapping[str, Mapping[int | str, Tensor]],
        units: Mapping[str, str],
        *,
        null: Mapping[str, Mapping[int | str, Tensor]] | None = None,
        undefined: Mapping[str, str] | None = None,
        provenance: Provenance | None = None,
    ) -> LayerTable:
        """A table of means over sequences with 95% intervals, in the order of ``units``: ``each`` measure -> layer ->
        ``[N]``, ``null`` likewise; NaN is left out."""
        layers = tuple(next(iter(each.values())))
        means, low, high = ({n: _stacked(part) for n, part in found.items()} for found in _over_sequences(each))
        return cls(
            title=title,
            layers=layers,
            values={name: means[name] for name in units if name in means} | means,
            units=units,
            low=low,
            high=high,
            null={n: _stacked({la: row.nanmean() for la, row in part.items()}) for n, part in (null or {}).items()},
            undefined=undefined or {},
            provenance=provenance or Provenance("maps"),
        )

    def frame(self) -> pd.DataFrame:
        """One row per layer: ``layer``, then each measure with its ``_low _high _null`` where it has them."""
        import pandas as pd

        return pd.DataFrame({"layer": self.layers} | {name: _numbers(part) for name, part in _columns(self)})

    def plot(self, ax: Axes | None = None, measure: str | None = None) -> Axes:
        """One measure by layer, with its interval and its null."""
        name = _known(self.values, measure)
        ax = axis(ax, 4.8, 3.2)
        places = list(range(len(self.layers)))
        ax.plot(places, _numbers(self.values[name]), marker="o", label=name.replace("_", " "))
        if name in self.low:
            ax.fill_between(places, _numbers(self.low[name]), _numbers(self.high[name]), alpha=0.2, linewidth=0)
        if name in self.null:
            ax.plot(places, _numbers(self.null[name]), linestyle="--", color="0.5", label="by chance")
            ax.legend()
        step = max(1, len(places) // 16)
        ax.set_xticks(places[::step], [str(layer) for layer in self.layers[::step]])
        title = wrapped(f"{self.title}\n{self.provenance.model}", 3.8)
        ax.set(xlabel="layer", ylabel=wrapped(self.units[name], 2.8), title=title)
        return ax


@dataclass(frozen=True)
class TokenTable(Result):
    """``values`` measure -> ``[B, T]``, one number per token, or ``[L, B, T]`` with ``layers``; ``low``, ``high``, ``null``
    likewise. ``tokens[b][t]`` is the text of a token, where it is known. See ``HeadTable``."""

    title: str
    values: Mapping[str, Tensor]
    units: Mapping[str, str]
    tokens: tuple[tuple[str, ...], ...] = ()
    layers: tuple[int | str, ...] = ()
    low: Mapping[str, Tensor] = field(default_factory=dict)
    high: Mapping[str, Tensor] = field(default_factory=dict)
    null: Mapping[str, Tensor] = field(default_factory=dict)
    undefined: Mapping[str, str] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=lambda: Provenance("maps"))

    def __post_init__(self) -> None:
        _check_measures(self)
        first = tuple(next(iter(self.values.values())).shape[-2:])
        _check_shapes(self, (len(self.layers), *first) if self.layers else first)

    def frame(self) -> pd.DataFrame:
        """One row per token: ``[layer,] sequence, position, token``, then each measure with its extras."""
        import pandas as pd

        first = next(iter(self.values.values()))
        batch, length = first.shape[-2:]
        copies = len(self.layers) or 1
        names = [row[t] if t < len(row) else "" for row in self.tokens or ((),) * batch for t in range(length)]
        columns: dict[str, Any] = {}
        if self.layers:
            columns["layer"] = [layer for layer in self.layers for _ in range(batch * length)]
        columns["sequence"] = torch.arange(batch).repeat_interleave(length).repeat(copies).numpy()
        columns["position"] = torch.arange(length).repeat(batch * copies).numpy()
        columns["token"] = names * copies
        return pd.DataFrame(columns | {name: _numbers(part) for name, part in _columns(self)})

    def plot(self, ax: Axes | None = None, measure: str | None = None) -> Axes:
        """One measure over the tokens of the first sequence, a line per layer."""
        name = _known(self.values, measure)
        values = self.values[name]
        lines = values[:, 0] if self.layers else values[:1]
        length = lines.shape[-1]
        ax = axis(ax, max(5.0, min(14.0, 1.5 + 0.16 * length)), 3.2)
        for i, line in enumerate(lines):
            ax.plot(range(length), _numbers(line), marker=".", label=str(self.layers[i]) if self.layers else None)
        if self.layers:
            ax.legend(title="layer", fontsize=7)
        names = self.tokens[0] if self.tokens else ()
        if names and length <= 80:
            ax.set_xticks(range(length), list(names[:length]), rotation=70, ha="right", fontsize=7, parse_math=False)
        title = wrapped(f"{self.title}\n{self.provenance.model}", 4.0)
        ax.set(xlabel="token", ylabel=wrapped(self.units[name], 2.8), title=title)
        return ax


def _over_sequences(each: Mapping[str, Layers]) -> list[dict[str, dict[int | str, Tensor]]]:
    """Means over the first axis, and the ends of their intervals."""
    found: list[dict[str, dict[int | str, Tensor]]] = [{}, {}, {}]
    for name, part in each.items():
        for layer, rows in part.items():
            for kept, numbers in zip(found, (rows.nanmean(0), *interval(rows)), strict=True):
                kept.setdefault(name, {})[layer] = numbers
    return found


def _stacked(part: Mapping[int | str, Tensor]) -> Tensor:
    return torch.stack(list(part.values()))


def _check_measures(table: Any) -> None:
    if not table.values:
        raise WorkbenchError(f"{type(table).__name__} {table.title!r} holds no measure")
    for name in table.values:
        if name not in table.units:
            raise WorkbenchError(f"measure {name!r} of {table.title!r} has no unit")
    for extra in _EXTRAS:
        for name in getattr(table, extra):
            _known(table.values, name)


def _check_shapes(table: Any, wanted: tuple[int, ...]) -> None:
    for name, part in _columns(table):
        if tuple(part.shape) != wanted:
            raise WorkbenchError(f"{name!r} of {table.title!r} is {list(wanted)}; got {list(part.shape)}")


def _sizes(shapes: Mapping[int | str, tuple[int, ...]]) -> str:
    return ", ".join(f"layer {layer}: {list(shape)}" for layer, shape in shapes.items())


def _columns(table: Any) -> list[tuple[str, Any]]:
    found = []
    for name, part in table.values.items():
        found.append((name, part))
        found += [
            (f"{name}_{extra}", getattr(table, extra)[name]) for extra in _EXTRAS if name in getattr(table, extra)
        ]
    return found


def _known(values: Mapping[str, Any], name: str | None) -> str:
    if name is None:
        return next(iter(values))
    if name not in values:
        raise UnknownName("measure", name, values)
    return name


def _numbers(values: Tensor) -> Any:
    return values.detach().cpu().double().flatten().numpy()
