"""Which model, code and data a result is about: digests of files, and commits of models on the hub. All of it without torch,
except where the hub is asked."""

from __future__ import annotations

import hashlib
import json
import os
import re
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from workbench.errors import UnknownName, WorkbenchError

_PACKAGE = Path(__file__).resolve().parents[1]
_BUNDLED = _PACKAGE / "datasets" / "models"
_LENGTH = 16
_DIGEST = re.compile(r"sha256:[0-9a-f]{16}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_NAME = re.compile(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+", re.ASCII)
_MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jin*",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "ground_truth/*",
)
"""What a loaded model depends on. Cards and records of a training are not among it."""


def revision_of(model: str, revision: str | None = None) -> str:
    """What pins a model's weights, without loading them.

    For a bundled name or a local folder ``sha256:`` and 16 hexadecimal digits over the names and contents of the files that make
    the model. For a hub id the commit of the snapshot in the local cache; if there is none, ``revision`` or ``main``.

    Raises ``WorkbenchError`` for a name that is neither of these, a folder that is no model, and a ``revision`` that is not what
    the files of a bundled or local model are.
    """
    folder = model_folder(model)
    if folder is None:
        return _cached_commit(model, revision) or revision or "main"
    found = f"sha256:{_digest(_model_files(folder))}"
    if revision not in (None, found):
        raise WorkbenchError(
            f"the files of {model} are {found}, not revision {revision}; leave the revision out to take what is there"
        )
    return found


def pinned_revision(model: str, revision: str | None = None) -> str:
    """``revision_of``, except that the hub is asked for the commit of a model that is not in the local cache.

    The config comes into the cache with that, so later calls give the same commit, also after the hub has a newer one. Raises
    ``WorkbenchError`` if the commit cannot be found out: cells would be about another model each time.
    """
    found = revision_of(model, revision)
    if is_digest(found) or _cached_commit(model, found):
        return found
    return _fetched_commit(model, revision)


def is_digest(revision: str) -> bool:
    """Whether ``revision`` is a digest of files, as bundled models and local folders have, and no commit of the hub."""
    return _DIGEST.fullmatch(revision) is not None


def model_folder(model: str) -> Path | None:
    """The folder of a bundled model or of a path, None for a hub id; by the rules of ``wb.load``, which come without torch here.

    Raises for what is none of these, and for a folder without config or without safetensors."""
    names = bundled_names()
    path = Path(os.path.expanduser(model))
    if model in names:
        return _BUNDLED / model
    try:
        exists, folder = path.exists(), path.is_dir()
    except (OSError, ValueError) as error:
        raise WorkbenchError(f"model {model!r} cannot be looked up: {error}") from None
    if folder:
        _check_folder(path)
        return path
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or exists:
        what = "is a file, not a folder" if exists else "does not exist"
        raise WorkbenchError(
            f"model {model} {what}; give a folder with config.json and safetensors, or one of: {', '.join(names)}"
        )
    if "/" not in model:
        raise UnknownName("bundled model", model, [*names, "a folder", "a hub id owner/name"])
    if not _HUB_NAME.fullmatch(model):
        raise WorkbenchError(
            f"model {model!r} is no hub id owner/name, no folder and no bundled name: {', '.join(names)}"
        )
    return None


def bundled_names() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(p.parent.name for p in _BUNDLED.glob("*/config.json") if (p.parent / "model.safetensors").is_file())


def code_version() -> dict[str, Any]:
    """The package's ``version``, the ``digest`` (16 hexadecimal digits) of its sources without those of the applications, and the
    ``commit`` if the package stands in a git checkout. The digest is of the files when first asked in this process."""
    from workbench import __version__

    commit = _commit(_PACKAGE.parent)
    return {"version": __version__, "digest": _code_digest()} | ({"commit": commit} if commit else {})


@cache
def data_digest() -> str:
    """16 hexadecimal digits over names and contents of the words and published circuits that tasks draw on."""
    return _digest({**_tree(_PACKAGE / "datasets" / "data"), **_tree(_PACKAGE / "datasets" / "published")})


@cache
def _code_digest() -> str:
    apps = _PACKAGE / "apps"
    files = {name: path for name, path in _tree(_PACKAGE, apps).items() if name.endswith(".py")}
    return _digest(files)


@cache
def _commit(root: Path) -> str:
    """The commit that is checked out in ``root``, from the files of git; empty if ``root`` is no checkout."""
    try:
        git = root / ".git"
        if git.is_file():  # a linked work tree
            git = root / git.read_text().removeprefix("gitdir:").strip()
        head = (git / "HEAD").read_text().strip()
        shared = git / (git / "commondir").read_text().strip() if (git / "commondir").is_file() else git
        if not head.startswith("ref: "):
            return head if _COMMIT.fullmatch(head) else ""
        ref = head.removeprefix("ref: ")
        for place in (git, shared):
            if (place / ref).is_file():
                return (place / ref).read_text().strip()
        for line in (shared / "packed-refs").read_text().splitlines():
            commit, _, name = line.partition(" ")
            if name == ref:
                return commit
    except OSError:
        pass
    return ""


def _tree(folder: Path, without: Path | None = None) -> dict[str, Path]:
    """Files under a folder by their paths relative to the package, through links; caches of Python are left out."""
    found: dict[str, Path] = {}
    for at, names, files in os.walk(folder, followlinks=True):
        names[:] = [name for name in names if name != "__pycache__" and Path(at, name) != without]
        found |= {Path(at, name).relative_to(_PACKAGE).as_posix(): Path(at, name) for name in files}
    return found


def _check_folder(path: Path) -> None:
    try:
        config = json.loads((path / "config.json").read_text())
    except FileNotFoundError:
        raise WorkbenchError(f"{path} is not a model folder: it has no config.json") from None
    except (ValueError, OSError) as error:
        raise WorkbenchError(f"{path / 'config.json'} is not valid JSON: {error}") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise WorkbenchError(f"{path} is not a model folder: its config.json names no model_type")
    if not any(path.glob("*.safetensors")):
        raise WorkbenchError(f"{path} is not a model folder: it has no *.safetensors")


def _model_files(folder: Path) -> dict[str, Path]:
    found = {path for pattern in _MODEL_FILES for path in folder.glob(pattern) if path.is_file()}
    return {path.relative_to(folder).as_posix(): path for path in found}


def _digest(files: dict[str, Path]) -> str:
    """16 hexadecimal digits over names and contents."""
    try:
        parts = []
        for name in sorted(files):
            facts = files[name].stat()
            parts.append([name, _content(str(files[name].resolve()), facts.st_size, facts.st_mtime_ns)])
    except OSError as error:
        raise WorkbenchError(f"cannot read {error.filename}: {error.strerror}") from None
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:_LENGTH]


@lru_cache(maxsize=4096)
def _content(path: str, size: int, changed: int) -> str:
    """SHA-256 of a file, read in pieces. Size and time of its last change say when what is remembered no longer holds."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cached_commit(model: str, revision: str | None) -> str:
    """The commit of the snapshot in the local cache of the hub, empty if there is none."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(model, "config.json", revision=revision)
    except ValueError as error:
        raise WorkbenchError(f"model {model!r} is no hub id: {error}") from None
    return Path(found).parent.name if isinstance(found, str) else ""


def _fetched_commit(model: str, revision: str | None) -> str:
    """Fetch the config from the hub, and give the commit it is of."""
    from huggingface_hub import constants, hf_hub_download

    ask = f"model {model}" + (f" at revision {revision}" if revision else "")
    if constants.HF_HUB_OFFLINE:
        raise WorkbenchError(
            f"{ask} is not in the local cache, and HF_HUB_OFFLINE forbids asking the hub; bundled: {', '.join(bundled_names())}"
        )
    from workbench.models.load import _reachable

    if not _reachable():
        raise WorkbenchError(
            f"{ask} is not in the local cache, and the hub cannot be reached; give a local folder or fetch it first"
        )
    try:
        return Path(hf_hub_download(model, "config.json", revision=revision)).parent.name
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        raise WorkbenchError(f"{ask} is not in the local cache, and the hub did not give it: {said}") from error
