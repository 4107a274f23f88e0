import copy
import math

import pytest
import torch

import workbench as wb
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.probes.ablation import next_token_loss
from workbench.probes.sinks.massive import massive_activations
from workbench.probes.sinks.massive_effect import massive_effect
from workbench.probes.sinks.planted import planted_model, planted_texts

PLAIN = torch.tensor([[0, 2, 3, 4, 7, 8, 9, 10, 11], [0, 6, 7, 8, 9, 10, 11, 2, 3]])
"""Texts of the planted model without its trigger."""


def planted(entries, *, blocks=6, tokens=10, width=32, seed=0):
    stream = torch.randn(blocks + 1, tokens, width, generator=torch.Generator().manual_seed(seed))
    for layer, position, dim, value in entries:
        stream[layer + 1, position, dim] = value
    return stream


def test_planted_numbers_are_found_and_no_others():
    entries = [(2, 0, 7, 2000.0), (3, 0, 7, 2100.0), (3, 4, 7, -1500.0), (5, 9, 31, 800.0)]
    stream = planted([*entries, (1, 3, 3, 90.0), (4, 2, 2, 300.0)])
    stream[0] = 1e6  # the embedding is not looked at
    table = wb.massive_activations(stream).frame()
    assert list(table.columns) == ["layer", "position", "dim", "value", "ratio"]
    assert [tuple(row) for row in table[["layer", "position", "dim", "value"]].itertuples(index=False)] == entries
    for row, (layer, *_, value) in zip(table.itertuples(), entries, strict=True):
        assert row.ratio == pytest.approx(abs(value) / float(stream[layer + 1].abs().median()), rel=1e-6)
    both = massive_activations(stream, ratio=100)
    assert len(both.frame()) == 5
    assert len(massive_activations(stream, least=0, ratio=100).frame()) == 6
    dims = both.dims().set_index("dim")
    assert dims.loc[7, ["activations", "layers", "tokens"]].tolist() == [3, 2, 2]
    assert dims.loc[7, "mean"] == pytest.approx(2600 / 3)
    assert dims.loc[7, "spread"] == pytest.approx(torch.tensor([2000.0, 2100, -1500]).std().item())
    assert math.isnan(dims.loc[31, "spread"])


def test_the_table_of_layers_and_its_null():
    stream = planted([(2, 0, 7, 2000.0)], tokens=400)
    table = massive_activations(stream).layers()
    assert table["massive"].tolist() == [0, 0, 1, 0, 0, 0]
    top = stream[3].abs().flatten().topk(3).values
    assert table.loc[2, ["largest", "second", "third"]].tolist() == pytest.approx(top.tolist())
    draws = torch.randn(300, 12800, generator=torch.Generator().manual_seed(1)).abs()
    by_chance = float((draws.amax(1) / draws.median(1).values).median())
    assert table["chance"].tolist() == pytest.approx([by_chance] * 6, rel=0.02)
    others = table.drop(2)
    assert (others["ratio"] < 1.4 * others["chance"]).all()


def test_batches_and_padding():
    one, two = planted([(2, 0, 7, 2000.0)], tokens=8), planted([(3, 1, 5, 3000.0)], tokens=6, seed=1)
    batch = torch.full((7, 2, 8, 32), 1e5)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, :2] = False
    batch[:, 0], batch[:, 1, 2:] = one, two
    found = massive_activations(batch, mask=mask)
    assert found.frame()[["layer", "sequence", "position", "dim", "value"]].values.tolist() == [
        [2, 0, 0, 7, 2000],
        [3, 1, 1, 5, 3000],
    ]
    for s, stream in enumerate((one, two)):
        alone = massive_activations(stream)
        torch.testing.assert_close(found.largest[:, s], alone.largest[:, 0])
        torch.testing.assert_close(found.median[:, s], alone.median[:, 0])
        torch.testing.assert_close(found.chance[:, s], alone.chance[:, 0])


def test_zero_ruins_the_planted_model_and_the_mean_changes_nothing():
    """Zero is the net whose block 0 writes nothing; the mean is the constant itself; random numbers matter less."""
    model = planted_model()
    found = massive_effect(model, PLAIN, ratio=100, random=4)
    assert found.entries.tolist() == [[0, 0, 0, 2], [0, 1, 0, 2]]
    without = copy.deepcopy(model.net)
    with torch.no_grad():
        without.blocks[0].mlp.W_out.zero_()
        expected = next_token_loss(wb.NativeModel(without).run(PLAIN))
    torch.testing.assert_close(found.zero, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found.mean, found.base, atol=1e-6, rtol=1e-6)
    table = found.frame().set_index("intervention")
    assert table.loc["zero", "change"] > 2
    assert abs(table.loc["mean", "change"]) < 1e-6
    assert abs(table.loc["random zero", "change"]) < table.loc["zero", "change"] / 5
    assert list(table.index) == ["none", "zero", "mean", "random zero", "random mean"]


def test_what_is_set_by_hand():
    model, texts = planted_model(), planted_texts()
    found = massive_effect(model, texts, ratio=100, random=1, metric="kl")
    assert found.entries.tolist() == [[0, 0, 0, 2], [0, 1, 0, 2], [3, 0, 4, 2], [3, 1, 9, 2]]
    with torch.no_grad():
        plain = model.run(texts, read=["blocks.0.hook_resid_post", "blocks.3.hook_resid_post"])
        first, second = (plain.acts[f"blocks.{layer}.hook_resid_post"] for layer in (0, 3))
        means = [first[:, 0, 2].mean()] * 2 + [(second[0, 4, 2] + second[1, 9, 2]) / 2] * 2
        assert found.means.tolist() == pytest.approx([float(m) for m in means], rel=1e-6)

        def set_to(values):
            def edit(layer):
                def act(output):
                    new = output.clone()
                    for (at, text, column, dim), value in zip(found.entries.tolist(), values, strict=True):
                        if at == layer:
                            new[text, column, dim] = value
                    return new

                return act

            run = model.run(texts, edit={f"blocks.{layer}.hook_resid_post": edit(layer) for layer in (0, 3)})
            wanted, got = (r.logits.double().log_softmax(-1) for r in (plain, run))
            return (wanted.exp() * (wanted - got)).sum(-1).mean(1)

        torch.testing.assert_close(found.zero, set_to([0.0] * 4), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(found.mean, set_to(means), atol=1e-6, rtol=1e-5)
    every = massive_effect(model, texts, ratio=100, random=1, where="all")
    # What is taken down of the triggers leaves a number that still stands out.
    assert len(every.entries) == 2 * 6 + 2 * 5
    assert found.zero.mean() > 10 * found.mean.mean()


def test_means_of_other_texts():
    model = planted_model()
    one = massive_effect(model, PLAIN[:1], ratio=100, random=1)
    assert "one text" in one.undefined["mean"]
    other = massive_effect(model, PLAIN[:1], ratio=100, random=1, reference=PLAIN)
    assert not other.undefined
    torch.testing.assert_close(other.means, one.means)
    with pytest.raises(WorkbenchError, match="reference texts have no massive activation"):
        massive_effect(model, planted_texts(), ratio=100, random=1, reference=PLAIN)


def test_random_numbers_stand_in_the_same_block_and_text():
    seen = []
    from workbench.probes.sinks import massive_effect as module

    original = module._random
    try:
        module._random = lambda *args: seen.append(original(*args)) or seen[-1]
        found = massive_effect(planted_model(), planted_texts(), ratio=100, random=30, where="all")
    finally:
        module._random = original
    wanted = sorted((layer, text) for layer, text, *_ in found.entries.tolist())
    taken = {tuple(entry) for entry in found.entries.tolist()}
    for draw in seen:
        assert sorted(entry[:2] for entry in draw) == wanted
        assert len(set(draw)) == len(draw)
        assert not taken & set(draw)


def test_small_models_need_thresholds_of_their_own():
    model = wb.load("tiny-softmax")
    texts = ["Mary and John went to the store . John gave a book to", "the cat sat on the mat ."]
    reads = [f"blocks.{layer}.hook_resid_post" for layer in range(4)]
    with torch.no_grad():
        run = model.run(texts, read=reads)
    none = massive_activations(run)
    assert not len(none.frame())
    assert "least= and ratio=" in none.undefined["activations"]
    with pytest.raises(Refused, match="least= and ratio="):
        massive_effect(model, texts)
    found = massive_activations(run, least=0, ratio=25)
    assert set(found.frame()["token"]) == {"<bos>"}


def test_refused():
    for wrong in ({"least": -1}, {"ratio": 0.5}):
        with pytest.raises(WorkbenchError):
            massive_activations(planted([]), **wrong)
    with pytest.raises(UnknownName, match="last"):
        massive_effect(planted_model(), PLAIN, where="last")
    with pytest.raises(WorkbenchError, match="at least 1"):
        massive_effect(planted_model(), PLAIN, random=0)
    with pytest.raises(UnknownName, match="metric"):
        massive_effect(planted_model(), PLAIN, ratio=100, metric="joy")


def test_they_are_drawn_and_kept(tmp_path):
    results = (
        massive_activations(planted([(2, 0, 7, 2000.0)])),
        massive_effect(planted_model(), PLAIN, ratio=100, random=1),
    )
    for i, result in enumerate(results):
        assert result.plot().has_data()
        assert len(wb.load_result(result.save(tmp_path / str(i))).frame()) == len(result.frame())
