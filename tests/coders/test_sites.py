"""Rows of sites: the right numbers, padding and first tokens left out, cut and packed texts, cursors, refusals."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.coders.documents import Documents, Passes, padded
from workbench.coders.sites import SiteReader, rows_of, site_rows
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.protocol import Tokens
from workbench.sites import Site

Z, POST = "blocks.1.attn.hook_z", "blocks.1.hook_resid_post"


def together(reader):
    found = list(reader)
    return {site: torch.cat([rows[site] for rows in found]) for site in found[0]}


def pieces(model, text, context):
    """Token rows that a text is cut into, worked out by hand."""
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = model.tokenizer.bos_token_id
    return [[bos, *ids[i : i + context - 1]] for i in range(0, len(ids), context - 1)]


def sorted_rows(rows):
    """Rows in an order of their own, so that sets of rows can be compared."""
    keys = rows.double() @ torch.linspace(1, 2, rows.shape[1], dtype=torch.float64)
    return rows[keys.argsort()]


@pytest.mark.parametrize("skip_first", [False, True])
def test_rows_are_those_of_every_text_run_by_itself(small_model, small_texts, skip_first):
    got = together(site_rows(small_model, [Z, POST], small_texts, context=20, skip_first=skip_first))
    want = {Z: [], POST: []}
    for text in small_texts:
        for row in pieces(small_model, text, 20):
            with torch.no_grad():
                run = small_model.run(torch.tensor([row]), read=[Z, POST])
            for site in want:
                want[site].append(run.acts[site][0].flatten(1)[int(skip_first) :])
    for site in want:
        expected = torch.cat(want[site])
        assert got[site].shape == expected.shape
        torch.testing.assert_close(sorted_rows(got[site]), sorted_rows(expected), atol=1e-5, rtol=1e-4)


def test_heads_stand_side_by_side_and_one_head_alone_is_its_slice(small_model):
    tokens = torch.randint(0, 100, (3, 11))
    (both,) = site_rows(small_model, [Z, f"{Z}[1]"], tokens)
    with torch.no_grad():
        z = small_model.run(tokens, read=[Z]).acts[Z]
    assert torch.equal(both[Z], z.reshape(33, 16))
    assert torch.equal(both[f"{Z}[1]"], both[Z][:, 8:])


def test_every_row_of_every_site_is_the_same_token(small_model, small_texts):
    for rows in site_rows(small_model, ["hook_embed", "blocks.0.hook_resid_pre"], small_texts, context=16):
        assert torch.equal(rows["hook_embed"], rows["blocks.0.hook_resid_pre"])


def test_positions_of_left_padding_are_left_out_as_well(small_model):
    value = torch.arange(12.0).reshape(2, 3, 2)
    tokens = Tokens(torch.ones(2, 3, dtype=torch.int64), torch.tensor([[False, True, True], [True, True, False]]))
    site = Site("resid_post", 0)
    assert rows_of(value, site, tokens)[:, 0].tolist() == [2, 4, 6, 8]
    assert rows_of(value, site, tokens, skip_first=True)[:, 0].tolist() == [4, 8]


def test_a_ready_made_batch_runs_as_it_is(small_model):
    batch = padded([[0, 5, 6], [0, 7]], 1)
    (rows,) = site_rows(small_model, POST, iter([batch]))
    assert len(rows[POST]) == 5


def test_a_hugging_face_model_and_its_padding(small_texts):
    transformers = pytest.importorskip("transformers")
    import workbench as wb
    from workbench.datasets.tokenizer import vocabulary, word_tokenizer

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=16, n_positions=64, vocab_size=len(vocabulary()), bos_token_id=0, eos_token_id=0
    )
    model = wb.load(transformers.GPT2LMHeadModel(config).eval())
    model.tokenizer = word_tokenizer()
    got = together(site_rows(model, [Z, "blocks.0.hook_mlp_out"], small_texts, context=32))
    count = sum(len(row) for text in small_texts for row in pieces(model, text, 32))
    assert got[Z].shape == got["blocks.0.hook_mlp_out"].shape == (count, 16)
    row = pieces(model, small_texts[-1], 32)[0]
    with torch.no_grad():
        alone = model.run(torch.tensor([row]), read=[Z]).acts[Z][0].flatten(1)
    nearest = torch.cdist(alone.double(), got[Z].double()).min(1).values
    assert nearest.max() < 1e-4


def test_two_models_see_the_same_tokens(build_small, small_texts):
    first, second = build_small(), build_small("other", seed=1)
    sites = [f"0:{POST}", f"1:{POST}"]
    got = together(site_rows([first, second], sites, small_texts, context=24))
    for i, model in enumerate((first, second)):
        alone = together(site_rows(model, POST, small_texts, context=24))
        assert torch.equal(got[sites[i]], alone[POST])


def test_what_cannot_be_read_is_refused(small_model, small_texts):
    with pytest.raises(UnknownName, match=r"blocks.9.hook_resid_post.*blocks.0-1.hook_resid_post"):
        next(site_rows(small_model, "blocks.9.hook_resid_post", small_texts))
    with pytest.raises(WorkbenchError, match="no site"):
        next(site_rows(small_model, "blocks.1.hook_resid_psot", small_texts))
    with pytest.raises(Refused, match="no vector per token"):
        next(site_rows(small_model, "blocks.1.attn.hook_pattern", small_texts))
    with pytest.raises(Refused, match="empty"):
        site_rows(small_model, POST, [])
    with pytest.raises(Refused, match="empty"):
        site_rows(small_model, POST, iter([]))
    with pytest.raises(WorkbenchError, match="at most 256 tokens"):
        site_rows(small_model, POST, small_texts, context=257)
    with pytest.raises(WorkbenchError, match="row\\['text'\\]"):
        next(site_rows(small_model, POST, [{"text": "The doctor"}]))
    with pytest.raises(WorkbenchError, match="document 1 is a NoneType"):
        next(site_rows(small_model, POST, ["The doctor", None]))
    with pytest.raises(WorkbenchError, match="given twice"):
        site_rows(small_model, [POST, POST], small_texts)
    small_model.tokenizer = None
    with pytest.raises(WorkbenchError, match="no tokenizer"):
        next(site_rows(small_model, POST, small_texts))


def test_models_that_cut_texts_differently_are_not_read_together(build_small, small_texts):
    with pytest.raises(Refused, match="see the same tokens"):
        site_rows([build_small(), build_small(vocab=2000)], [f"0:{POST}", f"1:{POST}"], small_texts)
    with pytest.raises(WorkbenchError, match=f"0:{POST}"):
        site_rows([build_small(), build_small()], POST, small_texts)


def test_empty_texts_are_left_out_and_counted(small_model):
    reader = SiteReader(small_model, POST, ["", "The doctor.", ""], repeat=False)
    assert len(together(reader)[POST]) == 1 + 3
    assert reader.empty == 2


def test_a_stream_is_neither_kept_nor_read_ahead(small_model):
    """Of ten thousand documents as many are alive as a window holds."""
    alive = weakref.WeakSet()
    read = 0

    def stream():
        nonlocal read
        for i in range(10_000):
            read += 1
            document = torch.full((8,), i % 100)
            alive.add(document)
            yield document

    reader = SiteReader(small_model, POST, stream(), context=8, budget=64)
    for _ in range(100):
        next(reader)
    gc.collect()
    assert read <= 100 * 8 + 256
    assert len(alive) <= 64


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 60), st.integers(0, 30), st.integers(16, 200), st.booleans())
def test_reading_goes_on_from_any_cursor(build_small, count, at, budget, stream):
    model = build_small()
    documents = [torch.arange(1 + 7 * i % 19) for i in range(count)]

    def passes():
        return Passes(
            model, Documents(iter(documents) if stream else documents, repeat=False), context=9, budget=budget
        )

    whole = list(passes())
    begun = passes()
    taken = [next(begun) for _ in range(min(at, len(whole)))]
    again = passes()
    again.restore(begun.state())
    rest = list(again)
    assert len(taken) + len(rest) == len(whole)
    assert all(torch.equal(a.ids, b.ids) for a, b in zip([*taken, *rest], whole, strict=True))
    assert sum(int(one.mask.sum()) for one in whole) == sum(map(len, documents))


def test_other_texts_than_before_are_refused(small_model, small_texts):
    reader = SiteReader(small_model, POST, small_texts, context=16, budget=64)
    for _ in range(5):
        next(reader)
    state = reader.state()
    changed = [*small_texts]
    changed[1] = changed[1].replace("the", "a")
    with pytest.raises(Refused, match="are not those that were read before"):
        SiteReader(small_model, POST, changed, context=16, budget=64).restore(state)
    with pytest.raises(Refused, match="end after 1 documents"):
        SiteReader(small_model, POST, iter(small_texts[:1]), context=16, budget=64).restore(state)
    with pytest.raises(Refused, match="from their beginning"):
        reader.restore(state)
