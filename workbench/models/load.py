"""One door to every model: a bundled name, a folder, a hub id, or an object that already is a model."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from workbench.errors import UnknownName, WorkbenchError
from workbench.models.protocol import Model

_BUNDLED = Path(__file__).parents[1] / "datasets" / "models"
_AUTO = (
    ("ForCausalLM", "AutoModelForCausalLM"),
    ("LMHeadModel", "AutoModelForCausalLM"),
    ("ForMaskedLM", "AutoModelForMaskedLM"),
    ("ForConditionalGeneration", "AutoModelForSeq2SeqLM"),
    ("ForImageClassification", "AutoModelForImageClassification"),
    ("ForSequenceClassification", "AutoModelForSequenceClassification"),
    ("ForTokenClassification", "AutoModelForTokenClassification"),
)
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
)
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".h5")


def bundled() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(p.parent.name for p in _BUNDLED.glob("*/config.json") if (p.parent / "model.safetensors").is_file())


def load(
    x: Any,
    *,
    tokenizer: Any = None,
    revision: str | None = None,
    local_files_only: bool | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
) -> Model:
    """A model behind the ``Model`` protocol.

    ``x``: a bundled name (``wb.bundled()``), a folder with ``config.json`` and safetensors, a hub id ``owner/name``, a
    ``PreTrainedModel`` (with its ``tokenizer``), or a TransformerLens bridge. The hub is asked only for a hub id, and not
    with ``local_files_only``. ``device`` moves the model, ``dtype`` and ``attn_implementation`` choose how it is loaded;
    both are refused for objects that exist already. Pickled weights and remote code are refused.
    """
    options = {"revision": revision, "dtype": dtype, "attn_implementation": attn_implementation}
    if isinstance(x, str | os.PathLike):
        path = Path(os.path.expanduser(x))
        name = str(x)
        if isinstance(x, str) and name in bundled():
            model = _folder(_BUNDLED / name, tokenizer, options)
        elif path.is_dir():
            model = _folder(path, tokenizer, options)
        elif isinstance(x, os.PathLike) or name.startswith((".", "/", "~")) or name.count("/") > 1 or path.exists():
            what = "is a file, not a folder" if path.exists() else "does not exist"
            raise WorkbenchError(
                f"{name} {what}; pass a folder with config.json and safetensors, or one of: {_names()}"
            )
        elif "/" in name:
            model = _hub(name, tokenizer, local_files_only, options)
        else:
            raise UnknownName("bundled model", name, [*bundled(), "a folder", "a hub id owner/name"])
    else:
        model = _object(x, tokenizer, options)
    return _moved(model, device)


def _names() -> str:
    return ", ".join(bundled()) or "(no bundled models)"


def _object(x: Any, tokenizer: Any, options: dict[str, Any]) -> Model:
    from workbench.models.native import NativeModel

    if isinstance(x, Model):
        return x
    for name, value in options.items():
        if value is not None:
            raise WorkbenchError(f"{name}= chooses how weights are loaded; {type(x).__name__} is loaded already")
    modules = {cls.__module__.split(".")[0] for cls in type(x).__mro__}
    if "transformer_lens" in modules and any(cls.__name__ == "TransformerBridge" for cls in type(x).__mro__):
        from workbench.models.bridge import BridgeModel

        return BridgeModel(x)
    if any(cls.__name__ == "NativeNet" for cls in type(x).__mro__):
        return NativeModel(x, tokenizer)
    if "transformers" in modules and any(cls.__name__ == "PreTrainedModel" for cls in type(x).__mro__):
        from workbench.models.hf import HFModel

        return HFModel(x, tokenizer)
    if hasattr(x, "_orig_mod"):
        raise WorkbenchError("cannot load what torch.compile returned; pass the model itself (its ._orig_mod)")
    raise WorkbenchError(
        f"cannot load a {type(x).__module__}.{type(x).__name__}; pass a bundled name ({_names()}), a folder, a hub id, a "
        "transformers PreTrainedModel or a TransformerLens TransformerBridge"
    )


def _folder(path: Path, tokenizer: Any, options: dict[str, Any]) -> Model:
    config_file = path / "config.json"
    if not config_file.is_file():
        raise WorkbenchError(f"{path} is not a model folder: it has no config.json")
    try:
        config = json.loads(config_file.read_text())
    except (ValueError, OSError) as error:
        raise WorkbenchError(f"{config_file} is not valid JSON: {_line(error)}") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise WorkbenchError(f"{path} is not a model folder: its config.json names no model_type")
    _check_weights(path)
    if config["model_type"] == "workbench-native":
        return _native(path, options)
    return _pretrained(str(path), path.name, tokenizer or _tokenizer(path), {**options, "local_files_only": True})


def _check_weights(path: Path) -> None:
    """One clear line about missing, pickled or damaged weights, before anything is built."""
    from safetensors import SafetensorError, safe_open

    files = sorted(path.glob("*.safetensors"))
    if not files:
        pickled = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLED)
        if pickled:
            raise WorkbenchError(
                f"{path} holds only pickled weights ({pickled[0]}), which are never opened; convert them to model.safetensors"
            )
        raise WorkbenchError(f"{path} is not a model folder: it has no *.safetensors")
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except (SafetensorError, OSError, ValueError) as error:
            raise WorkbenchError(f"{file} is damaged or not a safetensors file: {_line(error)}") from error


def _native(path: Path, options: dict[str, Any]) -> Model:
    from workbench.models.native import NativeModel

    if options["attn_implementation"] is not None or options["revision"] is not None:
        raise WorkbenchError(f"{path.name} is a native model: it has no attn_implementation and no revision")
    model = NativeModel.load(path)
    if options["dtype"] is not None:
        model.net.to(_dtype(options["dtype"]))
    return model


def _hub(name: str, tokenizer: Any, local_files_only: bool | None, options: dict[str, Any]) -> Model:
    only = bool(local_files_only) or os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    only = only or not _reachable()
    where = {"local_files_only": only}
    model = _pretrained(name, name, tokenizer, {**options, **where})
    if tokenizer is None:
        model.tokenizer = _tokenizer(name, revision=options["revision"], **where)
    return model


def _reachable() -> bool:
    """Whether the hub's host has an address; a library that finds none retries for half a minute. Proxies resolve it
    themselves."""
    import socket
    from urllib.parse import urlparse

    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    host = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname or "huggingface.co"
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


def _pretrained(source: str, name: str, tokenizer: Any, options: dict[str, Any]) -> Model:
    import transformers

    from workbench.models.hf import HFModel

    given = {key: value for key, value in options.items() if value is not None and key != "dtype"}
    dtype = _dtype(options["dtype"]) if options.get("dtype") is not None else "auto"
    with _quiet(), _one_line(source, given.get("local_files_only", False)):
        near = {key: given[key] for key in ("revision", "local_files_only") if key in given}
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False, **near)
        auto = _auto_class(config, source)
        model, report = auto.from_pretrained(
            source,
            config=config,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **given,
        )
    for key, stored, wanted in sorted(report["mismatched_keys"]):
        raise WorkbenchError(
            f"the weights of {source} do not fit its config.json: {key} is {list(stored)} and should be {list(wanted)}"
        )
    absent = sorted(key for key in report["missing_keys"] if "pooler" not in key)
    if absent:
        raise WorkbenchError(
            f"the weights of {source} lack {len(absent)} tensors of {type(model).__name__} ({', '.join(absent[:3])} ...); "
            "they would be random"
        )
    spare = sorted(report["unexpected_keys"])
    if spare:
        warnings.warn(
            f"{len(spare)} tensors of {source} have no place in {type(model).__name__} as its config.json describes it and "
            f"were left out ({', '.join(spare[:3])} ...)",
            stacklevel=2,
        )
    revision = getattr(model.config, "_commit_hash", None) or options.get("revision") or ""
    return HFModel(model.eval(), tokenizer, name=name, revision=revision)


def _auto_class(config: Any, source: str) -> Any:
    """The class named in ``config.architectures`` where transformers has it; otherwise the fitting Auto class."""
    import transformers

    named = (getattr(config, "architectures", None) or [""])[0]
    if "auto_map" in config.to_dict() and not hasattr(transformers, named):
        raise WorkbenchError(f"{source} needs its own code ({named}), which is never executed")
    cls = getattr(transformers, named, None) if named else None
    if cls is not None:
        return cls
    for ending, auto in _AUTO:
        if named.endswith(ending):
            return getattr(transformers, auto)
    return transformers.AutoModel


def _tokenizer(source: Any, **where: Any) -> Any:
    """The tokenizer that lies with the model, None if there is none."""
    import transformers

    if isinstance(source, Path):
        if not any((source / name).is_file() for name in _TOKENIZER_FILES):
            return None
        with _quiet(), _one_line(f"the tokenizer in {source}", True):
            return transformers.AutoTokenizer.from_pretrained(
                str(source), local_files_only=True, trust_remote_code=False
            )
    given = {key: value for key, value in where.items() if value is not None}
    try:
        with _quiet():
            return transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False, **given)
    except Exception:
        return None


def _moved(model: Any, device: str | torch.device | None) -> Model:
    if device is None:
        return model
    try:
        found = torch.device(device)
        inner = getattr(model, "net", None) or getattr(model, "model", None) or getattr(model, "bridge", None)
        if inner is None:
            raise WorkbenchError(f"{type(model).__name__} cannot be moved to {device}")
        inner.to(found)
    except (RuntimeError, AssertionError) as error:
        raise WorkbenchError(f"cannot use device {device}: {_line(error)}") from error
    return model


def _dtype(given: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, given, None) if isinstance(given, str) else given
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UnknownName("dtype", given, ("float32", "bfloat16", "float16", "float64"))
    return found


@contextmanager
def _one_line(source: str, offline: bool) -> Iterator[None]:
    """Errors of the loading libraries as one line that says what to do."""
    try:
        yield
    except WorkbenchError:
        raise
    except Exception as error:
        if offline and "/" in source and not Path(source).exists():
            raise WorkbenchError(
                f"cannot load {source} from the hub: it is not in the local cache, and the hub cannot be reached or may not "
                f"be asked (local_files_only, HF_HUB_OFFLINE); pass a local folder ({source} is none)"
            ) from error
        raise WorkbenchError(f"cannot load {source}: {_line(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the loading libraries' progress bars and reports off the terminal."""
    from transformers.utils import logging as hf

    level, bars = hf.get_verbosity(), hf.is_progress_bar_enabled()
    hf.set_verbosity(logging.ERROR)
    hf.disable_progress_bar()
    try:
        yield
    finally:
        hf.set_verbosity(level)
        if bars:
            hf.enable_progress_bar()


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:297]}..."
