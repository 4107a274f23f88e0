"""From a results folder to the sections of a report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from workbench.apps import figures
from workbench.apps.report import Numbers, Part, Picture, Prose, Section, write_report
from workbench.apps.store import DEPTH, Stored, account, stored
from workbench.circuits import Circuit
from workbench.errors import WorkbenchError
from workbench.figure_html import style
from workbench.probes.atlas import draw_tile, draw_wall
from workbench.results import SavedResult

Saved = SavedResult | Circuit
_SHOWN_HEADS = 8
_SHOWN_EDGES = 30
_SCORES = {
    "discrete-sae": "Score: codes that only the clean prompts use; null_mean, null_sd, z and p from shuffled labels; "
    "mean_difference and probe are baselines without an autoencoder",
}


def report_of(folder: str | Path, path: str | Path) -> Path:
    """Write the report of everything saved in ``folder`` to ``path``. Half-written or damaged results are refused and named."""
    things = stored(folder)
    told = account(folder)
    if not things:
        raise WorkbenchError(
            f"nothing is saved in {folder}, {DEPTH} folders deep; `make demo` or a command with --out saves results"
        )
    loaded = {thing.name: thing.load() for thing in things}
    with style():
        if told is None:
            sections = [Section(name, tuple(parts_of({name: saved}))) for name, saved in loaded.items()]
            return write_report(sections, path, title="Attention workbench", facts=_facts(list(things)))
        sections, used = [], set()
        for step in told["steps"]:
            mine = {name: loaded[name] for name in step["results"]}
            used |= set(mine)
            parts: list[Part] = [Prose(tuple(step["lines"]), listed=True)] if step["lines"] else []
            if step.get("error"):
                parts.append(Prose((f"This step failed: {step['error']}",), failed=True))
            sections.append(Section(step["title"], (*parts, *parts_of(mine))))
        for name in loaded:
            if name not in used:
                sections.append(Section(name, tuple(parts_of({name: loaded[name]}))))
        sections.append(Section("Where the numbers come from", tuple(_provenance(told, loaded))))
        return write_report(sections, path, title=told["title"], facts=[(k, str(v)) for k, v in told["facts"].items()])


def parts_of(saved: Mapping[str, Saved]) -> Iterator[Part]:
    """Figures and tables of results that belong together; kinds that are not known here show their table."""
    groups: dict[str, dict[str, Saved]] = {}
    for name, thing in saved.items():
        groups.setdefault("Circuit" if isinstance(thing, Circuit) else thing.type, {})[name] = thing
    draw = {
        "SinkResult": _sinks,
        "HeadScores": _heads,
        "RetrievalResult": _retrieval,
        "FaithfulnessResult": _faithfulness,
        "Circuit": _circuits,
        "Atlas": _atlas,
        "Tile": _tiles,
    }
    for kind, members in groups.items():
        yield from draw.get(kind, _tables)(members, saved)


def _sinks(group: Mapping[str, Any], saved: Mapping[str, Saved]) -> Iterator[Part]:
    frames = {model_of(thing): thing.table for thing in group.values()}
    first = {name: frame[frame["key"] == 0] for name, frame in frames.items()}
    yield Picture(
        figures.heads_grid(first, "share", "share of the first token"),
        "Share of attention that each head gives to the first token of the text, averaged over the queries that may see it.",
    )
    rows = []
    for name, frame in frames.items():
        seen = frame[frame["queries"] >= frame["queries"].max() / 2].dropna(subset=["share"])
        best = seen.loc[seen.groupby(["layer", "head"])["share"].idxmax()]
        best = best.assign(model=name, token=best["token"].replace("", "(differs)"))
        rows.append(best[["model", "layer", "head", "key", "token", "share", "uniform"]])
    table = pd.concat(rows, ignore_index=True).sort_values("share", ascending=False, kind="stable")
    yield Numbers(table, "Favourite key of each head; uniform is what even attention would give it", rows=20)


def _heads(group: Mapping[str, Any], saved: Mapping[str, Saved]) -> Iterator[Part]:
    for thing in group.values():
        kinds = list(dict.fromkeys(thing.table["kind"]))
        tables = {kind: thing.table[thing.table["kind"] == kind] for kind in kinds}
        yield Picture(
            figures.heads_grid(tables, "value", "mean attention mass"),
            f"{model_of(thing)}: mass on the previous token, on earlier copies of the token, and on what followed them.",
        )
        best = thing.table.sort_values("value", ascending=False).groupby("kind", sort=False).head(4)
        best = best.sort_values(["kind", "value"], ascending=[True, False])[
            ["kind", "layer", "head", "value", "low", "high", "null", "uniform", "z"]
        ]
        yield Numbers(
            best, "Strongest heads with a 95% interval over sequences; null is the same keys where nothing repeats"
        )


def _retrieval(group: Mapping[str, Any], saved: Mapping[str, Saved]) -> Iterator[Part]:
    for thing in group.values():
        table, tensors = thing.table, thing.tensors
        rows = pd.DataFrame({name: tensors[name].numpy() for name in ("length", "depth", "recall")})
        yield Picture(
            figures.grid(
                rows.pivot_table(index="depth", columns="length", values="recall"),
                "length in tokens",
                "depth",
                "recall",
            ),
            "Part of the needles that the model retrieved, by length of the text and depth of the needle.",
        )
        if thing.labels.get("reason"):
            yield Prose((f"The scores of the heads are undefined: {thing.labels['reason']}.",))
            continue
        yield Picture(
            figures.heads_grid({model_of(thing): table}, "score", "copy score"),
            "Copy score: how much of the answer each head fetched from the needle.",
        )
        best = table.sort_values("score", ascending=False).head(_SHOWN_HEADS)
        shown = best[["layer", "head", "score", "low", "high", "null", "looks", "looks_null", "trials"]]
        yield Numbers(
            shown, "Best heads with a 95% interval over trials; null counts random positions outside of the needle"
        )


def _faithfulness(group: Mapping[str, Any], saved: Mapping[str, Saved]) -> Iterator[Part]:
    lines, nulls, rows = {}, {}, []
    for thing in group.values():
        table = thing.table
        about = thing.labels["provenance"].get("circuit", {})
        method = about.get("method", "circuit")
        name = f"{method}, {thing.labels['level']}s"
        x = table["fraction"].tolist()
        lines[name] = (x, table["faithfulness"].tolist())
        area = {"circuit": name, "CPR": _area(x, table["signed"]), "CMD": _area(x, (1 - table["faithfulness"]).abs())}
        if "random" in table:
            nulls[f"random {thing.labels['level']}s"] = (x, table["random"].tolist())
            area |= {"CPR of random": _area(x, table["random"]), "CMD of random": _random_cmd(thing)}
        rows.append(area | {"metric, all": thing.labels["full"], "metric, nothing": thing.labels["empty"]})
    yield Picture(
        figures.curves(lines, nulls, "part of the model kept", "faithfulness"),
        "Behaviour that remains when only the best-scored parts keep their clean values: 1 is all of it, 0 none.",
    )
    yield Numbers(
        pd.DataFrame(rows),
        "Areas under these curves: CPR higher is better, CMD (distance to the model) lower is better",
    )


def _random_cmd(thing: Any) -> float:
    curves, x = thing.tensors["random"].numpy(), thing.table["fraction"].to_numpy()
    return float(np.mean([np.trapezoid(np.abs(1 - row), x) for row in curves]))


def _area(x: Sequence[float], y: Sequence[float] | pd.Series) -> float:
    return float(np.trapezoid(np.asarray(y, float), np.asarray(x, float)))


def _circuits(group: Mapping[str, Any], saved: Mapping[str, Saved]) -> Iterator[Part]:
    for circuit in group.values():
        about = circuit.provenance
        drawn = circuit if circuit.level == "node" else circuit.top(min(_SHOWN_EDGES, len(circuit.names)))
        figure, (ax,) = figures.panels(1, width=6.5, height=3.6 if circuit.level == "node" else 4.8)
        drawn.plot(ax)
        for text in ax.texts:
            text.set_color(figures.DARK)
        said = f"{about.get('method', 'circuit')}: " if about.get("method") else ""
        what = (
            "scores of all nodes, kept ones framed" if circuit.level == "node" else f"the {len(drawn)} strongest edges"
        )
        yield Picture(figure, f"{said}{what}.")
        frame = circuit.frame()
        order = frame["score"].abs().sort_values(ascending=False, kind="stable").index
        meaning = _SCORES.get(about.get("method", ""), "A positive score supports the clean behaviour")
        yield Numbers(frame.loc[order], meaning, rows=15)


def _atlas(group: Mapping[str, Any], saved: Mapping[str, Saved]) -> Iterator[Part]:
    for thing in group.values():
        size, tensors, table = thing.labels["size"], thing.tensors, thing.table
        if size is not None:
            figure, (ax,) = figures.panels(1, width=9.5, height=1.25 * table["layer"].nunique() + 0.6)
            draw_wall(ax, {layer: tensors[f"blocks.{layer}"] for layer in table["layer"].unique()})
            tokens = len(thing.labels["tokens"])
            yield Picture(
                figure,
                f"Every head's attention over all {tokens:,} tokens, in blocks of {size} (query down, key to the right, "
                "brighter is more, each head on a square-root scale of its own).",
            )
            close = _close_ups(saved, tensors)
            if close:
                yield Picture(
                    figures.block_maps(close, size), "The same for the heads that are looked at in detail below."
                )
        yield Numbers(
            table,
            "Per head: entropy in nats and distance in tokens, averaged over queries; the key with the largest share",
        )


def _close_ups(saved: Mapping[str, Saved], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Block maps of the heads that have exact tiles among ``saved``."""
    tiles = [t.labels for t in saved.values() if not isinstance(t, Circuit) and t.type == "Tile"]
    heads = dict.fromkeys((tile["layer"], tile["head"]) for tile in tiles)
    return {f"head {layer}.{head}": tensors[f"blocks.{layer}"][head] for layer, head in heads}


def _tiles(group: Mapping[str, Any], saved: Mapping[str, Saved]) -> Iterator[Part]:
    for thing in group.values():
        about = thing.labels
        weights = thing.tensors["weights"]
        figure, (ax,) = figures.panels(1, 1, 1.8 + 0.3 * weights.shape[1], 1.4 + 0.26 * weights.shape[0])
        queries = [f"{about['query_start'] + i} {token}" for i, token in enumerate(about["query_tokens"])]
        keys = [f"{about['key_start'] + i} {token}" for i, token in enumerate(about["key_tokens"])]
        draw_tile(ax, weights, queries, keys)
        ax.set_title(f"head {about['layer']}.{about['head']}")
        yield Picture(
            figure,
            f"Exact weights in head {about['layer']}.{about['head']}, {about['note']}."
            if about.get("note")
            else "Exact weights.",
        )


def _tables(group: Mapping[str, Any], saved: Mapping[str, Saved]) -> Iterator[Part]:
    for name, thing in group.items():
        yield Numbers(thing.frame(), name)


def model_of(saved: Any) -> str:
    """The model a saved thing is about."""
    about = saved.provenance if isinstance(saved, Circuit) else saved.labels.get("provenance", {})
    return str(about.get("model", "model"))


def _facts(things: list[Stored]) -> list[tuple[str, str]]:
    return [("results", ", ".join(thing.name for thing in things))]


def _provenance(told: Mapping[str, Any], loaded: Mapping[str, Any]) -> Iterator[Part]:
    versions = told["versions"]
    yield Numbers(pd.DataFrame({"package": list(versions), "version": list(versions.values())}), "Versions")
    rows = []
    for name, saved in loaded.items():
        about = saved.provenance if isinstance(saved, Circuit) else saved.labels.get("provenance", {})
        keys = ("model", "revision", "dtype", "device", "attention", "kernel", "method")
        rows.append({"result": name, **{key: str(about.get(key, "")) for key in keys}})
    yield Numbers(pd.DataFrame(rows), "Results")
    timed = [{"step": step["title"], "seconds": step["seconds"]} for step in told["steps"]]
    yield Numbers(pd.DataFrame(timed), "Run time")
