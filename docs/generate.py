"""Write the generated pages of the documentation, and the copy of the sources that the API reference is read from.

    python docs/generate.py            write the pages of PAGES, the figures of the variants, and build/api/
    python docs/generate.py --check    write nothing; exit 1 if a page is not what would be written

The tables come from the code: the families from the builders of the conformance suite, so a family is listed if and
only if it is tested.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("probes", "kernels", "apps", "datasets")


def families() -> str:
    sys.path.insert(0, str(ROOT / "tests" / "models"))
    from builders import BUILDERS, CONFORMING, hugging_face
    from sparse_nets import SPARSE_NETS

    titles = ("model", "mixer", "route", "exactness", "layers are called")
    rows = [_family(build().model) for name, build in BUILDERS.items() if name.startswith("hf-")]
    others = [_family(hugging_face(name).model) for name in SPARSE_NETS if name not in CONFORMING]
    return (
        "# Model families\n\n"
        "Each of these runs through the whole conformance suite as a small random model: maps against the model's own eager\n"
        "attention in float64 (where something else than softmax mixes the tokens: against the values and the output of the "
        "layer\n"
        "itself), logits bit for bit equal with capture on and off, reads and edits, padding, caches, and nothing left behind.\n"
        "Other families of transformers work if their attention goes through its attention interface; otherwise capture is\n"
        "refused with the name of the layer. `model.manifest()` tells beforehand.\n\n"
        + table(titles, rows)
        + "\nThese are tested layer by layer: the map times the layer's own values is its own output in float64, with logits\n"
        "bit for bit equal. They take no part in the suite, as they have a fixed length, no padding, no cache, or two\n"
        "residual streams.\n\n" + table(titles, others)
    )


def _family(model: Any) -> tuple[str, ...]:
    records = model.manifest().layers
    return (
        f"`{type(model.model).__name__}`",
        ", ".join(dict.fromkeys(r.mixer for r in records)),
        ", ".join(dict.fromkeys(r.route for r in records)),
        ", ".join(dict.fromkeys(r.exactness for r in records)),
        ", ".join(dict.fromkeys(_called(r.layer) for r in records)),
    )


def _called(layer: int | str) -> str:
    return layer.split(".")[0] if isinstance(layer, str) else "0, 1, ..."


def bundled() -> str:
    import workbench as wb

    parts = ["# Bundled models and tasks\n", "## Tasks\n"]
    parts.append(table(("task", "asks"), [(f"`{name}`", line) for name, line in wb.tasks().items()]))
    parts.append("`workbench tasks show NAME` draws the token rows of an example.\n\n## Circuit methods\n")
    rows = []
    for m in wb.methods().values():
        options = ", ".join(f"`{o}`" for o in m.options) or "none"
        places = "yes" if m.positions else "no"
        rows.append(
            (f"`{m.name}`", m.description, m.paper, ", ".join(m.levels), ", ".join(m.ablations), places, options)
        )
    parts.append(table(("method", "what it does", "source", "levels", "ablations", "by position", "options"), rows))
    parts.append("Of several levels the last is the default.\n\n## Kinds of coders\n")
    parts.append(table(("kind", "what it does", "source", "options and their defaults"), _kinds()))
    parts.append("[Coders](coders.md) says how they are trained.\n\n## Models\n")
    for name in wb.bundled():
        card = (ROOT / "datasets" / "models" / name / "card.md").read_text().strip()
        body = "\n".join(f"##{line}" if line.startswith("#") else line for line in card.splitlines())
        parts.append(body + "\n")
    return "\n".join(parts)


KIND_LINES = {
    "relu": "ReLU, with a price on the sum of activations",
    "p-anneal": "ReLU, with a price whose power falls from 1 while it trains",
    "gated": "one part decides which features are active, another how much",
    "topk": "the k largest of every row",
    "batchtopk": "the N k largest of a batch of N rows; one threshold at inference",
    "matryoshka": "BatchTopK, nested: the first features alone must already explain the rows",
    "jumprelu": "a learned threshold per feature, with a price on the number of active features",
    "jumprelu-tanh": "a learned threshold per feature, with a price that saturates and a term that revives silent features",
    "discrete": "ReLU, of which only the strongest feature is looked at: a symbol per row",
}


def _kinds() -> list[tuple[str, ...]]:
    import workbench as wb

    return [
        (f"`{name}`", KIND_LINES[name], kind.paper, ", ".join(f"`{o}={_short(v)}`" for o, v in kind.defaults.items()))
        for name, kind in wb.coder_kinds().items()
    ]


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def command_line() -> str:
    import typer

    from workbench.apps.cli import app

    parts = [
        "# Command line\n",
        "`workbench COMMAND --help` says the same. Every command takes `--json`: the answer as JSON alone on standard\n"
        "output, with undefined numbers as `null`. A mistake of yours is one line on standard error and exit code 2.\n",
    ]

    def walk(command: Any, path: str) -> None:
        children = getattr(command, "commands", {})
        for name in sorted(children):
            walk(children[name], f"{path} {name}")
        if children and not command.invoke_without_command:
            return
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option"]
        options = [p for p in options if p.name != "help"]
        names = " ".join(p.metavar for p in arguments)
        parts.append(f"## `{f'{path} {names}'.strip()}`\n\n{command.help or ''}\n")
        rows = [(f"`{', '.join(p.opts)}`", p.help or "", default(p)) for p in options]
        if rows:
            parts.append(table(("option", "meaning", "default"), rows))

    walk(typer.main.get_command(app), "workbench")
    return "\n".join(parts)


VARIANTS_HEAD = """# Attention variants

{count} mechanisms, each an operator with an exact map. `wb.variants()` is this table as records; `workbench variants
NAME` shows one with its map. A record is called with its own example, or with your tensors:

```python
import torch
import workbench as wb

variant = wb.variants()["gated-deltanet"]
arguments = variant.example(seed=0, tokens=64, dtype=torch.float64)
output, amap = variant(**arguments)
assert torch.allclose(output, amap.matvec(arguments[variant.value_input]))
print(amap, amap.blocks(16).shape)
```

Where *in models* says yes, a native model takes the variant as its mixer, with hooks, patching, sinks and circuits:

```python
from workbench.models.native import NativeModel
from workbench.models.native_net import NativeConfig, NativeNet

config = NativeConfig(
    layers=2, heads=4, width=32, head_width=8, vocab=50, mixer="gated-deltanet", positions="none"
)
model = NativeModel(NativeNet(config).eval())
run = model.run(torch.arange(20)[None], maps=wb.capture(blocks=4))
print(run.maps[0])
```

Variants that look ahead or want an image run in a model of image patches:

```python
config = NativeConfig(
    layers=2, heads=4, width=32, head_width=8, vocab=10, mixer="neighborhood-attention", positions="learned",
    causal=False, grid=(8, 8), patch=4,
)
images = NativeModel(NativeNet(config).eval())
run = images.run(torch.randn(2, 3, 32, 32), maps=wb.capture(stats=("received", "entropy")))
print(run.logits.shape, run.maps[0])
```

The pictures show the first head of each variant for one input: 36 tokens, or an image of 6 x 6 patches, whose second half repeats
the first, with one projection for queries and keys. Blue is positive, red negative, on a square-root scale. Those with a star
take other inputs and show their own example.
"""
FAMILY_LINES = {
    "softmax": "Softmax over what a mask lets through. Rows sum to 1 over the visible keys.",
    "weighted softmax": "Softmax with changed scores (biases, caps, sinks) or changed weights (gates, sigmoids, signs).",
    "routing": "A router or a score chooses which keys or blocks a query sees; attention runs inside of the choice.",
    "linear": "Feature maps and decay in the place of softmax: maps of low rank, signed unless the features are not negative.",
    "delta": "A state that is written to, decays, and is corrected: signed maps whose rows are made by carrying a query back.",
    "two-stage": "Products of two maps: through agents, pooled keys, blocks.",
    "channel": "Channels attend to channels, or are gated: the map's axes are channels where `domain` says so.",
    "convolution": "Kernels, static or made from the input, along tokens or in their spectrum; one map per channel.",
    "nonlinear": "Operators that are not linear in their values: the map is the derivative at the input.",
    "probe": "The map of any operator, a fused kernel included, by running it on values of one's own.",
}


def variants() -> str:
    import torch

    import workbench as wb

    known = wb.variants()
    parts = [VARIANTS_HEAD.format(count=len(known))]
    for family, line in FAMILY_LINES.items():
        chosen = [v for v in known if v.family == family]
        if not chosen:
            continue
        slug = family.replace(" ", "-")
        parts.append(f"## {family}\n\n{line}\n\n![maps of the family](figures/variants-{slug}.png)\n")
        rows = []
        for v in chosen:
            amap = v(**v.example(0, 13, torch.float64))[1]
            told = f"{amap.sign}, {amap.row_sum}" + ("" if amap.domain == "token" else f", {amap.domain}")
            told += "" if amap.exactness == "exact" else f", {amap.exactness}"
            what = first_sentence(v.operator.__doc__ or "") + (f" {v.note}" if v.note else "")
            rows.append((f"`{v.name}`", v.paper, what, told, "yes" if v.recipe is not None else ""))
        parts.append(table(("variant", "paper", "what it computes", "weights, row sum", "in models"), rows))
    return "\n".join(parts)


ANALYSES_HEAD = """# Analyses

{count} analyses. Each is a function from maps, a run or a model to a result with `.frame()`, `.plot()` and `.save()`, and each
stands beside a null. `wb.analyses()` is this table as records with an example each; `workbench analyses NAME` tells about one and
runs its example; `workbench analyse NAME MODEL` runs one on a model.

```python
import workbench as wb

record = wb.analyses()["sinks"]
print(record.question, record.paper)
print(record(**record.example()).frame().head())
```

*Reads* says what an analysis needs: attention maps of any variant; a run that also read activations; the model itself; or plain
arrays. *Cause* names the intervention that tests the claim; where it is empty, the numbers describe and claim no cause. Where a
paper was published without the formula, or with constants of one model, *our reading* says what we chose.
"""
GROUP_LINES = {
    "sinks": (
        "Which tokens collect attention, how that comes about, and what it is for.",
        "sinks.md",
        "sink-levels.md",
        "sink-roles.md",
    ),
    "retrieval": ("Which heads fetch a fact from far back.", "retrieval.md", "retrieval-scores.md"),
    "rhythm": ("How attention moves through a text as it is written.", "rhythm.md"),
    "heads": ("What each head does, by its pattern and by its weights.", "heads.md"),
    "similarity": ("Which maps look alike, and how much of a map there is.", "similarity.md"),
    "importance": ("Which heads, tokens and layers the output depends on.", "importance.md"),
    "structure": (
        "Where information can flow, and where it does.",
        "structure.md",
        "depth.md",
        "relevance.md",
        "sparse.md",
    ),
    "vision": ("What vision transformers, and language models that see, look at.", "vision.md", "vision-language.md"),
}
READS = {"maps": "maps", "run": "maps, activations", "model": "model", "tensors": "arrays"}


def analyses() -> str:
    import workbench as wb

    known = wb.analyses()
    parts = [ANALYSES_HEAD.format(count=len(known))]
    for group, (line, *pages) in GROUP_LINES.items():
        guides = ", ".join(f"[{page.removesuffix('.md')}]({page})" for page in pages)
        rows = []
        for record in known.values():
            if record.group == group:
                paper = record.paper + (f" *Our reading:* {record.definition}" if record.definition else "")
                cause = re.sub(r"workbench\.probes\.[\w.]*?(\w+)(?=[\s,;(]|$)", r"`\1`", record.cause)
                cells = f"`{record.name}`", record.question, READS[record.source], record.null, cause, paper
                rows.append(cells)
        head = ("analysis", "question", "reads", "beside it", "cause", "from")
        parts.append(f"## {group.capitalize()}\n\n{line} Guide: {guides}.\n\n{table(head, rows)}")
    return "\n".join(parts)


def analyses_reference() -> str:
    parts = [
        "# Analyses: Python API\n\nTables, ablation curves and the catalogue, then every analysis by its module.\n"
    ]
    shared = ("catalogue", "tables", "ablation", "map_errors", "atlas")
    parts += [f"::: workbench.probes.{name}\n" for name in shared]
    for group in GROUP_LINES:
        parts.append(f"## {group.capitalize()}\n")
        for path in sorted((ROOT / "probes" / group).glob("*.py")):
            parts.append(f"::: workbench.probes.{group}.{path.stem}\n")
    return "\n".join(parts)


def first_sentence(text: str) -> str:
    """The first sentence of a docstring, on one line."""
    joined = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[.:])\s(?=[A-Z])", joined)[0].replace("``", "`")


def draw_variants() -> None:
    """The figures of the page of variants."""
    from workbench.apps.gallery import figure
    from workbench.catalogue import FAMILIES
    from workbench.catalogue import variants as known

    for family in FAMILIES:
        if any(v.family == family for v in known()):
            path = ROOT / "docs" / "figures" / f"variants-{family.replace(' ', '-')}.png"
            figure(family).savefig(path, dpi=90, metadata={"Software": None})


def default(parameter: object) -> str:
    said, value = getattr(parameter, "show_default", None), getattr(parameter, "default", None)
    if isinstance(said, str):
        return said
    return f"`{value}`" if isinstance(value, str | int | float | Path) and not isinstance(value, bool) else ""


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "-|" * len(head)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def mirror() -> None:
    """The package with real folders in place of the links, because the reference generator does not follow packages
    without ``__init__.py``."""
    target = ROOT / "build" / "api" / "workbench"
    shutil.rmtree(target.parent, ignore_errors=True)
    skip = shutil.ignore_patterns("__pycache__", "*.safetensors", "*.json", "*.parquet", "*.html")
    shutil.copytree(ROOT / "workbench", target, ignore=skip)
    for folder in FOLDERS:
        for path in [target / folder, *(target / folder).rglob("*")]:
            if path.is_dir():
                (path / "__init__.py").touch()


PAGES = {
    "families.md": families,
    "bundled.md": bundled,
    "cli.md": command_line,
    "variants.md": variants,
    "analyses.md": analyses,
    "api-analyses.md": analyses_reference,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for name, make in PAGES.items():
        path = ROOT / "docs" / name
        text = make().rstrip() + "\n"
        if not path.exists() or path.read_text() != text:
            stale.append(name)
            if not check:
                path.write_text(text)
    if check:
        for name in stale:
            print(f"docs/{name} is not current: run `make docs`")
        return bool(stale)
    draw_variants()
    mirror()
    return 0


if __name__ == "__main__":
    sys.exit(main())
