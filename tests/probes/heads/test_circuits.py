import math
from dataclasses import replace

import pytest
import torch
from builders import hugging_face
from natives import CONFIG, VARIANTS, make

import workbench as wb
from workbench.datasets.words import words
from workbench.errors import Refused, WorkbenchError
from workbench.probes.heads.circuits import eigenvalue_share, weight_circuits
from workbench.probes.heads.weights import embedding, head_weights, unembedding

MEASURES = ("copying", "copied", "copied_top", "suppressed", "matching", "matched")


def dense(model, layer, head, top, lowest):
    """The V x V matrices, and what is asked of them, literally."""
    found, w = head_weights(model, layer), embedding(model).double()
    g = head // (len(found.q) // len(found.k))
    ov = w @ found.v[g] @ found.o[head] @ unembedding(model).matrix
    qk = w @ found.q[head] @ found.k[g].T @ (w - w.mean(0)).T
    ranks = [sorted(range(len(w)), key=lambda t, row=row: -float(row[t])).index(i) for i, row in enumerate(ov)]
    seek = [int(row.argmax()) == i for i, row in enumerate(qk)]

    def share(hits):
        return sum(hits) / len(hits)

    def eigen(matrix):
        values = torch.linalg.eigvals(matrix)
        return float(values.sum().real / values.abs().sum())

    return {
        "copying": eigen(ov),
        "copied": share([r == 0 for r in ranks]),
        "copied_top": share([r < top for r in ranks]),
        "suppressed": share([r >= len(w) - lowest for r in ranks]),
        "matching": eigen(qk),
        "matched": share(seek),
    }


@pytest.mark.parametrize(
    "model", [lambda: make(), lambda: hugging_face("gpt2").model, lambda: hugging_face("llama").model]
)
def test_low_rank_forms_equal_the_dense_matrices(model):
    model = model()
    table = weight_circuits(model, top=3, lowest=4)
    for layer in range(2):
        for head in range(model.shape.heads):
            wanted = dense(model, layer, head, 3, 4)
            for name in MEASURES:
                assert float(table.values[name][layer][head]) == pytest.approx(wanted[name], abs=1e-5), name


def test_copying_and_suppressing_heads_are_told_by_their_sign():
    """Head 0 writes the token it reads, head 1 takes it away, head 2 writes another; head 3 asks for its own token."""
    vocab = 40
    config = replace(
        CONFIG, heads=4, kv_heads=None, width=vocab, head_width=vocab, vocab=vocab, norm="none", positions="none"
    )
    model = make(config)
    eye, zero = torch.eye(vocab, dtype=torch.float64), torch.zeros(vocab, vocab, dtype=torch.float64)
    attn = model.net.blocks[0].attn
    with torch.no_grad():
        model.net.W_E.copy_(eye)
        model.net.W_U.copy_(eye)
        attn.W_V.copy_(torch.stack([eye, eye, eye, zero]))
        attn.W_O.copy_(torch.stack([eye, -eye, eye.roll(1, 1), eye]))
        attn.W_Q.copy_(torch.stack([eye, -eye, zero, eye]))
        attn.W_K.copy_(torch.stack([eye] * 4))
    found = weight_circuits(model, top=3, lowest=4)
    value = {name: found.values[name][0].tolist() for name in MEASURES}
    # the mean over the vocabulary is taken out: one of the 40 eigenvalues is gone
    assert value["copying"][:3] == pytest.approx([1, -1, -1 / 39], abs=1e-9)
    assert value["copied"][:3] == [1, 0, 0]
    assert value["suppressed"][1] == 1
    assert value["matching"][0] == pytest.approx(1)
    assert value["matching"][1] == pytest.approx(-1)
    assert value["matched"][0] == value["matched"][3] == 1
    assert math.isnan(value["copying"][3])
    assert math.isnan(value["copied"][3])
    assert math.isnan(value["matching"][2])
    assert "write to no logit" in found.undefined["copying"]
    assert found.null["copied"][0][0] < 0.2
    assert found.values["copying_z"][0][0] > 3
    assert found.values["copying_z"][0][1] < -3


def test_the_compiled_induction_head_copies_and_no_other_head_writes_to_the_logits():
    model = wb.load("compiled-induction")
    found = weight_circuits(model, words=words("symbols"))
    copying = torch.stack(list(found.values["copying"].values()))
    assert float(copying[1, 2]) == pytest.approx(1.0, abs=1e-4)
    assert copying.isfinite().sum() == 1
    assert found.values["copied"][1][2] == 1.0
    assert found.values["copying_z"][1][2] > 20
    assert found.values["previous"][0][1] == 1.0
    assert found.null["previous"][0][1] < 0.1


def test_a_random_network_is_near_its_null():
    model = make(replace(CONFIG, layers=3, width=32, head_width=8, vocab=120, kv_heads=None))
    found = weight_circuits(model, shuffles=24)
    for name in ("copying", "copied_top", "suppressed", "matching"):
        z = torch.stack(list(found.values[f"{name}_z"].values())).flatten()
        assert z.abs().median() < 1.5, name
        assert z.abs().max() < 6, name


def test_numbers_per_group_of_heads():
    model = make()
    each, mean, largest = (weight_circuits(model, per=per) for per in ("query", "kv", "kv-max"))
    pairs = each.values["copying"][1].view(2, 2)
    torch.testing.assert_close(mean.values["copying"][1], pairs.mean(1))
    torch.testing.assert_close(largest.values["copying"][1], pairs.amax(1))
    assert len(mean.frame()) == 4


def test_the_order_of_the_vocabulary_does_not_matter():
    model = make(VARIANTS["learned"])
    chosen = list(range(22, 4, -1))
    a = weight_circuits(model, words=chosen, top=2, lowest=2)
    b = weight_circuits(model, words=sorted(chosen), top=2, lowest=2)
    for name in MEASURES:
        torch.testing.assert_close(a.values[name][1], b.values[name][1])
    assert a.values["previous"][0].isfinite().all()


def test_eigenvalue_share():
    assert float(eigenvalue_share(torch.tensor([[0.0, 1], [1, 0]]))) == pytest.approx(0)
    assert float(eigenvalue_share(torch.tensor([[0.0, -1], [1, 0]]))) == pytest.approx(0)
    assert float(eigenvalue_share(torch.diag(torch.tensor([3.0, -1])))) == pytest.approx(0.5)
    assert eigenvalue_share(torch.zeros(2, 2)).isnan()


def test_what_cannot_be_asked_is_refused():
    with pytest.raises(Refused, match="does not predict"):
        weight_circuits(hugging_face("bert").model)
    with pytest.raises(WorkbenchError, match="shuffles is at least 2; got 1"):
        weight_circuits(make(), shuffles=1)
    with pytest.raises(WorkbenchError, match="below the 23 tokens"):
        weight_circuits(make(), lowest=23)
    with pytest.raises(Refused, match="native and Hugging Face"):
        weight_circuits(type("Other", (), {"name": "x", "shape": make().shape})())
