import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from workbench.errors import UnknownName, WorkbenchError
from workbench.jobs import check
from workbench.jobs.check import check_grid, pinned
from workbench.jobs.job import Job
from workbench.jobs.probes import Probe
from workbench.jobs.revisions import revision_of
from workbench.jobs.spec import read_grid

ROOT = Path(__file__).resolve().parents[2]
FIND = "model: tiny-softmax\ntask: ioi\nprobe: find_circuit\n"


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def grid(text):
    Path("spec.yaml").write_text(text)
    return read_grid("spec.yaml")


def refusal(asked):
    with pytest.raises(WorkbenchError) as found:
        check_grid(asked)
    assert "\n" not in str(found.value)
    return str(found.value)


@pytest.mark.parametrize(
    "text",
    [
        "probe: sleep\nseconds: [0, 0.5]\nrows: 3\nseed: [1, 2]\n",
        "probe: sleep\nmodel: [tiny-softmax, null]\ndtype: null\ntask: [null, ioi]\n",
        "probe: fail\nhow: [error, kill]\n",
        FIND + "method: [eap, eap-ig]\ndtype: [float32, bfloat16, float64, float16]\n",
        FIND
        + "grids:\n  - {task: {name: needle, length: 192, depth: null}}\n  - {task: {name: ioi, split: test}, probe: sleep}\n",
    ],
)
def test_grids_without_mistakes_pass(text):
    check_grid(grid(text))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 0\nprobe:\n  - sleep\n  - slep\n", "4: no probe 'slep'; known: sleep, fail, find_circuit.*; nearest: sleep"),
        ("probe: no_such_module:function\n", "1: .*no_such_module"),
        ("probe: sleep\nseconds:\n  - 0\n  - soon\n", "4: argument seconds of sleep is a number from 0; got 'soon'"),
        ("probe: sleep\nrows: 2\nsecond: 1\n", "3: no argument of sleep 'second'; known: seconds, rows; nearest: seconds"),
        ("probe: sleep\nmodels: [a, b]\n", "2: no argument of sleep 'models'; known: seconds, rows; a key of every spec: model"),
        ("probe: sleep\nmodel:\n  - tiny-softmax\n  - tiny-sofmax\n", "4: no bundled model 'tiny-sofmax'; known: .*nearest: "),
        ("probe: sleep\nmodel: ./none\n", "2: model ./none does not exist"),
        ("probe: sleep\nmodel: tiny-softmax\nrevision: main\n", "3: the files of tiny-softmax are sha256:.*, not revision main"),
        ("probe: sleep\nmodel: owner/name\nrevision: v1\n", "3: model owner/name at revision v1 is not in the local cache"),
        ("probe: sleep\nmodel: owner/name\n", "2: model owner/name is not in the local cache"),
        ("probe: sleep\nrevision: main\n", "2: revision main says how a model is loaded, and the job names no model"),
        ("probe: sleep\ndtype: float32\n", "2: dtype float32 says how a model is loaded, and the job names no model"),
        ("probe: sleep\nmodel: tiny-softmax\ndtype: [float32,\n  float31]\n", "4: no dtype 'float31'; known: float32, float64"),
        ("probe: sleep\nmodel: tiny-softmax\ndtype: int8\n", "3: no dtype 'int8'"),
        ("probe: sleep\ntask:\n  - ioi\n  - iio\n", "4: no task 'iio'; known: .*ioi"),
        ("probe: sleep\ntask:\n  - {name: iio, split: test}\n", "3: no task 'iio'"),
        ("probe: sleep\ntask:\n  name: needle\n  length: 9\n  lenght: 192\n", "5: task 'needle' has no option 'lenght'"),
        ("probe: sleep\ntask:\n  name: needle\n  depth: 0.5\n  length: long\n", "5: task 'needle', option length: .*'long'"),
        (FIND + "method:\n  - eap\n  - eap-iig\n", "6: no circuit method 'eap-iig'; known: .*; nearest: eap-ig"),
        (FIND + "method: eap-ig\nexamples: many\n", "5: argument examples of find_circuit is a whole number from 1; got 'many'"),
        (FIND + "method: eap-ig\nbatchs: 3\n", "5: .*batchs"),
        ("model: tiny-softmax\nprobe: find_circuit\n", "2: find_circuit needs a task; add task: to the spec"),
        ("task: ioi\nprobe: find_circuit\n", "2: find_circuit needs a model; add model: to the spec"),
        (
            FIND + "grids:\n  - seed: 1\n  - seed: 2\n    task: null\n",
            "6: find_circuit needs a task; add task: to the spec",
        ),
        (
            FIND + "examples: x\ngrids:\n  - {examples: 8}\n  - probe: sleep\n    examples: 8\n",
            "8: no argument of sleep 'examples'",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_told_with_the_line_of_the_value(text, said):
    with pytest.raises(WorkbenchError, match=f"^spec.yaml:{said}"):
        check_grid(grid(text))


def test_the_first_mistake_is_told_and_the_others_counted():
    text = "probe: sleep\nseconds: [0, x]\nmodel: [nope, null]\ntask: [iio, ioi]\nseed: [0, 1, 2]\n"
    said = refusal(grid(text))
    assert said.startswith("spec.yaml:3: no bundled model 'nope'")
    assert said.endswith(" (and 2 more mistakes)")
    assert refusal(grid(text.replace("[nope, null]", "null"))).endswith(
        "'iio'; known: " + known_tasks() + " (and 1 more mistake)"
    )
    assert "more" not in refusal(grid("probe: sleep\nseconds: x\nseed: [0, 1, 2]\n"))
    many = "probe: sleep\nseconds: 0\nmodel: [" + ", ".join(f"m{i}" for i in range(1000)) + "]\n"
    assert refusal(grid(many)).endswith(" (and at least 99 more mistakes)")


def known_tasks():
    import workbench as wb

    return ", ".join(wb.tasks())


def test_mistakes_of_python_grids_have_no_line():
    assert refusal(read_grid({"probe": "sleep", "second": 1})).startswith("no argument of sleep 'second'")
    assert refusal(read_grid([Job("sleep", model="nope")])).startswith("no bundled model 'nope'")


def test_a_folder_that_is_no_model_is_refused():
    Path("mine").mkdir()
    assert (
        refusal(grid("probe: sleep\nmodel: mine\n")) == "spec.yaml:2: mine is not a model folder: it has no config.json"
    )


def test_a_task_that_breaks_is_a_mistake(monkeypatch):
    import workbench as wb

    def task(name, **options):
        if "bad" in options:
            raise TypeError("of all\nthings")

    monkeypatch.setitem(vars(wb), "task", task)
    said = refusal(grid("probe: sleep\ntask:\n  good: 1\n  bad: 2\n  name: ioi\n"))
    assert said.startswith("spec.yaml:4: task ioi cannot be made of {'good': 1, 'bad': 2}: TypeError: of all things")


# probes of all sorts, so that only check.py is looked at


def probe(name="mine", model="optional", task="optional", arguments=None, check=lambda job: None):
    return Probe(name, "", model, task, arguments, lambda cell: None, check)


@pytest.fixture
def fake(monkeypatch):
    made = {}

    def resolve(name):
        if name not in made:
            raise UnknownName("probe", name, made)
        return made[name]

    monkeypatch.setattr(check, "resolve", resolve)
    return made


def test_every_distinct_thing_is_looked_at_once(fake, monkeypatch):
    looked = []
    fake["mine"] = probe(check=lambda job: looked.append(("probe", job.model, job.task, dict(job.args))))
    for name in ("revision_of", "pinned_revision"):
        monkeypatch.setattr(check, name, lambda *asked, name=name: looked.append((name, *asked)) or "r")
    check_grid(grid("model: [a, b]\nprobe: mine\nx: [1, 1.0, true]\ndtype: [float32, float64]\nseed: [0, 1, 2, 3]\n"))
    assert sorted(map(repr, looked)) == sorted(
        map(
            repr,
            [("probe", "a", None, {"x": x}) for x in (1, 1.0, True)]
            + [("revision_of", m) for m in "ab" for _ in range(2)]
            + [("pinned_revision", m, None) for m in "ab" for _ in range(2)],
        )
    )
    looked.clear()
    pinned(grid("model: [a, b]\nprobe: mine\nx: [1, 2]\nseed: [0, 1, 2, 3]\n"))
    assert looked == [("pinned_revision", "a", None), ("pinned_revision", "b", None)]


def test_a_model_or_task_that_is_not_wanted_has_its_own_line(fake):
    def refuse(job):
        if job.model or job.task:
            raise WorkbenchError(f"mine looks at no {'model' if job.model else 'task'}")

    fake["mine"] = probe(model="no", task="no", check=refuse)
    assert refusal(grid("probe: mine\nmodel: tiny-softmax\n")) == "spec.yaml:2: mine looks at no model"
    assert refusal(grid("probe: mine\nseed: 1\ntask: ioi\n")) == "spec.yaml:3: mine looks at no task"
    assert refusal(grid("probe: mine\ntask: ioi\nmodel: tiny-softmax\n")) == "spec.yaml:3: mine looks at no model"


def test_the_argument_that_a_message_is_about_is_found(fake):
    def refuse(job):
        if job.args.get("kind") == "small" and "steps" in job.args:
            raise WorkbenchError("small ones take no steps")
        if "needed" not in job.args:
            raise WorkbenchError("mine needs needed")
        if job.args["needed"] == 3:
            raise WorkbenchError("that is too much")

    fake["mine"] = probe(check=refuse)
    assert refusal(grid("probe: mine\nkind: small\nsteps: 1\nneeded: 1\n")) == "spec.yaml:3: small ones take no steps"
    assert refusal(grid("seed: 1\nprobe: mine\nkind: small\n")) == "spec.yaml:2: mine needs needed"
    # Without `needed` there is another mistake, so that nothing says whether this one is about it.
    assert refusal(grid("kind: x\nneeded: 3\nprobe: mine\n")) == "spec.yaml:3: that is too much"


def test_only_names_that_the_probe_does_not_know_are_compared_with_keys_of_a_spec(fake):
    def refuse(job):
        raise WorkbenchError(f"no good {', '.join(job.args)}")

    fake["mine"] = probe(arguments={"tasks": 1}, check=refuse)
    assert refusal(grid("probe: mine\ntasks: 1\n")) == "spec.yaml:2: no good tasks"
    assert refusal(grid("probe: mine\nseeds: 1\n")) == "spec.yaml:2: no good seeds; a key of every spec: seed"


def test_errors_of_ours_keep_their_traceback(fake):
    def broken(job):
        raise ZeroDivisionError

    fake["mine"] = probe(check=broken)
    with pytest.raises(ZeroDivisionError):
        check_grid(grid("probe: mine\n"))


# pinned


def test_pinned_fills_in_revisions_and_keeps_lines_and_places():
    asked = grid("model: [tiny-softmax, null]\nseed: [0, 1]\nprobe: sleep\nrun: {workers: 2}\n")
    found = pinned(asked)
    digest = revision_of("tiny-softmax")
    assert [job.revision for job in found.jobs] == [digest, digest, None, None]
    assert [(j.model, j.seed, j.probe) for j in found.jobs] == [(j.model, j.seed, j.probe) for j in asked.jobs]
    assert (found.name, found.run) == (asked.name, asked.run)
    assert set(found.lines) == {job.key for job in found.jobs}
    assert {found.place(job, "seed") for job in found.jobs} == {"spec.yaml:2"}
    assert pinned(found).jobs == found.jobs
    check_grid(found)


def test_a_revision_that_is_written_and_one_that_is_filled_in_are_the_same_cell():
    digest = revision_of("tiny-softmax")
    asked = grid(f"probe: sleep\nmodel: tiny-softmax\ngrids:\n  - revision: '{digest}'\n  - {{}}\n")
    assert len(asked.jobs) == 2
    found = pinned(asked)
    assert [job.revision for job in found.jobs] == [digest]
    assert found.lines == {found.jobs[0].key: "spec.yaml:4"}


def test_pinned_follows_the_files(tmp_path):
    shutil.copytree(ROOT / "datasets" / "models" / "compiled-dyck", "mine")
    asked = grid("probe: sleep\nmodel: ./mine\n")
    before = pinned(asked).jobs[0].key
    assert pinned(asked).jobs[0].key == before
    Path("mine/tokenizer.json").write_bytes(Path("mine/tokenizer.json").read_bytes() + b"\n")
    assert pinned(asked).jobs[0].key != before


def test_pinned_refuses_with_the_line():
    with pytest.raises(WorkbenchError, match="^spec.yaml:3: no bundled model 'nope'"):
        pinned(grid("probe: sleep\nmodel: [tiny-softmax,\n  nope]\n"))


def test_a_grid_of_trivial_cells_is_checked_without_torch():
    code = """
import sys
from workbench.jobs.spec import read_grid
from workbench.jobs.check import check_grid, pinned
grid = read_grid([{"probe": "sleep", "seconds": 0, "seed": range(9)}, {"probe": "fail", "how": ["error", "kill"]}])
check_grid(grid)
pinned(grid)
pinned(read_grid({"probe": "sleep", "model": "tiny-softmax", "task": "ioi"}))
print([m for m in ("torch", "pandas", "pyarrow", "transformers", "pydantic") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.strip() == "[]", done.stderr


def test_an_analysis_has_one_name_in_keys() -> None:
    dashed, plain = (
        pinned(grid(f"probe: {name}\nmodel: tiny-softmax\n")) for name in ("retrieval-heads", "retrieval_heads")
    )
    assert dashed.jobs == plain.jobs
    assert dashed.jobs[0].probe == "retrieval_heads"
