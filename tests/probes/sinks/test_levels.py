import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench as wb
from workbench.errors import Refused, WorkbenchError
from workbench.models.protocol import Tokens
from workbench.probes.sinks.levels import sink_levels
from workbench.run import Run
from workbench.sites import Site

NORM = 300.0


def planted(periods, *, blocks=48, tokens=20, width=256, seed=0, noise=1.0, norm=NORM):
    """Noise, and at each position of ``periods`` a common direction during (start, lifetime) counted in block outputs."""
    generator = torch.Generator().manual_seed(seed)
    stream = noise * torch.randn(blocks + 1, tokens, width, generator=generator)
    direction = torch.nn.functional.normalize(torch.randn(width, generator=generator), dim=0)
    for i, (position, spans) in enumerate(periods.items()):
        for start, lifetime in [spans] if isinstance(spans, tuple) else spans:
            stream[1 + start : 1 + start + lifetime, position] += norm * 0.9**i * direction
    return stream


def rows(result):
    table = result.frame()
    return {
        (int(p), int(s), int(n), k)
        for p, s, n, k in zip(table["position"], table["start"], table["lifetime"], table["kind"], strict=True)
    }


def literal(stream, threshold=0.9):
    """The published procedure, token by token, for a stream whose primary sink rises after block 0 and really ends."""
    outputs = stream[1:].double()
    norms = outputs.norm(dim=-1)
    primary = int(norms[:, :3].mean(0).argmax())
    steps = norms[1:, primary] - norms[:-1, primary]
    start = int(steps.argmax()) + 1
    end = int(steps[start:].argmin()) + start + 1
    layers = {primary: list(range(start, end))}
    for layer in range(start, end):
        for t in range(stream.shape[1]):
            cos = torch.nn.functional.cosine_similarity(outputs[layer, t], outputs[layer, primary], dim=0)
            if t != primary and abs(cos) > threshold:
                layers.setdefault(t, []).append(layer)
    return {(t, found[0], len(found)) for t, found in layers.items()}


@pytest.mark.parametrize("first", [0, 1, 2])
def test_planted_levels_are_recovered_exactly(first):
    periods = {first: (4, 43), 9: (22, 23), 11: (22, 22), 15: (22, 24), 17: (30, 4), 18: (6, 33), 19: (8, 32)}
    stream = planted(periods)
    assert rows(wb.sink_levels(stream)) == {
        (first, 4, 43, "primary"),
        (9, 22, 23, "secondary"),
        (11, 22, 22, "secondary"),
        (15, 22, 24, "secondary"),
        (17, 30, 4, "other"),
        (18, 6, 33, "primary"),
        (19, 8, 32, "secondary"),
    }
    assert literal(stream) == {row[:3] for row in rows(wb.sink_levels(stream))}


def test_the_frame_of_one_stream_has_the_four_columns():
    table = wb.sink_levels(planted({0: (4, 43), 9: (22, 23)})).frame()
    assert list(table.columns) == ["position", "start", "lifetime", "kind"]
    assert table.to_dict("list") == {
        "position": [0, 9],
        "start": [4, 22],
        "lifetime": [43, 23],
        "kind": ["primary", "secondary"],
    }


@pytest.mark.parametrize(
    ("blocks", "lifetime", "kind"),
    [(48, 4, "other"), (48, 5, "secondary"), (48, 32, "secondary"), (48, 33, "primary"),
     (24, 2, "other"), (24, 3, "secondary"), (24, 16, "secondary"), (24, 17, "primary"),
     (12, 1, "other"), (12, 2, "secondary"), (12, 8, "secondary"), (12, 9, "primary")],
)  # fmt: skip
def test_the_constants_are_fractions_of_depth(blocks, lifetime, kind):
    """At 48 blocks they are the published 4 and L - 15."""
    result = sink_levels(planted({0: (1, blocks - 2), 7: (2, lifetime)}, blocks=blocks))
    assert rows(result) == {(0, 1, blocks - 2, "primary"), (7, 2, lifetime, kind)}


def test_the_embedding_does_not_count():
    stream = planted({1: (3, 8), 6: (4, 3)}, blocks=12)
    stream[0] = 1e4 * torch.randn(stream.shape[1:], generator=torch.Generator().manual_seed(3))
    stream[0, 2] *= 100
    assert rows(sink_levels(stream)) == {(1, 3, 8, "primary"), (6, 4, 3, "secondary")}


@pytest.mark.parametrize("start", [0, 1, 5])
def test_a_sink_that_lives_to_the_last_block(start):
    """No decrease of the norm is real: the period touches the last block, whatever the noise does."""
    stream = planted({0: (start, 12 - start), 8: (8, 4)}, blocks=12, noise=4.0)
    assert rows(sink_levels(stream)) == {(0, start, 12 - start, "primary"), (8, 8, 4, "secondary")}


def test_a_sink_there_from_the_first_block():
    assert rows(sink_levels(planted({0: (0, 9), 5: (0, 3)}, blocks=12))) == {
        (0, 0, 9, "primary"),
        (5, 0, 3, "secondary"),
    }


def test_a_gap_leaves_one_level_of_as_many_layers_as_there_are():
    stream = planted({0: (4, 40), 9: [(10, 5), (16, 3)]})
    assert rows(sink_levels(stream)) == {(0, 4, 40, "primary"), (9, 10, 8, "secondary")}
    assert literal(stream) == {(0, 4, 40), (9, 10, 8)}


def test_the_opposite_direction_is_aligned_too():
    stream = planted({0: (4, 40), 9: (10, 6)})
    stream[11:17, 9] *= -1
    assert (9, 10, 6, "secondary") in rows(sink_levels(stream))


def test_a_token_aligned_outside_of_the_primary_layers_is_no_sink():
    stream = planted({0: (4, 10), 9: (2, 20)}, blocks=30)
    assert rows(sink_levels(stream)) == {(0, 4, 10, "primary"), (9, 4, 10, "secondary")}


def test_short_texts():
    assert rows(sink_levels(planted({0: (2, 6)}, blocks=12, tokens=1))) == {(0, 2, 6, "primary")}
    assert rows(sink_levels(planted({1: (2, 6), 0: (3, 2)}, blocks=12, tokens=2))) == {
        (1, 2, 6, "primary"),
        (0, 3, 2, "secondary"),
    }


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_planting_is_recovered(data):
    blocks = data.draw(st.integers(6, 50))
    start = data.draw(st.integers(0, blocks - 3))
    life = data.draw(st.integers(2, blocks - start))
    first = data.draw(st.integers(0, 2))
    periods = {first: (start, life)}
    for position in data.draw(st.sets(st.integers(3, 15), max_size=4)):
        begun = data.draw(st.integers(start, start + life - 1))
        periods[position] = (begun, data.draw(st.integers(1, start + life - begun)))
    result = sink_levels(planted(periods, blocks=blocks, tokens=16, width=128, seed=data.draw(st.integers(0, 99))))
    assert {row[:3] for row in rows(result)} == {(p, s, n) for p, (s, n) in periods.items()}
    assert float(result.chance) == 0


def test_batches_and_padding_leave_every_text_its_levels():
    one = planted({0: (2, 8), 5: (4, 3)}, blocks=12, tokens=9, seed=1)
    two = planted({1: (3, 7), 4: (5, 2), 6: (5, 4)}, blocks=12, tokens=7, seed=2)
    alone = [rows(sink_levels(stream)) for stream in (one, two)]
    for side in ("left", "right"):
        batch = torch.zeros(13, 2, 9, 256)
        mask = torch.ones(2, 9, dtype=torch.bool)
        at = slice(2, 9) if side == "left" else slice(0, 7)
        batch[:, 1] = two[:, 1, None]  # padding that looks like the primary sink
        batch[:, 0], batch[:, 1, at] = one, two
        mask[1] = False
        mask[1, at] = True
        result = sink_levels(batch, mask=mask)
        table = result.frame()
        assert list(table.columns) == ["sequence", "position", "start", "lifetime", "kind"]
        for s in (0, 1):
            part = table[table["sequence"] == s].drop(columns="sequence")
            assert set(map(tuple, part.itertuples(index=False))) == alone[s]
        assert result.strength.tolist() == pytest.approx(
            [float(sink_levels(stream).strength) for stream in (one, two)], rel=1e-6
        )


def test_levels_are_counted():
    batch = torch.stack(
        [planted({0: (2, 8), 5: (4, 3), 7: (4, 3)}, blocks=12), planted({0: (2, 8), 9: (4, 3)}, blocks=12)], 1
    )
    table = sink_levels(batch).levels()
    assert table.to_dict("records") == [
        {"start": 4, "lifetime": 3, "kind": "secondary", "tokens": 3, "sequences": 2},
        {"start": 2, "lifetime": 8, "kind": "primary", "tokens": 2, "sequences": 2},
    ]


def test_chance_tells_a_cone_from_a_direction():
    """Where all tokens point the same way, aligning with the primary sink says nothing, and the null says so."""
    stream = planted({0: (2, 8)}, blocks=12, tokens=10)
    cone = stream.clone()
    cone[1:, 1:] += 10 * torch.randn(256, generator=torch.Generator().manual_seed(8))
    assert float(sink_levels(stream).chance) == 0
    assert float(sink_levels(cone).chance) == 8
    everyone = stream + NORM * torch.ones(256) / 4
    assert sink_levels(everyone).chance.isnan().all()  # every token is a sink: none is ordinary


def test_a_run_gives_what_its_streams_give():
    model = wb.load("tiny-softmax")
    reads = [f"blocks.{layer}.hook_resid_post" for layer in range(4)]
    texts = ["Mary and John went to the store .", "John gave a book to"]
    with torch.no_grad():
        run = model.run(texts, read=["hook_embed", *reads])
        single = [model.run(text, read=reads) for text in texts]
    result = sink_levels(run)
    stack = torch.stack([run.acts["hook_embed"], *(run.acts[name] for name in reads)])
    again = sink_levels(stack, mask=run.tokens.mask)
    columns = ["sequence", "position", "start", "lifetime", "kind"]
    assert result.frame()[columns].equals(again.frame())
    starts = result.frame().query("position == 0")
    assert starts["token"].tolist() == ["<bos>", "<bos>"]
    for s, alone in enumerate(single):
        part = result.frame().query(f"sequence == {s}")[columns[1:]].reset_index(drop=True)
        assert part.equals(sink_levels(alone).frame()[columns[1:]])


def test_half_precision_is_read_as_it_is():
    stream = planted({0: (2, 8), 5: (4, 3)}, blocks=12)
    assert rows(sink_levels(stream.bfloat16())) == rows(sink_levels(stream.double()))


def test_undefined_and_refused():
    flat = sink_levels(torch.ones(5, 4, 8))
    assert not len(flat.frame())
    assert "no primary sink" in flat.undefined["sequence 0"]
    assert not len(flat.levels())
    weak = sink_levels(torch.randn(9, 12, 64, generator=torch.Generator().manual_seed(0)))
    assert "hardly a token of its own" in weak.undefined["sequence 0"]
    assert not len(weak.frame())
    both = torch.stack([planted({0: (2, 8), 5: (4, 3)}, blocks=12), torch.randn_like(planted({}, blocks=12))], 1)
    assert sink_levels(both).frame()["sequence"].tolist() == [0, 0]
    run = Run(Tokens.of(torch.arange(4)), acts={Site("resid_post", 1): torch.randn(1, 4, 8)})
    with pytest.raises(WorkbenchError, match="block 0 was not read"):
        sink_levels(run)
    with pytest.raises(WorkbenchError, match="hook_resid_post"):
        sink_levels(Run(Tokens.of(torch.arange(4))))
    with pytest.raises(WorkbenchError, match=r"\[L \+ 1, T, D\]"):
        sink_levels(torch.zeros(4, 8))
    with pytest.raises(Refused, match="not finite"):
        sink_levels(torch.full((4, 3, 8), float("inf")))
    for wrong in ({"threshold": 2.0}, {"short": 0.9}, {"candidates": 0}, {"mask": torch.ones(1, 7)}):
        with pytest.raises(WorkbenchError):
            sink_levels(torch.randn(4, 3, 8), **wrong)


def test_it_is_drawn_and_kept(tmp_path):
    result = sink_levels(planted({0: (2, 8), 5: (4, 3)}, blocks=12))
    assert result.plot().has_data()
    saved = wb.load_result(result.save(tmp_path / "levels"))
    assert saved.frame().equals(result.frame())
    assert np.array_equal(saved.tensors["span"], result.span)
