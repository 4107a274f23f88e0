"""``variants``: the attention mechanisms that the workbench has, and what one of them does."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.apps.inputs import LARGEST_SEED, JsonOption
from workbench.apps.terminal import answer, table, working
from workbench.errors import UnknownName, WorkbenchError

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from workbench.catalogue import Variant

_SHADES = " .:-=+*#%@"
_MOST = 64


def variants(
    name: Annotated[str | None, typer.Argument(metavar="[VARIANT]", help="Show this mechanism and its map.")] = None,
    family: Annotated[str | None, typer.Option("--family", help="Only this family.")] = None,
    tokens: Annotated[int, typer.Option("--tokens", help="Size of the example of VARIANT, in tokens.")] = 16,
    head: Annotated[int, typer.Option("--head", min=0, help="The head of VARIANT that is drawn.")] = 0,
    seed: Annotated[int, typer.Option("--seed", min=0, max=LARGEST_SEED, help="Seed of the example.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """The attention variants, or one of them and its map on an example.

    Each is an operator with an exact map; `in models` tells whether a native model can be built with it.
    """
    with working("variants"):
        import workbench as wb

        known = wb.variants()
    if name is not None:
        if not 1 <= tokens <= _MOST:
            raise WorkbenchError(f"--tokens is between 1 and {_MOST}: the map is drawn; got {tokens}")
        _one(known[name], tokens, head, seed, as_json)
        return
    rows = known.frame()
    if family is not None:
        if family not in set(rows["family"]):
            raise UnknownName("family of variants", family, dict.fromkeys(rows["family"]))
        rows = rows[rows["family"] == family]
    shown = rows[["name", "family", "paper", "in models"]]

    def show(console: Console) -> None:
        cells = [["yes" if cell is True else "" if cell is False else cell for cell in row] for row in shown.values]
        console.print(table(f"{len(shown)} attention variants", list(shown.columns), cells))

    answer(as_json, {"command": "variants", "rows": rows}, show)


def _one(variant: Variant, tokens: int, head: int, seed: int, as_json: bool) -> None:
    import torch

    from workbench.attention_map import METADATA

    with working(variant.name):
        arguments = variant.example(seed, tokens, torch.float64)
        output, amap = variant(**arguments)
        if not 0 <= head < amap.shape[1]:
            raise UnknownName("head", head, range(amap.shape[1]))
        weights = amap.heads([head]).dense()[0, 0]
    told = {field: getattr(amap, field) for field in METADATA}
    error = None
    if variant.value_input is not None:
        error = float((amap.matvec(arguments[variant.value_input]) - output).abs().max())
    record: dict[str, Any] = {
        "name": variant.name, "paper": variant.paper, "family": variant.family, "priority": variant.priority,
        "operator": f"{variant.operator.__module__}.{variant.operator.__name__}",
        "value_input": variant.value_input, "causal": variant.causal, "in models": variant.recipe is not None,
        "reference": variant.reference, "note": variant.note, "map": type(amap).__name__, "shape": amap.shape,
        **told, "largest |output - M v|": error,
    }  # fmt: skip

    def show(console: Console) -> None:
        console.print(table(variant.name, ["", ""], [[key, _said(value)] for key, value in record.items()]))
        console.print(inspect.cleandoc(variant.operator.__doc__ or "").split("\n\n")[0])
        console.print(f"\nthe map of head {head}, rows are queries; darkest is {float(weights.abs().max()):.3g}")
        for line in drawn(weights):
            console.print(line)

    answer(as_json, {"command": "variants", **record, "weights": weights.tolist()}, show)


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.2g}"
    return " x ".join(map(str, value)) if isinstance(value, tuple) else str(value or "-")


def drawn(weights: Tensor) -> list[str]:
    """The map ``[Q, K]`` as lines of shades, two letters per weight; negative weights are followed by ``n``."""
    top = float(weights.abs().max()) or 1.0
    lines = []
    for row in weights.tolist():
        cells = []
        for weight in row:
            level = min(len(_SHADES) - 1, round(abs(weight) / top * (len(_SHADES) - 1)))
            level = max(level, 1) if weight != 0 else 0
            cells.append(_SHADES[level] + ("n" if weight < 0 else " "))
        lines.append("".join(cells).rstrip())
    return lines
