import math

import pytest
import torch

import workbench as wb
from workbench.errors import UnknownName, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap, GatedMap
from workbench.models.protocol import Tokens
from workbench.patterns.softmax import SoftmaxMap
from workbench.probes.examples import random_rows
from workbench.probes.heads.token_classes import CLASSES, token_classes
from workbench.run import Maps, Provenance, Run

TEXTS = ["<bos>", "Mary", "Ġsaw", "▁12", ",", "a", ".", "Mary", "Ċ", "34", "##ing", "Ġ(,"]
IDS = {text: i for i, text in enumerate(dict.fromkeys(TEXTS))}


def run_of(maps, texts=(tuple(TEXTS),), mask=None):
    ids = torch.tensor([[IDS.get(t, 0) for t in row] for row in texts])
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    tokens = Tokens(ids, real, tuple(map(tuple, texts)))
    return Run(tokens, maps=Maps(maps), provenance=Provenance("by hand"))


def at(table, name, head=0, layer=0):
    return float(table.values[name][layer][head])


def test_classes_are_read_off_the_texts():
    found = {name: [t for t in TEXTS if rule(t)] for name, rule in CLASSES.items()}
    assert found == {
        "delimiter": [",", ".", "Ġ(,"],
        "newline": ["Ċ"],
        "digit": ["▁12", "34"],
        "capitalised": ["Mary", "Mary"],
        "special": ["<bos>"],
    }
    assert not any(rule("") for rule in CLASSES.values())
    assert CLASSES["special"]("[SEP]")
    assert CLASSES["special"]("<|endoftext|>")
    assert not CLASSES["special"]("[a]")
    assert CLASSES["newline"]("<0x0A>")
    assert not CLASSES["special"]("<0x0A>")


def test_a_literal_loop_gives_the_same_shares():
    rows = random_rows(1, 3, len(TEXTS), seed=3)
    found = token_classes(run_of({0: AttentionMap.from_dense(rows)}))
    for name in (*CLASSES, "same"):
        for head in range(3):
            shares, even = [], []
            for q in range(len(TEXTS)):
                keys = [k for k in range(q + 1) if CLASSES.get(name, lambda t: False)(TEXTS[k])]
                if name == "same":
                    keys = [k for k in range(q) if TEXTS[k] == TEXTS[q]]
                if keys:
                    shares.append(sum(float(rows[0, head, q, k]) for k in keys))
                    even.append(len(keys) / (q + 1))
            assert at(found, name, head) == pytest.approx(sum(shares) / len(shares)), name
            assert at(found, f"{name}_even", head) == pytest.approx(sum(even) / len(even)), name


def planted(texts, wanted):
    rows = torch.zeros(1, 1, len(texts), len(texts), dtype=torch.float64)
    for q in range(len(texts)):
        keys = [k for k in range(q + 1) if wanted(q, k)] or [0]
        rows[0, 0, q, keys] = 1 / len(keys)
    return AttentionMap.from_dense(rows)


def test_heads_that_look_at_a_class_stand_out_of_their_null():
    texts = ["<bos>", *(t for i in range(12) for t in ("Mary", ",", "walked", "7"))]
    for i, t in enumerate(texts):
        IDS.setdefault(t, 50 + i)
    delimiter = planted(texts, lambda q, k: texts[k] == ",")
    same = planted(texts, lambda q, k: k < q and texts[k] == texts[q])
    sink = planted(texts, lambda q, k: k == 0)
    found = token_classes(run_of({0: delimiter, 1: same, 2: sink}, (tuple(texts),)))
    assert at(found, "delimiter") == 1
    assert found.null["delimiter"][0][0] < 0.4
    assert at(found, "delimiter_z") > 5
    assert at(found, "digit") == 0
    assert at(found, "digit_z") < -1.5
    assert at(found, "same", layer=1) == 1
    assert at(found, "same_z", layer=1) > 5
    # a sink looks at a place: its class is that of the first token alone, and no shuffle can tell
    assert at(found, "special", layer=2) == 1
    assert found.null["special"][2][0] == 1
    assert math.isnan(at(found, "special_z", layer=2))
    assert found.undefined["special_z"] == "only first tokens are of this class"
    assert at(found, "newline") != at(found, "newline")
    assert found.undefined["newline"] == "no query sees a key of this class"


def test_even_attention_scores_what_even_says_and_has_no_z():
    n = len(TEXTS)
    uniform = torch.ones(n, n, dtype=torch.float64).tril()
    found = token_classes(run_of({0: AttentionMap.from_dense((uniform / uniform.sum(-1, keepdim=True))[None, None])}))
    for name in ("delimiter", "digit", "same"):
        assert at(found, name) == pytest.approx(at(found, f"{name}_even"))


def test_padding_and_batches_change_nothing():
    weights = torch.randn(2, 2, 15, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    one = SoftmaxMap(weights[:1, :, 3:], weights[1:, :, 3:], mask=Mask(causal=True))
    real = torch.tensor([[False] * 3 + [True] * 12])
    both = torch.cat([weights[:1], weights[:1]]), torch.cat([weights[1:], weights[1:]])
    two = SoftmaxMap(*both, mask=Mask(causal=True, keys=real.expand(2, -1)))
    left = tuple(["Mary"] * 3 + TEXTS)
    plain = token_classes(run_of({0: one}))
    padded = token_classes(run_of({0: two}, (left, left), real.expand(2, -1)))
    for name in (*CLASSES, "same"):
        torch.testing.assert_close(padded.values[name][0], plain.values[name][0], equal_nan=True)
        torch.testing.assert_close(padded.values[f"{name}_even"][0], plain.values[f"{name}_even"][0], equal_nan=True)
    assert plain.low["digit"][0].isnan().all()
    assert padded.low["digit"][0].tolist() == pytest.approx(padded.values["digit"][0].tolist())


def test_rows_may_come_in_any_chunks_and_from_a_fused_kernel(monkeypatch):
    q, k = (torch.randn(1, h, 12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(h)) for h in (4, 2))
    amap = SoftmaxMap(q, k, mask=Mask(causal=True, window=6))
    whole = token_classes(run_of({0: amap})).frame()
    monkeypatch.setattr("workbench.probes.heads.token_classes._CHUNK", 100)
    dense = AttentionMap.from_dense(amap.dense(), kv_heads=2)
    dense.mask = amap.mask
    chunked = token_classes(run_of({0: dense})).frame()
    for column in whole.columns:
        assert chunked[column].tolist() == pytest.approx(whole[column].tolist(), nan_ok=True)


def test_gates_groups_and_classes_of_your_own():
    rows = random_rows(1, 4, len(TEXTS))
    inner = AttentionMap.from_dense(rows, kv_heads=2)
    gated = GatedMap(inner, torch.full((1, 4, len(TEXTS)), 0.5, dtype=torch.float64))
    plain, acting, raw = (
        token_classes(run_of({0: inner})),
        token_classes(run_of({0: gated})),
        token_classes(run_of({0: gated}), raw=True),
    )
    for name in ("digit", "digit_even"):
        torch.testing.assert_close(acting.values[name][0], plain.values[name][0] / 2)
        torch.testing.assert_close(raw.values[name][0], plain.values[name][0])
    mean = token_classes(run_of({0: inner}), per="kv")
    torch.testing.assert_close(mean.values["digit"][0], plain.values["digit"][0].view(2, 2).mean(1))
    members = torch.zeros(len(IDS) + 60, dtype=torch.bool)
    members[IDS["a"]] = True
    own = token_classes(run_of({0: inner}), classes={"article": members, "long": lambda t: len(t) > 3})
    assert set(own.null) == {"article", "long"}
    by_hand = [float(rows[0, 0, q, 5]) for q in range(5, len(TEXTS))]
    assert at(own, "article") == pytest.approx(sum(by_hand) / len(by_hand))


def test_what_cannot_be_answered_is_refused():
    run = run_of({0: AttentionMap.from_dense(random_rows(1, 1, len(TEXTS)))})
    with pytest.raises(UnknownName, match="digit, capitalised, special, same"):
        token_classes(run, classes=["verb"])
    with pytest.raises(WorkbenchError, match="no class asked for"):
        token_classes(run, classes=())
    with pytest.raises(WorkbenchError, match="tokens of a run"):
        token_classes([run])
    signed = torch.randn(1, 1, len(TEXTS), len(TEXTS)).tril()
    with pytest.raises(WorkbenchError, match="signed"):
        token_classes(run_of({0: AttentionMap.from_dense(signed)}))
    plain = Run(Tokens.of(torch.arange(12)[None]), maps=run.maps)
    with pytest.raises(WorkbenchError, match="no texts of its tokens"):
        token_classes(plain, classes="digit")
    assert token_classes(plain, classes="same").undefined["same"].startswith("no query")
    with pytest.raises(WorkbenchError, match="one bool per token id"):
        token_classes(run, classes={"x": torch.zeros(3, dtype=torch.bool)})


def test_a_bundled_model():
    model = wb.load("tiny-softmax")
    run = model.run("Mary gave John a book , and John gave Mary a drink .", maps=wb.capture())
    table = token_classes(run, tokenizer=model.tokenizer)
    assert table.values["special"][0].isfinite().all()
    assert len(table.frame()) == 32
