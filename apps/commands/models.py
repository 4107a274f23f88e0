"""``models``, ``doctor``, ``app``, ``report``: what is here, whether it works, and where to look at it."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.apps import inputs
from workbench.apps.inputs import JsonOption
from workbench.apps.terminal import answer, table, to_json, working
from workbench.errors import WorkbenchError

if TYPE_CHECKING:
    from rich.console import Console

StoreOption = Annotated[Path, typer.Option("--store", help="The results folder.")]
_COLOURS = {"ok": "green", "failed": "bold red", "absent": "dim", "info": "default"}


def models(
    name: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Show this model: bundled, a folder, or a hub id.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """The bundled models, or one model's manifest.

    The manifest says what is captured per layer, how, and how exactly.
    """
    if name is None:
        import workbench as wb

        rows = [_described(key) for key in wb.bundled()]
        shown = [list(row.values()) for row in rows]
        columns = ["name", "layers", "heads", "width", "mixer", "what it is"]
        answer(as_json, {"command": "models", "rows": rows}, lambda c: c.print(table("bundled models", columns, shown)))
        return
    with working(f"{name}: loading"):
        model = inputs.load(name)
        manifest = model.manifest()
    frame, shape = manifest.frame(), model.shape
    payload = {"command": "models", "model": model.name, "shape": shape, "rows": frame, "sites": manifest.sites}

    def show(console: Console) -> None:
        context = "unbounded" if shape.context is None else f"{shape.context:,} tokens"
        console.print(
            f"{model.name}: {shape.layers} layers x {shape.heads} heads ({shape.kv_heads} key-value heads) "
            f"of {shape.head_width}, width {shape.width}, vocabulary {shape.vocab}, context {context}, "
            f"{'causal' if shape.causal else 'bidirectional'}"
        )
        console.print(table("attention layers", list(frame.columns), frame.values.tolist()))

    answer(as_json, payload, show)


def _described(name: str) -> dict[str, Any]:
    """A bundled model's sizes and the first sentence of its card, without loading it."""
    folder = Path(__file__).parents[2] / "datasets" / "models" / name
    config = json.loads((folder / "config.json").read_text())
    card = (folder / "card.md").read_text() if (folder / "card.md").is_file() else ""
    prose = [part for part in card.split("\n\n") if part.strip() and not part.lstrip().startswith(("#", "|", "-", "`"))]
    first = " ".join(prose[0].split()).split(". ")[0].rstrip(".") if prose else ""
    return {
        "name": name,
        **{key: config.get(key) for key in ("layers", "heads", "width", "mixer")},
        "description": first,
    }


def doctor(as_json: JsonOption = False) -> None:
    """What works on this machine.

    Versions, devices, kernels, bundled models, layout. Exit code 1 if something that should work does not.
    """
    with working("checking"):
        from workbench.apps.doctor import examine

        checks = examine()
    failed = [check for check in checks if check.status == "failed"]

    def show(console: Console) -> None:
        rows = [[check.group, check.name, check.status, check.detail] for check in checks]
        styles = [_COLOURS[check.status] for check in checks]
        console.print(table("doctor", ["", "what", "state", "detail"], rows, styles))
        console.print(
            f"{len(failed)} problem{'s' * (len(failed) != 1)}" if failed else "everything that should work does"
        )

    answer(as_json, {"command": "doctor", "ok": not failed, "checks": checks}, show)
    if failed:
        raise typer.Exit(1)


def report(
    store: Annotated[Path, typer.Argument(metavar="[RESULTS]", help="The results folder.")] = Path("results"),
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for report.html; the results folder by default.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write report.html from a results folder.

    The file stands alone: it needs no network and no other file.
    """
    from workbench.apps.store import stored

    stored(store)
    folder = store if out is None else out
    if folder.exists() and not folder.is_dir():
        raise WorkbenchError(f"--out wants a folder; {folder} is a file")
    inputs.writable(folder)
    with working("writing the report"):
        from workbench.apps.sections import report_of

        path = report_of(store, folder / "report.html")
    answer(as_json, {"command": "report", "saved": path.absolute()}, lambda c: c.print(f"wrote {path}", soft_wrap=True))


def app(
    store: StoreOption = Path("results"),
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port on 127.0.0.1.")] = 8501,
    models: Annotated[
        list[Path] | None,
        typer.Option(
            "--models", help="A folder of models, or of folders of models, that the app may load; repeatable."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Open the app on a results folder, which is made when something is saved.

    It listens on 127.0.0.1 only and sends no usage statistics. It loads the bundled models and those in the folders of --models.
    """
    if store.exists() and not store.is_dir():
        raise WorkbenchError(f"--store wants a folder; {store} is a file")
    for folder in models or ():
        if not folder.is_dir():
            raise WorkbenchError(f"--models wants a folder; there is none at {folder}")
    inputs.writable(store)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise WorkbenchError(
                f"cannot listen on port {port} of 127.0.0.1: {error.strerror}; choose another --port"
            ) from None
    url = f"http://127.0.0.1:{port}"
    if as_json:
        print(to_json({"command": "app", "url": url, "store": store.absolute()}), flush=True)
        os.dup2(2, 1)
    else:
        print(f"{url} shows {store}; stop it with Ctrl-C", flush=True)
    page = Path(__file__).resolve().parent.parent / "main.py"
    options = {
        "server.address": "127.0.0.1",
        "server.port": str(port),
        "server.headless": "true",
        "browser.gatherUsageStats": "false",
        "server.fileWatcherType": "none",
        "client.toolbarMode": "minimal",
        "runner.magicEnabled": "false",
        "theme.light.primaryColor": "#1b7f9e",
        "theme.dark.primaryColor": "#4cb3d4",
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    arguments = [sys.executable, "-m", "streamlit", "run", str(page), *flags, "--", "--store", str(store.absolute())]
    arguments += [part for folder in models or () for part in ("--models", str(folder.absolute()))]
    os.execv(sys.executable, arguments)
