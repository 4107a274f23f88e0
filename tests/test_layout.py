"""The folders, the links, the import direction, and that nothing heavy is imported before it is needed."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("probes", "kernels", "apps", "datasets")
# For each place, the parts of the project it may import.
MAY_IMPORT = {
    "kernels": {"kernels"},
    "workbench": {"kernels", "workbench"},
    "datasets": {"kernels", "workbench", "datasets"},
    "probes": {"kernels", "workbench", "probes"},
    "apps": {"kernels", "workbench", "datasets", "probes", "apps"},
}


def sources(place: str) -> list[Path]:
    found = []
    for folder, names, files in os.walk(ROOT / place):
        names[:] = [n for n in names if n != "__pycache__" and not Path(folder, n).is_symlink()]
        found += [Path(folder, f) for f in files if f.endswith(".py")]
    return found


def imported_parts(tree: ast.AST) -> set[str]:
    """Which parts of the project a module imports: ``workbench.probes.x`` is ``probes``; ``workbench.maps`` the core."""
    parts = set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = (
                [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
                if node.module == "workbench"
                else [node.module]
            )
        for name in names:
            first, *rest = name.split(".")
            if first == "workbench" and rest:
                parts.add(rest[0] if rest[0] in FOLDERS else "workbench")
    return parts


@pytest.mark.parametrize("name", FOLDERS)
def test_folder_is_linked_and_no_package_of_its_own(name: str) -> None:
    link = ROOT / "workbench" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert not list((ROOT / name).rglob("__init__.py"))


@pytest.mark.parametrize("place", MAY_IMPORT)
def test_import_direction(place: str) -> None:
    files = sources(place)
    assert files, f"no sources found in {place}"
    for path in files:
        if path == ROOT / "workbench" / "__main__.py":
            continue
        foreign = imported_parts(ast.parse(path.read_text())) - MAY_IMPORT[place]
        assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}, which lies above it"


def test_kernels_import_torch_only() -> None:
    allowed = {
        "torch",
        "math",
        "dataclasses",
        "collections",
        "typing",
        "__future__",
        "workbench",
        "functools",
        "contextlib",
        "importlib",
        "os",
    }
    for path in sources("kernels"):
        fused = path.name in ("triton.py", "tiles.py")
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                assert {n.split(".")[0] for n in names} <= allowed | ({"triton"} if fused else set()), (
                    f"{path}: {names}"
                )
                lazy = [n for n in names if n.startswith("workbench.kernels.") and n.endswith((".triton", ".tiles"))]
                assert fused or not lazy, f"{path} imports {lazy} before it is known that Triton is there"


def test_source_files_stay_short() -> None:
    long = {
        str(p.relative_to(ROOT)): n
        for place in MAY_IMPORT
        for p in sources(place)
        if (n := len(p.read_text().splitlines())) > 420
    }
    assert not long, long


def python(code: str, cwd: Path = ROOT) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light() -> None:
    out = python(
        "import sys, workbench; print([m for m in ('torch', 'pandas', 'numpy', 'transformers') if m in sys.modules])"
    )
    assert out.strip() == "[]"


def test_other_peoples_packages_are_not_shadowed() -> None:
    out = python("import datasets; print(datasets.load_dataset is not None)")
    assert out.strip() == "True"


def test_every_public_name_exists() -> None:
    import workbench

    for name in workbench._NAMES:
        assert getattr(workbench, name) is not None


def test_unknown_public_name_lists_the_known_ones() -> None:
    import workbench

    with pytest.raises(AttributeError, match="it has: .*sinks"):
        _ = workbench.sink


def test_no_module_shadows_a_public_name() -> None:
    """``import workbench.x`` binds ``x`` on the package: no module may be named like a public function."""
    import workbench

    modules = {p.stem for p in (ROOT / "workbench").glob("*.py")} | {
        p.name for p in (ROOT / "workbench").iterdir() if p.is_dir()
    }
    assert not modules & set(workbench._NAMES)


def test_nothing_is_unpickled() -> None:
    """Readers that can run code are called only with the keyword that forbids it, written out."""
    safe = {"torch.load": "weights_only=True", "np.load": "allow_pickle=False"}
    for place in MAY_IMPORT:
        for path in sources(place):
            tree = ast.parse(path.read_text())
            told = {
                id(node.func)
                for node in ast.walk(tree)
                if isinstance(node, ast.Call)
                and safe.get(ast.unparse(node.func), "none")
                in [f"{k.arg}={ast.unparse(k.value)}" for k in node.keywords]
            }
            for node in ast.walk(tree):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
                    assert not {"pickle", "joblib", "dill", "shelve"} & set(names), path
                if isinstance(node, ast.Attribute) and id(node) not in told:
                    text = ast.unparse(node)
                    assert text not in ("torch.load", "pickle.load", "np.load", "numpy.load"), f"{path}: {text}"


def test_kernels_need_torch_triton_and_numpy_alone() -> None:
    """The kernels work where nothing else of the project's dependencies is installed."""
    modules = sorted(
        "workbench." + ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sources("kernels")
        if path.name not in ("triton.py", "tiles.py")
    )
    python(
        "import sys\n"
        "absent = ('transformers', 'transformer_lens', 'pandas', 'pyarrow', 'scipy', 'sklearn', 'einops', 'jaxtyping', 'typer',"
        " 'rich', 'pydantic', 'streamlit', 'plotly', 'matplotlib', 'duckdb', 'safetensors', 'tokenizers', 'jinja2')\n"
        "sys.modules.update(dict.fromkeys(absent))\n"
        "import importlib, torch\n"
        f"for name in {modules}: importlib.import_module(name)\n"
        "from workbench.kernels.attention_stats import attention_stats\n"
        "assert attention_stats(torch.zeros(1, 1, 3, 16), torch.zeros(1, 1, 3, 16), block=2).blocks['sum'].sum() == 3\n"
    )
