"""The activation store: what goes in comes out, mixed, from any cursor, while it grows; damage is refused by name."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import workbench as wb
from workbench.coders.mixing import Mixed, permutation
from workbench.coders.store import ActivationStore
from workbench.errors import Refused, UnknownName, WorkbenchError

A, B = "blocks.0.attn.hook_z", "blocks.1.hook_resid_post"


def rows(start, count):
    """Rows that say which they are: A holds the number, B the number and its half."""
    number = torch.arange(start, start + count, dtype=torch.float32)[:, None]
    return {A: number.clone(), B: torch.cat([number, number / 2, -number], 1)}


def filled(folder, sizes=(5, 9, 1, 13, 7, 6), shard_rows=8, **options):
    at = 0
    with ActivationStore.create(folder, {A: 1, B: 3}, shard_rows=shard_rows, **options) as store:
        for size in sizes:
            store.append(rows(at, size))
            at += size
    return store


def numbers(batches, site=A):
    return [int(n) for batch in batches for n in batch[site][:, 0]]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=12),
    st.integers(1, 15),
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(1, 3),
    st.data(),
)
def test_every_row_comes_once_per_epoch_and_from_any_cursor(tmp_path_factory, sizes, shard, size, mix, epochs, data):
    store = filled(tmp_path_factory.mktemp("store") / "s", sizes, shard)
    total = sum(sizes)
    assert store.rows == total
    assert store.complete

    def batches():
        return store.batches(size, 3, mix=mix, epochs=epochs)

    whole = list(batches())
    assert all(len(batch[A]) == size for batch in whole)
    assert len(whole) == epochs * total // size
    served = numbers(whole)
    for epoch in range(epochs):
        part = served[epoch * total : (epoch + 1) * total]
        assert len(set(part)) == len(part)
    for batch in whole:
        assert torch.equal(batch[B], torch.cat([batch[A], batch[A] / 2, -batch[A]], 1))
    cut = data.draw(st.integers(0, len(whole)))
    begun = batches()
    for _ in range(cut):
        next(begun)
    state = json.loads(json.dumps(begun.state()))
    rest = list(store.batches(size, 3, state, mix=mix, epochs=epochs))
    assert numbers(rest) == numbers(whole[cut:])


def test_the_order_is_that_of_the_seed_and_well_mixed(tmp_path):
    store = filled(tmp_path / "s", [64] * 16, 64)
    first, again, other = (numbers(store.batches(32, seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert sorted(first) == sorted(other) == list(range(1024))
    # A batch of 32 from 4 shards of 64 rows: neighbours in the data are not neighbours in the batches.
    assert sum(abs(a - b) == 1 for a, b in itertools.pairwise(first)) < 20
    assert len({n // 64 for n in first[:32]}) == 4


def test_rows_of_a_shard_are_shuffled_on_the_disk(tmp_path):
    store = filled(tmp_path / "s", [64], 64)
    on_disk = load_file(tmp_path / "s" / store.shards[0])
    assert sorted(on_disk[A][:, 0].tolist()) == list(range(64))
    assert on_disk[A][:, 0].tolist() != list(range(64))
    assert torch.equal(on_disk[B][:, 0], on_disk[A][:, 0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_the_type_is_that_asked_for_and_rounds_once(tmp_path, dtype):
    values = torch.randn(40, 3, dtype=torch.float64)
    with ActivationStore.create(tmp_path / "s", {"x": 3}, dtype=dtype) as store:
        store.append({"x": values})
    kept = store.read(0)["x"]
    assert kept.dtype == getattr(torch, dtype)
    assert {tuple(row) for row in kept.tolist()} == {tuple(row) for row in values.to(kept.dtype).tolist()}
    assert next(store.batches(8))["x"].dtype == torch.float32


def test_another_process_reads_it_half_way(tmp_path):
    store = ActivationStore.create(tmp_path / "s", {A: 1, B: 3}, shard_rows=8)
    store.append(rows(0, 20))
    store.append(rows(20, 3))
    code = (
        "import sys; from workbench.coders.store import ActivationStore as S\n"
        "s = S.open(sys.argv[1]); print(s.rows, s.complete, sorted(int(v) for b in s.batches(1) for v in b[s.sites[0]]))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "s"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"20 False {list(range(20))}"
    reader = ActivationStore.open(tmp_path / "s")
    store.close()
    assert reader.rows == 20
    assert reader.refresh().rows == 23
    assert reader.complete


def test_an_epoch_reads_the_shards_that_were_there_when_it_began(tmp_path):
    store = ActivationStore.create(tmp_path / "s", {A: 1, B: 3}, shard_rows=8)
    store.append(rows(0, 16))
    batches = store.batches(4, epochs=2, mix=1)
    first = [next(batches) for _ in range(2)]
    store.append(rows(16, 8))
    first += [next(batches) for _ in range(2)]
    assert sorted(numbers(first)) == list(range(16))
    assert sorted(numbers(batches)) == list(range(24))


def test_it_goes_on_where_the_writer_stopped(tmp_path):
    filled(tmp_path / "s", [8, 3], 8)
    store = ActivationStore.open(tmp_path / "s")
    with store:
        store.append(rows(11, 9))
        assert not ActivationStore.open(tmp_path / "s").complete
    assert sorted(numbers(store.batches(1))) == list(range(20))


def test_a_torn_last_shard_is_passed_over_and_written_over(tmp_path):
    store = ActivationStore.create(tmp_path / "t", {A: 1, B: 3}, shard_rows=8)
    store.append(rows(0, 8))
    (tmp_path / "t" / "shard-000001.safetensors").write_bytes(b"half a shar")
    (tmp_path / "t" / "shard-000001.safetensors.77.part").write_bytes(b"half")
    again = ActivationStore.open(tmp_path / "t")
    assert sorted(numbers(again.batches(1))) == list(range(8))
    with again:
        again.append(rows(8, 8))
    again.check()
    assert sorted(numbers(ActivationStore.open(tmp_path / "t").batches(1))) == list(range(16))


def _damage(kind, path):
    raw = path.read_bytes()
    if kind == "cut":
        path.write_bytes(raw[: len(raw) // 2])
    elif kind == "bit":
        path.write_bytes(raw[:-3] + bytes([raw[-3] ^ 1]) + raw[-2:])
    elif kind == "gone":
        path.unlink()
    elif kind == "swapped":
        path.write_bytes((path.parent / "shard-000001.safetensors").read_bytes())


@pytest.mark.parametrize("kind", ["cut", "bit", "gone", "swapped"])
def test_a_damaged_shard_is_refused_by_name(tmp_path, kind):
    store = filled(tmp_path / "s", [8, 8, 8], 8)
    _damage(kind, tmp_path / "s" / "shard-000002.safetensors")
    with pytest.raises(WorkbenchError, match=r"shard-000002.safetensors is damaged"):
        list(store.batches(2))
    with pytest.raises(WorkbenchError, match=r"shard-000002.safetensors is damaged"):
        store.check()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"kind": "attention-workbench activations"}', '{"kind": "maps", "format": 1}']
)
def test_a_damaged_manifest_is_refused_by_name(tmp_path, text):
    filled(tmp_path / "s")
    (tmp_path / "s" / "manifest.json").write_text(text)
    with pytest.raises(WorkbenchError, match=r"manifest.json is damaged"):
        ActivationStore.open(tmp_path / "s")


def test_a_manifest_does_not_lead_out_of_its_folder(tmp_path):
    filled(tmp_path / "s")
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    manifest["shards"][0]["file"] = "../other.safetensors"
    (tmp_path / "s" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(WorkbenchError, match=r"manifest.json is damaged"):
        ActivationStore.open(tmp_path / "s")


def test_mistakes_are_refused(tmp_path):
    store = ActivationStore.create(tmp_path / "s", {A: 1, B: 3}, dtype="float16", shard_rows=4)
    with pytest.raises(UnknownName, match=r"hook_q.*hook_z"):
        store.append({**rows(0, 2), "blocks.0.attn.hook_q": torch.zeros(2, 1)})
    with pytest.raises(WorkbenchError, match=f"rows of {B} are missing"):
        store.append({A: torch.zeros(2, 1)})
    with pytest.raises(WorkbenchError, match=r"has rows \[N, 3\].*got \[2, 2\]"):
        store.append({A: torch.zeros(2, 1), B: torch.zeros(2, 2)})
    with pytest.raises(WorkbenchError, match="every site has the same rows"):
        store.append({A: torch.zeros(2, 1), B: torch.zeros(3, 3)})
    store.append(rows(0, 2))
    bad = rows(2, 5)
    bad[B][3, 1] = float("nan")
    with pytest.raises(Refused, match=f"row 5 of {B} is not finite"):
        store.append(bad)
    with pytest.raises(Refused, match=f"row 2 of {A} is not finite as float16"):
        store.append({A: torch.tensor([[1e6]]), B: torch.zeros(1, 3)})
    assert store.rows == 0
    with pytest.raises(Refused, match="holds no rows yet"):
        store.batches(2)
    store.close()
    assert store.rows == 2
    with pytest.raises(WorkbenchError, match="exists already"):
        ActivationStore.create(tmp_path / "s", {A: 1})
    with pytest.raises(UnknownName, match="float8"):
        ActivationStore.create(tmp_path / "t", {A: 1}, dtype="float8")
    with pytest.raises(UnknownName, match="hook_q"):
        store.batches(2, sites=["hook_q"])
    with pytest.raises(Refused, match="taken with seed=0"):
        store.batches(2, 1, store.batches(2, 0).state())
    with pytest.raises(WorkbenchError, match="holds no activations"):
        ActivationStore.open(tmp_path)


def test_two_writers_are_one_too_many(tmp_path):
    filled(tmp_path / "s", [8], 8)
    one, two = ActivationStore.open(tmp_path / "s"), ActivationStore.open(tmp_path / "s")
    one.append(rows(8, 8))
    with pytest.raises(Refused, match="one store has one writer"):
        two.append(rows(8, 8))


def test_reading_holds_a_group_of_shards_and_no_more(tmp_path):
    store = filled(tmp_path / "s", [16] * 40, 16)
    batches = store.batches(4, mix=3)
    most = 0
    for _ in batches:
        most = max(most, len(batches._rows[A]))
    assert most == 48


def _killed(folder, seed):
    """Append for ever; the process is killed somewhere in between."""
    torch.set_num_threads(1)
    store = ActivationStore.open(folder)
    at = store.cursor or 0
    while True:
        store.append(rows(at, 5), cursor=at + 5)
        at += 5


def test_a_writer_killed_anywhere_loses_what_waited_and_nothing_else(tmp_path):
    folder = tmp_path / "s"
    ActivationStore.create(folder, {A: 1, B: 3}, shard_rows=20)
    context = multiprocessing.get_context("fork")
    for attempt in range(8):
        process = context.Process(target=_killed, args=(folder, attempt))
        process.start()
        process.join(0.02 + 0.017 * attempt)
        process.kill()
        process.join()
        store = ActivationStore.open(folder)
        store.check()
        if store.rows:
            assert sorted(numbers(store.batches(1))) == list(range(store.rows))
        assert (store.cursor or 0) == store.rows
    assert store.rows > 40


# ---------------------------------------------------------------------- from a model


def test_filling_from_a_model_goes_on_after_an_interruption(tmp_path, small_model, small_texts):
    sites = ["blocks.1.attn.hook_z", "blocks.1.hook_resid_post"]
    options = {"context": 16, "shard_rows": 100}
    whole = wb.store_activations(small_model, sites, small_texts, tmp_path / "whole", **options)

    class Stop(Exception):
        pass

    def until(count):
        for i, text in enumerate(small_texts):
            if i == count:
                raise Stop
            yield text

    import workbench.coders.documents as documents

    documents.WINDOW, before = 4, documents.WINDOW
    try:
        with pytest.raises(Stop):
            wb.store_activations(small_model, sites, until(13), tmp_path / "part", **options)
        cut = ActivationStore.open(tmp_path / "part")
        assert not cut.complete
        done = wb.store_activations(small_model, sites, iter(small_texts), tmp_path / "part", **options)
    finally:
        documents.WINDOW = before
    assert done.complete
    assert (
        done.rows
        == whole.rows
        == sum(len(r[sites[0]]) for r in wb.site_rows(small_model, sites[0], small_texts, context=16))
    )
    for site in sites:
        both = [torch.cat([s.read(i)[site] for i in range(len(s.shards))]) for s in (whole, done)]
        a, b = (x[(x.double() @ torch.linspace(1, 2, x.shape[1], dtype=torch.float64)).argsort()] for x in both)
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert done.about["model"] == ["random"]
    assert done.about["context"] == 16
    assert done.about["prepend_bos"] is True
    with pytest.raises(Refused, match="context=16, not 8"):
        wb.store_activations(small_model, sites, small_texts, tmp_path / "part", context=8)


def test_a_list_is_read_again_until_there_are_enough_rows(tmp_path, small_model, small_texts):
    store = wb.store_activations(
        small_model, "blocks.0.hook_resid_post", small_texts[:3], tmp_path / "s", rows=500, shard_rows=64
    )
    assert store.rows >= 500
    assert store.complete


# ---------------------------------------------------------------------- mixing without a disk


class Counting:
    """A source of rows that say which they are, in passes of odd sizes."""

    epochs = None

    def __init__(self, total):
        self.total, self.at = total, 0

    def __next__(self):
        if self.at >= self.total:
            raise StopIteration
        count = min(1 + self.at * 7 % 11, self.total - self.at)
        self.at += count
        return rows(self.at - count, count)

    def state(self):
        return {"at": self.at}

    def restore(self, state):
        self.at = state["at"]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 150), st.integers(1, 20), st.integers(1, 60), st.data())
def test_mixed_rows_come_once_and_from_any_cursor(total, batch, block, data):
    whole = list(Mixed(Counting(total), batch, block=block, seed=4))
    assert len(whole) == total // batch
    assert len(set(numbers(whole))) == len(whole) * batch
    cut = data.draw(st.integers(0, len(whole)))
    begun = Mixed(Counting(total), batch, block=block, seed=4)
    for _ in range(cut):
        next(begun)
    again = Mixed(Counting(total), batch, block=block, seed=4)
    again.restore(json.loads(json.dumps(begun.state())))
    ahead = again.peek(3)
    rest = list(again)
    assert numbers(rest) == numbers(whole[cut:])
    if rest and batch >= 3 and len(ahead[A]) == 3:
        assert numbers([ahead]) == numbers(rest)[:3]


def test_mixing_memory_does_not_grow():
    mixed = Mixed(Counting(5000), 7, block=64, seed=0)
    addresses = set()
    for _ in range(600):
        next(mixed)
        addresses.add(mixed._memory[B].data_ptr())
        assert len(mixed._memory[B]) <= 64 + 2 * 11
    assert len(addresses) <= 3  # it is made larger when a pass is the longest so far


def test_permutations_of_different_seeds_differ():
    seen = {tuple(permutation(20, a, b).tolist()) for a in range(12) for b in range(12)}
    assert len(seen) == 144
    assert torch.equal(permutation(20, 3, 4), permutation(20, 3, 4))
