import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import workbench as wb
from workbench.errors import UnknownName, WorkbenchError
from workbench.jobs import revisions
from workbench.jobs.revisions import code_version, data_digest, is_digest, pinned_revision, revision_of

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(ROOT / "datasets" / "models" / "compiled-dyck", tmp_path / "model")


def test_names_of_bundled_models_are_those_that_load_knows():
    assert revisions.bundled_names() == wb.bundled()
    assert all(is_digest(revision_of(name)) for name in revisions.bundled_names())
    assert len({revision_of(name) for name in revisions.bundled_names()}) == len(wb.bundled())


def test_the_digest_is_of_names_and_contents_of_what_makes_the_model(folder):
    names = [
        "config.json",
        "ground_truth/circuit.json",
        "ground_truth/circuit.parquet",
        "model.safetensors",
        "tokenizer.json",
    ]
    parts = [[name, hashlib.sha256((folder / name).read_bytes()).hexdigest()] for name in names]
    wanted = f"sha256:{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]}"
    assert revision_of(str(folder)) == revision_of("compiled-dyck") == wanted
    assert revision_of(str(folder), wanted) == pinned_revision(str(folder), wanted) == wanted


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "ground_truth/circuit.json", "merges.txt"]
)
def test_the_digest_changes_with_every_file_of_the_model(folder, name):
    before = revision_of(str(folder))
    content = (folder / name).read_bytes() if (folder / name).exists() else b""
    (folder / name).write_bytes(content + b" ")
    assert revision_of(str(folder)) != before


def test_a_change_of_the_same_size_is_seen(folder):
    before, weights = revision_of(str(folder)), folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert revision_of(str(folder)) != before


def test_other_files_do_not_matter_and_nothing_is_hashed_twice(folder, monkeypatch):
    before = revision_of(str(folder))
    (folder / "card.md").write_text("another card")
    (folder / "trainer_state.json").write_text("{}")
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("hashed again"))
    assert revision_of(str(folder)) == before


def test_a_folder_is_found_as_load_finds_it(folder, monkeypatch):
    wanted = revision_of(str(folder))
    monkeypatch.setenv("HOME", str(folder.parent))
    assert revision_of("~/model") == wanted
    monkeypatch.chdir(folder.parent)
    assert revision_of("model") == revision_of("./model") == wanted
    shutil.copytree(folder, folder.parent / "tiny-softmax")
    assert revision_of("tiny-softmax") != wanted


@pytest.mark.parametrize("revision", ["main", COMMIT, "sha256:0123456789abcdef"])
def test_a_revision_that_the_files_are_not_is_refused(revision):
    found = revision_of("tiny-softmax")
    with pytest.raises(
        WorkbenchError, match=f"the files of tiny-softmax are {found}, not revision {revision}; leave the"
    ):
        revision_of("tiny-softmax", revision)


@pytest.mark.parametrize(
    ("make", "model", "said"),
    [
        (None, "tiny-sofmax", "no bundled model 'tiny-sofmax'; known: .*tiny-softmax.*; nearest: tiny-softmax"),
        (
            None,
            "./none",
            "model ./none does not exist; give a folder with config.json and safetensors, or one of: compiled-",
        ),
        (None, "a/b/c", "model a/b/c does not exist"),
        (None, "a b/c", "model 'a b/c' is no hub id owner/name"),
        (None, "file", "model file is a file, not a folder"),
        (lambda at: (at / "config.json").unlink(), "model", "model is not a model folder: it has no config.json"),
        (lambda at: (at / "config.json").write_text("{"), "model", "model/config.json is not valid JSON"),
        (lambda at: (at / "config.json").write_bytes(b"\xff"), "model", "model/config.json is not valid JSON"),
        (
            lambda at: (at / "config.json").write_text("{}"),
            "model",
            "model is not a model folder: its config.json names no",
        ),
        (
            lambda at: (at / "config.json").write_text("[]"),
            "model",
            "model is not a model folder: its config.json names no",
        ),
        (
            lambda at: (at / "model.safetensors").unlink(),
            "model",
            r"model is not a model folder: it has no \*.safetensors",
        ),
    ],
)
def test_what_is_no_model_is_refused(folder, monkeypatch, make, model, said):
    monkeypatch.chdir(folder.parent)
    Path("file").write_text("")
    if make:
        make(folder)
    with pytest.raises(WorkbenchError, match=f"^{said}") as found:
        revision_of(model)
    assert "\n" not in str(found.value)
    assert isinstance(found.value, UnknownName) == ("nearest" in said)


# the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache that holds one snapshot of ``owner/name``."""
    import huggingface_hub.constants
    import huggingface_hub.file_download

    at = tmp_path / "hub" / "models--owner--name"
    (at / "snapshots" / COMMIT).mkdir(parents=True)
    (at / "snapshots" / COMMIT / "config.json").write_text("{}")
    (at / "refs").mkdir()
    (at / "refs" / "main").write_text(COMMIT)
    (at / "refs" / "v1").write_text(COMMIT)
    for module in (huggingface_hub.constants, huggingface_hub.file_download):
        if hasattr(module, "HF_HUB_CACHE"):
            monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return at


def test_the_commit_of_a_cached_snapshot(hub):
    for revision in (None, "main", "v1", COMMIT):
        assert revision_of("owner/name", revision) == pinned_revision("owner/name", revision) == COMMIT
    assert not is_digest(COMMIT)


def test_what_is_not_cached_has_the_revision_it_was_given(hub):
    other = COMMIT[::-1]
    assert revision_of("owner/name", other) == other
    assert revision_of("owner/name", "v2") == "v2"
    assert revision_of("owner/other") == "main"


@pytest.mark.parametrize(
    ("model", "revision"), [("owner/other", None), ("owner/name", "v2"), ("owner/name", COMMIT[::-1])]
)
def test_a_commit_that_nobody_can_tell_is_refused(hub, monkeypatch, model, revision):
    import huggingface_hub.constants

    from workbench.models import load

    at = f" at revision {revision}" if revision else ""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        WorkbenchError, match=f"^model {model}{at} is not in the local cache, and HF_HUB_OFFLINE forbids"
    ):
        pinned_revision(model, revision)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(load, "_reachable", lambda: False)
    with pytest.raises(
        WorkbenchError, match=f"^model {model}{at} is not in the local cache, and the hub cannot be reached"
    ):
        pinned_revision(model, revision)


def test_the_hub_is_asked_for_the_commit_of_what_is_not_cached(hub, monkeypatch):
    import huggingface_hub

    from workbench.models import load

    def download(model, file, *, revision):
        assert (model, file) == ("owner/other", "config.json")
        if revision == "gone":
            raise OSError("no such\nrevision")
        return str(hub / "snapshots" / COMMIT / "config.json")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(load, "_reachable", lambda: True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert pinned_revision("owner/other") == COMMIT
    with pytest.raises(
        WorkbenchError,
        match="at revision gone is not in the local cache, and the hub did not give it: no such revision",
    ):
        pinned_revision("owner/other", "gone")


# code and data


def test_code_and_data_have_digests():
    found = code_version()
    assert found["version"] == wb.__version__
    assert re.fullmatch("[0-9a-f]{16}", found["digest"])
    assert re.fullmatch("[0-9a-f]{16}", data_digest())
    json.dumps(found)
    found.clear()
    assert code_version()["version"]


def test_the_code_digest_is_of_the_sources_that_results_depend_on(tmp_path, monkeypatch):
    package = tmp_path / "workbench"
    (package / "apps").mkdir(parents=True)
    (tmp_path / "probes" / "deep").mkdir(parents=True)
    (package / "probes").symlink_to("../probes")
    source, linked, app = package / "maps.py", tmp_path / "probes" / "deep" / "sinks.py", package / "apps" / "cli.py"
    for path in (source, linked, app, package / "notes.txt"):
        path.write_text("1")
    monkeypatch.setattr(revisions, "_PACKAGE", package)

    def digest():
        revisions._code_digest.cache_clear()
        return revisions._code_digest()

    seen = [digest()]
    app.write_text("changed")
    (package / "notes.txt").write_text("changed")
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "x.py").write_text("1")
    assert digest() == seen[0]
    for path in (source, linked):
        path.write_text("changed")
        seen.append(digest())
    source.rename(package / "other.py")
    seen.append(digest())
    assert len(set(seen)) == 4
    revisions._code_digest.cache_clear()


def git(at, *command):
    env = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    return subprocess.run(
        ["git", "-C", at, *who, *command], check=True, capture_output=True, text=True, env=env
    ).stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_of_a_checkout_is_read_from_its_files(tmp_path):
    def commit(at):
        revisions._commit.cache_clear()
        return revisions._commit(at)

    root = tmp_path / "root"
    root.mkdir()
    assert commit(root) == ""
    git(root, "init", "-q", "-b", "topic/one")
    assert commit(root) == ""
    git(root, "commit", "-q", "--allow-empty", "-m", "one")
    first = git(root, "rev-parse", "HEAD")
    assert commit(root) == first
    git(root, "pack-refs", "--all")
    assert commit(root) == first
    git(root, "worktree", "add", "-q", "-b", "two", tmp_path / "linked")
    git(tmp_path / "linked", "commit", "-q", "--allow-empty", "-m", "two")
    second = git(tmp_path / "linked", "rev-parse", "HEAD")
    assert (commit(tmp_path / "linked"), commit(root)) == (second, first)
    git(root, "checkout", "-q", "--detach", second)
    assert commit(root) == second


def test_revisions_come_without_torch():
    code = (
        "import sys; from workbench.jobs import revisions as r; r.revision_of('tiny-softmax'); r.code_version(); r.data_digest();"
        "print([m for m in ('torch', 'pandas', 'pyarrow', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
