"""What objects show of themselves in a notebook: whole, escaped, self-contained, and cheap."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import pandas as pd
import torch
from fragment_checks import Fragment, powers_of_ten

import workbench as wb
from workbench.figure_html import HEAVY, INK, picture
from workbench.fragments import LETTERS, ROWS, facts, table, table_view
from workbench.jobs.job import Job
from workbench.maps import AttentionMap
from workbench.models.protocol import LayerRecord, Manifest, Tokens
from workbench.results import Result, axis, load_result
from workbench.run import Activations, Generation, Maps, Provenance, Run
from workbench.stored_run import StoredRun

EVIL = "</td><script>alert(1)</script> <img src=x onerror=alert(1)> $x_1^2$ & 日本 http://a.b"


@dataclass(frozen=True)
class Points(Result):
    values: torch.Tensor
    label: str = "points"
    undefined: Mapping[str, str] = field(default_factory=dict)

    def frame(self) -> pd.DataFrame:
        return pd.DataFrame({self.label: self.values.tolist(), "name": self.label})

    def plot(self, ax=None):
        ax = axis(ax)
        ax.scatter(range(len(self.values)), self.values.numpy())
        ax.set(title=self.label, xlabel=self.label)
        return ax


class Broken(Points):
    def plot(self, ax=None):
        raise ValueError(f"two\nlines of {EVIL}")


def run(tokens: int = 12, heads: int = 3, layers: int = 2, batch: int = 1) -> Run:
    torch.manual_seed(0)
    weights = torch.rand(batch, heads, tokens, tokens).tril()
    maps = {layer: AttentionMap.from_dense(weights / weights.sum(-1, keepdim=True)) for layer in range(layers)}
    labels = ((EVIL, *(f"t{i}" for i in range(tokens - 1))),) * batch
    ids = torch.arange(tokens).expand(batch, tokens)
    acts = Activations({wb.Site("resid_post", 0): torch.zeros(batch, tokens, 4)})
    where = Provenance(EVIL, revision="r7", dtype="float32", attention="native softmax")
    return Run(Tokens(ids, torch.ones_like(ids, dtype=torch.bool), labels), None, None, acts, Maps(maps), where)


def shown(thing) -> Fragment:
    found = Fragment(thing._repr_html_())
    assert "script" not in found.tags
    return found


def test_a_result_is_its_figure_and_its_table():
    found = shown(Points(torch.arange(100.0)))
    assert found.tags.count("svg") == 1
    assert found.tags.count("tr") == ROWS + 1
    assert f"Points\n: 100 rows, first {ROWS} shown" in found.text


def test_labels_are_escaped_in_figure_and_table():
    found = shown(Points(torch.arange(3.0), EVIL))
    assert "svg" in found.tags
    assert found.text.count(EVIL) >= 4, "title, axis, column and cells"


def test_a_figure_that_fails_is_one_line_that_says_why():
    found = shown(Broken(torch.arange(3.0)))
    assert "svg" not in found.tags
    assert f"no figure: ValueError: two lines of {EVIL}" in found.text
    assert "table" in found.tags


def test_what_is_undefined_says_why():
    found = shown(Points(torch.zeros(1), undefined={"layer 3": "no query sees a key"}))
    assert "undefined: layer 3\nno query sees a key" in found.text


def test_two_views_share_no_id():
    result = Points(torch.arange(3.0))
    first, second = shown(result), shown(result)
    assert first.ids
    assert not set(first.ids) & set(second.ids)


def test_ink_is_that_of_the_page():
    drawn = Points(torch.arange(3.0))._repr_html_().partition("<svg")[2]
    assert "currentColor" in drawn
    assert INK not in drawn


def test_powers_of_ten_are_letters():
    found = Fragment(picture(powers_of_ten, "powers"))
    assert "math" not in found.text
    for power in ("10⁻²", "10⁰", "-10²"):
        assert power in found.text, power


def test_a_heavy_figure_becomes_an_image_with_words():
    found = Fragment(picture(Points(torch.rand(60_000)).plot, "many"))
    assert "image" in found.tags
    assert found.tags.count("use") < 1000
    assert "points" in found.text
    light = picture(Points(torch.rand(100)).plot, "few")
    assert "<image" not in light
    assert len(light) < HEAVY


def test_tables_are_escaped_and_say_how_long_they_are():
    frame = pd.DataFrame({"token": [EVIL] * 3, "share": [0.123456, float("nan"), 1.0]})
    html = table_view(frame, EVIL, rows=2)
    found = Fragment(html)
    assert found.text.count(EVIL) == 3
    assert "3 rows, first 2 shown" in found.text
    assert "0.1235" in found.text
    assert "first" not in table_view(frame, "x", rows=3)


def test_tables_name_what_is_not_there_and_cut_what_is_long():
    frame = pd.DataFrame({"a": [1.23456789, float("nan")], "b": [None, "x" * 1000], "c": [True, False]})
    found = Fragment(table(frame))
    assert "1.235" in found.text
    assert found.text.count("undefined") == 2
    assert "x" * (LETTERS - 1) + "…" in found.text
    assert "x" * LETTERS not in found.text
    twice = pd.DataFrame([[1, 2]], columns=["same", "same"])
    assert Fragment(table(twice)).tags.count("td") == 2
    assert "0 rows" in Fragment(table_view(pd.DataFrame(), "Nothing")).text
    assert Fragment(facts({"a": "", "b": None, "c": 0})).tags.count("tr") == 1


def test_a_saved_result_shows_its_table(tmp_path):
    found = shown(load_result(Points(torch.arange(3.0), EVIL).save(tmp_path / "r")))
    assert "Points\n: 3 rows" in found.text
    assert "values [3]" in found.text


def test_a_run_tells_model_tokens_and_what_was_captured():
    found = shown(run())
    for text in (EVIL, "1 text of 12 tokens", "r7", "float32, on cpu, native softmax", "blocks.0.hook_resid_post"):
        assert text in found.text, text
    assert found.text.count("DenseMap") == 2
    bare = shown(
        Run(Tokens(torch.zeros(2, 5, dtype=torch.int64), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])))
    )
    assert "2 texts of 5 tokens, 2 of them padding" in bare.text
    assert "no attention was captured" in bare.text
    long = shown(run(tokens=60))
    assert "and 20 more" in long.text
    made = shown(Generation(run().tokens, 8))
    assert "4 tokens behind 8" in made.text
    assert "t10" in shown(StoredRun(run(), {"asked": EVIL})).text


def test_maps_tell_what_they_answer_without_work():
    maps = run().maps
    maps[1].blocks(4, "sum")
    found = shown(maps)
    assert "2 layers" in found.text
    assert found.text.count("blocks(4, 'sum')") == 1


def test_a_map_draws_its_heads_small_and_never_whole():
    found = shown(run(heads=12).maps[0])
    assert "image" in found.tags
    assert "first 8 of 12 heads" in found.text
    assert "12 heads, 12 queries x 12 keys" in found.text
    assert "first text" in shown(run(batch=2).maps[0]).text

    class Long(AttentionMap):
        def rows(self, lo, hi):
            raise AssertionError("rows of a long map were computed to be shown")

    long = Long((1, 4, 32768, 32768))
    assert "no picture: 32,768 x 32,768" in shown(long).text
    for way in ("sum", "max"):
        long._memo["blocks", 512, way] = torch.rand(1, 4, 64, 64)
    assert "image" in shown(long).tags


def test_a_map_that_kept_nothing_says_so():
    model = wb.load("tiny-softmax")
    kept = model.run("a b c", maps=wb.capture(keep=False, stats=("received",))).maps[0]
    found = shown(kept)
    assert "no figure: Refused" in found.text
    assert "received()" in found.text


def test_other_things_of_the_library():
    assert "svg" in shown(wb.zoom(run().maps[0], 0)).tags
    manifest = Manifest(EVIL, (LayerRecord(0, "softmax", "native", "exact", EVIL),), ("hook_a",))
    assert shown(manifest).text.count(EVIL) == 2
    assert shown(wb.variants()).tags.count("tr") == len(wb.variants()) + 1
    assert shown(wb.analyses()).tags.count("tr") == len(wb.analyses()) + 1


def test_pairs_show_their_prompts():
    task = wb.task("ioi")
    pairs = task.build(seed=0, tokenizer=wb.load("compiled-ioi").tokenizer, n=ROWS + 5)
    found = shown(pairs)
    assert f"{ROWS + 5} of 15 tokens, clean and corrupted, first {ROWS} shown" in found.text
    assert pairs.texts[0] in found.text
    assert pairs.texts[-1] not in found.text
    bare = shown(wb.Pairs(*(torch.full((1, 2), 7) for _ in range(4)), torch.tensor([1])))
    assert "7 7" in bare.text
    assert shown(pairs[:0])


def test_words_where_there_is_no_html():
    class Printer:
        def __init__(self):
            self.said = ""

        def text(self, more):
            self.said += more

    printer = Printer()
    Points(torch.arange(100.0))._repr_pretty_(printer, False)
    assert printer.said.startswith("Points: 100 rows\n")
    assert len(printer.said.splitlines()) == 7
    for thing in (run(tokens=3000), Generation(run(tokens=3000).tokens, 8), run(tokens=3000).tokens):
        assert len(repr(thing)) < 200
        assert "3,000" in repr(thing)


def test_a_circuit_is_drawn():
    names = ("input->a0.h0<q>", "a0.h0->logits", "input->logits")
    edges = wb.Circuit("edge", names, [1.0, -2.0, 0.5], torch.tensor([True, True, False]), {"method": EVIL})
    found = shown(edges)
    assert "svg" in found.tags
    assert f"2 of 3 edges kept, {EVIL}" in found.text
    assert found.text.index("a0.h0\nlogits") < found.text.index("input\na0.h0\nq"), "the largest score stands first"
    assert "svg" in shown(wb.Circuit("node", ("a0.h0", "m0"), [1.0, 0.0], torch.tensor([True, False]))).tags


def test_a_feature_graph_is_drawn():
    nodes = wb.FeatureNodes.of(["embedding", "logit"], [-1, 1], [0, 0], [3, 4], label=[EVIL, "b"])
    graph = wb.FeatureGraph(nodes, torch.tensor([0]), torch.tensor([1]), torch.tensor([1.0]), tokens=(EVIL,))
    found = shown(graph)
    assert "svg" in found.tags
    assert EVIL in found.text


def test_a_store_tells_how_far_its_grids_are(tmp_path):
    from workbench.jobs.grids import put_grid

    store = wb.JobStore(tmp_path / "none")
    assert "is no store of jobs" in shown(store).text
    store.open_for_writing()
    jobs = [Job("sinks", model="tiny-softmax", args={"epsilon": 0.1 * i}) for i in range(1, 4)]
    put_grid(store, "mine", jobs)
    store.fail(jobs[0], {"kind": "error", "message": f"{EVIL}\nand a second line"})
    found = shown(store)
    assert "mine\n0\n1\n0\n2\n" in found.text, "done, failed, running and missing cells of the grid"
    assert EVIL in found.text
    assert "second line" not in found.text


def test_a_view_is_cheap():
    result = wb.sinks(run())
    result._repr_html_()
    before = time.perf_counter()
    result._repr_html_()
    assert time.perf_counter() - before < 2.0  # 0.1 s on an idle core
