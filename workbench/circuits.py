"""Circuits: named nodes or edges of a model's graph with scores and a kept set. Operations return new circuits."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.graph import CHANNELS, Graph, circuit_graph, edge_name, edge_parts, name_place
from workbench.results import axis, new_folder

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = ["CHANNELS", "Circuit", "Graph", "circuit_graph", "edge_name", "edge_parts", "name_place"]

LEVELS = ("node", "edge")
_FORMAT = 1
_DRAWN = 200
_TAKEN = ("name", "node", "source", "target", "channel", "place", "score", "kept")
_NODE = re.compile(r"^(?:a(?P<layer>\d+)\.[hg](?P<head>\d+)|m(?P<mlp>\d+))$")


@dataclass(frozen=True)
class Circuit:
    """Scored nodes or edges and which of them are kept.

    ``level`` is ``"node"`` or ``"edge"``. ``names`` are node names (``a3.h5``, ``m2``) or edge names
    (``a0.h1->a1.h0<k>``, ``input->logits``), each with ``@place`` behind it in a circuit that tells positions apart
    (``a3.h5@END``). ``scores`` ``[N]``: positive means that the part supports the clean
    behaviour; the unit is the method's and stands in ``provenance``. ``kept`` ``[N]`` bool is the circuit proper.
    ``columns`` holds further numbers per name (nulls, baselines), shown side by side in ``frame()``. NaN is allowed
    in ``columns`` and means undefined; scores are finite.
    """

    level: str
    names: tuple[str, ...]
    scores: Tensor
    kept: Tensor
    provenance: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise UnknownName("circuit level", self.level, LEVELS)
        object.__setattr__(self, "names", tuple(self.names))
        object.__setattr__(self, "scores", torch.as_tensor(self.scores).detach().double().cpu())
        object.__setattr__(self, "kept", torch.as_tensor(self.kept).cpu())
        columns = {name: torch.as_tensor(values).detach().cpu() for name, values in self.columns.items()}
        object.__setattr__(self, "columns", columns)
        for name in columns:
            if name in _TAKEN:
                raise WorkbenchError(f"a circuit column cannot be called {name!r}: frame() has one of its own")
        n = len(self.names)
        if len(set(self.names)) != n:
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise WorkbenchError(f"names of a circuit are unique; {twice!r} occurs more than once")
        for name, values in (("scores", self.scores), ("kept", self.kept), *columns.items()):
            if tuple(values.shape) != (n,):
                raise WorkbenchError(f"circuit {name} is [N] with N={n} names; got {list(values.shape)}")
        if self.kept.dtype != torch.bool:
            raise WorkbenchError(f"circuit kept is bool; got {self.kept.dtype}")
        if not torch.isfinite(self.scores).all():
            worst = self.names[int((~torch.isfinite(self.scores)).nonzero()[0])]
            raise WorkbenchError(f"circuit scores are finite; {worst!r} is not")
        if self.level == "edge":
            for name in self.names:
                edge_parts(name)

    @classmethod
    def of(cls, level: str, names: Iterable[str], kept: Iterable[str], **provenance: Any) -> Circuit:
        """A circuit without scores of its own: score 1 for the ``kept`` names, 0 for the others."""
        names, wanted = tuple(names), set(kept)
        for name in wanted - set(names):
            raise UnknownName(level, name, names)
        flags = torch.tensor([name in wanted for name in names], dtype=torch.bool)
        return cls(level, names, flags.double(), flags, provenance)

    def __len__(self) -> int:
        """Number of kept nodes or edges."""
        return int(self.kept.sum())

    @property
    def edges(self) -> tuple[tuple[str, str, str], ...]:
        """Kept edges as (source, target, channel); refused for node circuits."""
        if self.level != "edge":
            raise Refused("a node circuit has no edges; find one with find_circuit(..., level='edge')")
        return tuple(edge_parts(name) for name, kept in zip(self.names, self.kept.tolist(), strict=True) if kept)

    @property
    def nodes(self) -> tuple[str, ...]:
        """Kept nodes, or the ends of the kept edges, in the order of ``names``, without their places."""
        if self.level == "node":
            stay = [name for name, kept in zip(self.names, self.kept.tolist(), strict=True) if kept]
            return tuple(dict.fromkeys(name_place(name)[0] for name in stay))
        ends = {end for source, target, _ in self.edges for end in (source, target)}
        known = dict.fromkeys(end for name in self.names for end in edge_parts(name)[:2])
        return tuple(sorted((end for end in known if end in ends), key=_depth))

    def top(self, n: int, signed: bool = False) -> Circuit:
        """Keep the ``n`` largest by absolute score, or by ``signed`` score. Ties go to the earlier name."""
        if not 0 <= n <= len(self.names):
            raise WorkbenchError(f"top wants 0 <= n <= {len(self.names)} {self.level}s; got {n}")
        key = self.scores if signed else self.scores.abs()
        kept = torch.zeros(len(self.names), dtype=torch.bool)
        kept[key.argsort(descending=True, stable=True)[:n]] = True
        return replace(self, kept=kept)

    def threshold(self, t: float, signed: bool = False) -> Circuit:
        """Keep what scores at least ``t`` in absolute value, or ``signed``."""
        return replace(self, kept=(self.scores if signed else self.scores.abs()) >= t)

    def over_positions(self) -> Circuit:
        """The circuit without places: scores summed over the places of a part, kept where any of them is kept."""
        bare = [name_place(name)[0] for name in self.names]
        index = {name: i for i, name in enumerate(dict.fromkeys(bare))}
        at = torch.tensor([index[name] for name in bare], dtype=torch.int64)
        scores = self.scores.new_zeros(len(index)).index_add_(0, at, self.scores)
        kept = torch.zeros(len(index), dtype=torch.int64).index_add_(0, at, self.kept.long()) > 0
        columns = self.columns if len(index) == len(bare) else {}
        return Circuit(self.level, tuple(index), scores, kept, self.provenance, columns)

    def rescored(self, scores: Tensor) -> Circuit:
        """The same names and kept set with other scores; ``columns`` are dropped."""
        return replace(self, scores=scores, columns={})

    def __and__(self, other: Circuit) -> Circuit:
        """Kept in both."""
        return self._combine(other, torch.logical_and)

    def __or__(self, other: Circuit) -> Circuit:
        """Kept in either."""
        return self._combine(other, torch.logical_or)

    def __sub__(self, other: Circuit) -> Circuit:
        """Kept here and not in ``other``."""
        return self._combine(other, lambda a, b: a & ~b)

    def _combine(self, other: Circuit, rule: Callable[[Tensor, Tensor], Tensor]) -> Circuit:
        if not isinstance(other, Circuit):
            return NotImplemented
        if self.level != other.level:
            raise WorkbenchError(f"cannot combine a circuit of {self.level}s with one of {other.level}s")
        mine = dict(zip(self.names, zip(self.scores.tolist(), self.kept.tolist(), strict=True), strict=True))
        theirs = dict(zip(other.names, zip(other.scores.tolist(), other.kept.tolist(), strict=True), strict=True))
        names = tuple(dict.fromkeys((*self.names, *other.names)))
        absent = (0.0, False)
        kept = rule(
            torch.tensor([mine.get(name, absent)[1] for name in names], dtype=torch.bool),
            torch.tensor([theirs.get(name, absent)[1] for name in names], dtype=torch.bool),
        )
        scores = torch.tensor([(mine.get(name) or theirs[name])[0] for name in names], dtype=torch.float64)
        columns = self.columns if names == self.names else {}
        return Circuit(self.level, names, scores, kept, self.provenance, columns)

    def frame(self) -> pd.DataFrame:
        """Columns ``source target channel score kept`` (edges) or ``node score kept`` (nodes), then ``columns``; with
        ``place`` before ``score`` in a circuit that tells positions apart."""
        import pandas as pd

        if self.level == "edge":
            parts = [edge_parts(name) for name in self.names]
            labels = {key: [part[i] for part in parts] for i, key in enumerate(("source", "target", "channel"))}
        else:
            labels = {"node": [name_place(name)[0] for name in self.names]}
        places = [name_place(name)[1] for name in self.names]
        if any(places):
            labels["place"] = places
        extra = {name: values.numpy() for name, values in self.columns.items()}
        return pd.DataFrame({**labels, "score": self.scores.numpy(), "kept": self.kept.numpy(), **extra})

    def plot(self, ax: Axes | None = None) -> Axes:
        """Node scores as a layer by head picture, or the kept edges between nodes (at most the 200 strongest), over all
        positions."""
        from workbench.circuit_plot import draw_edges, draw_nodes

        whole = self.over_positions()
        return draw_nodes(whole, axis(ax)) if self.level == "node" else draw_edges(whole, axis(ax, 7, 5), _DRAWN)

    def save(self, path: str | Path) -> Path:
        """Write ``circuit.parquet`` and ``circuit.json`` into the new folder ``path`` (temporary name, then rename)."""
        path = Path(path)
        with new_folder(path) as part:
            table = self.frame()
            table.insert(0, "name", list(self.names))
            table.to_parquet(part / "circuit.parquet")
            record = {"format": _FORMAT, "level": self.level, "rows": len(self.names), "columns": list(self.columns)}
            record["provenance"] = dict(self.provenance)
            (part / "circuit.json").write_text(json.dumps(record, indent=1, default=str))
        return path

    @classmethod
    def load(cls, path: str | Path) -> Circuit:
        """The circuit saved in the folder ``path``; a missing, half-written or damaged one is refused."""
        import pandas as pd

        path = Path(path)
        if not path.is_dir():
            raise WorkbenchError(f"no circuit folder at {path}")
        for name in ("circuit.json", "circuit.parquet"):
            if not (path / name).is_file():
                raise WorkbenchError(f"{path} is no complete circuit: {name} is missing; save it again")
        try:
            record = json.loads((path / "circuit.json").read_text())
            table = pd.read_parquet(path / "circuit.parquet")
            if record["format"] != _FORMAT:
                raise WorkbenchError(f"{path} has circuit format {record['format']}; this version reads {_FORMAT}")
            if len(table) != record["rows"]:
                raise WorkbenchError(f"{path} is damaged: {len(table)} rows, {record['rows']} announced; save it again")
            return cls(
                record["level"],
                tuple(table["name"]),
                torch.tensor(table["score"].to_numpy(copy=True)),
                torch.tensor(table["kept"].to_numpy(copy=True)),
                record["provenance"],
                {name: torch.tensor(table[name].to_numpy(copy=True)) for name in record["columns"]},
            )
        except WorkbenchError:
            raise
        except Exception as error:
            raise WorkbenchError(f"{path} is damaged: {error}; save it again") from error

    def _repr_html_(self) -> str:
        """The picture, and the table from the largest absolute score down."""
        from workbench.figure_html import picture
        from workbench.fragments import ROWS, table, view

        rows = self.frame()
        order = rows["score"].abs().sort_values(ascending=False, kind="stable").index[:ROWS]
        said = f"{len(self):,} of {len(self.names):,} {self.level}s kept"
        method = f", {self.provenance['method']}" if "method" in self.provenance else ""
        first = f", the {ROWS} largest scores shown" if len(rows) > ROWS else ""
        return view("Circuit", picture(self.plot, "circuit"), table(rows.loc[order]), said=said + method + first)

    def __repr__(self) -> str:
        method = self.provenance.get("method")
        return f"Circuit({len(self):,} of {len(self.names):,} {self.level}s kept" + (f", {method})" if method else ")")


def place(node: str) -> tuple[float, float]:
    """Where a node is drawn: (head index or the column left of the heads, height). Key-value heads, which only read,
    stand below the heads of their layer."""
    match = _NODE.match(node)
    if match and match["mlp"] is not None:
        return -1.0, int(match["mlp"]) + 0.5
    if match:
        return float(match["head"]), int(match["layer"]) - 0.25 * (".g" in node)
    return -1.0, -1.0 if node == "input" else float("inf")


def _depth(node: str) -> tuple[float, float]:
    x, y = place(node)
    return y, x
