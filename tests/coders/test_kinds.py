"""Every kind of coder: its code against a literal one, its gradients, what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workbench.coders.catalogue import coder_kinds, make_coder
from workbench.coders.code import Code
from workbench.coders.coder import Coder, Progress
from workbench.coders.kinds.jumprelu import _JumpBoth, jump, step
from workbench.errors import UnknownName, WorkbenchError

SPARSE = ("topk", "batchtopk", "matryoshka")
D, F, N, K = 6, 15, 9, 3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def coder_of(kind: str, seed: int = 0, **arguments: object) -> Coder:
    extra = {"k": K} if kind in SPARSE else {}
    coder = make_coder(kind, D, F, **extra, **arguments).double()
    with torch.no_grad():
        for i, parameter in enumerate(coder.parameters()):
            parameter.copy_(0.3 * normal(*parameter.shape, seed=100 * seed + i))
    return coder


def now(dead: int = 0) -> Progress:
    silent = torch.zeros(F, dtype=torch.int64)
    silent[:dead] = 100
    return Progress(step=5, steps=10, silent=silent, dead_after=100)


def literal(coder: Coder, x: Tensor) -> Tensor:
    """The code, feature by feature."""
    coder = coder.requires_grad_(False)
    out = torch.zeros(len(x), F, dtype=x.dtype)
    for n, row in enumerate(x):
        pre = (row - coder.b_dec) @ coder.W_enc + coder.b_enc
        order = sorted(range(F), key=lambda i: -float(pre[i]))
        for i in range(F):
            p = pre[i]
            if coder.kind == "topk":
                out[n, i] = p if i in order[:K] and p > 0 else 0
            elif coder.kind in SPARSE:
                out[n, i] = p if p > coder.threshold and p > 0 else 0
            elif coder.kind.startswith("jumprelu"):
                out[n, i] = p if p > coder.log_threshold[i].exp() else 0
            elif coder.kind == "gated":
                raw = (row - coder.b_dec) @ (coder.W_enc[:, i] * coder.r_mag[i].exp()) + coder.b_mag[i]
                out[n, i] = max(raw, torch.zeros_like(raw)) if p > 0 else 0
            else:
                out[n, i] = max(p, torch.zeros_like(p))
    return out


@pytest.mark.parametrize("kind", coder_kinds())
def test_code_and_output_are_the_definition(kind: str) -> None:
    coder, x = coder_of(kind), normal(N, D, seed=7)
    if kind in ("batchtopk", "matryoshka"):
        coder.threshold.fill_(0.2)
    wanted = literal(coder, x)
    assert 0 < (wanted > 0).double().mean() < 1
    torch.testing.assert_close(coder.encode(x), wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(coder.sparse(x).dense(), wanted, rtol=1e-10, atol=1e-12)
    output = wanted @ coder.W_dec + coder.b_dec
    torch.testing.assert_close(coder(x), output, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(coder.decode(coder.sparse(x)), output, rtol=1e-10, atol=1e-12)
    assert coder.encode(x.view(3, 3, D)).shape == (3, 3, F)


@pytest.mark.parametrize("kind", [k for k in coder_kinds() if not k.startswith("jumprelu")])
@pytest.mark.parametrize("dead", [0, 5])
def test_gradients_of_the_loss_are_its_slopes(kind: str, dead: int) -> None:
    """Against central differences, away from kinks. What the loss takes as given (AuxK's error, the gate's decoder) moves with
    the decoder's parameters, so those are left out where it does."""
    coder, x = coder_of(kind), normal(N, D, seed=3)
    coder.objective(x, x, now(dead))  # p-anneal fits its factor once
    kept = {k: v.clone() for k, v in coder.state_dict().items()}

    def loss() -> Tensor:
        coder.load_state_dict(
            kept | {k: v for k, v in coder.state_dict().items() if k in dict(coder.named_parameters())}
        )
        return coder.objective(x, x, now(dead)).loss

    grads = torch.autograd.grad(loss(), list(coder.parameters()))
    checked = 0
    for (name, parameter), grad in zip(coder.named_parameters(), grads, strict=True):
        given = kind == "gated" or (kind in SPARSE and dead > 0)
        if given and name not in ("W_enc", "b_enc", "r_mag", "b_mag"):
            continue
        if kind in SPARSE and dead and name in ("W_enc", "b_enc"):
            continue  # the given error moves with them too
        flat = parameter.data.view(-1) if parameter.is_contiguous() else parameter.data.t().reshape(-1)
        for place in range(0, len(flat), max(1, len(flat) // 7)):
            index = divmod(place, parameter.shape[-1]) if parameter.ndim == 2 else (place,)
            slopes = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter[index] += sign * 1e-6
                slopes.append(sign * float(loss().detach()) / 2e-6)
                with torch.no_grad():
                    parameter[index] -= sign * 1e-6
            assert float(grad[index]) == pytest.approx(sum(slopes), rel=1e-4, abs=1e-6), (name, index)
            checked += 1
    assert checked or (kind in SPARSE and dead)


def test_thresholds_get_the_slope_of_the_smoothed_loss() -> None:
    """The straight-through gradient is that of the loss averaged over a shift u of the pre-activations, uniform on
    [-eps/2, eps/2]: jump(p + u) with the value it passes held at theta near the border, and the count 1[p + u > theta]."""
    eps, x, theta = 0.4, normal(400, 1, seed=1), torch.full((1,), 0.35, dtype=torch.float64)
    shifts = (torch.arange(4001, dtype=torch.float64) + 0.5) / 4001 * eps - eps / 2
    p = x + shifts

    for of, function in (("jump", jump), ("step", step)):
        leaf = theta.clone().requires_grad_()
        function(x, leaf, eps).sum().backward()
        height = float(theta) if of == "jump" else 1.0  # what passes at the border
        above, below = (float((p > theta + shift).double().mean(1).sum()) * height for shift in (0.02, -0.02))
        slope = (above - below) / 0.04
        assert leaf.grad is not None
        assert float(leaf.grad) == pytest.approx(slope, rel=0.1), of
        assert float(leaf.grad) < -1


def test_jump_passes_gradients_to_what_is_above_alone() -> None:
    pre = torch.tensor([[0.2, 0.5, 2.0]], dtype=torch.float64, requires_grad=True)
    theta = torch.full((3,), 0.4, dtype=torch.float64)
    jump(pre, theta, 0.5).sum().backward()
    assert pre.grad is not None
    assert pre.grad.tolist() == [[0, 1, 1]]


@pytest.mark.parametrize("kind", SPARSE[1:])
def test_a_batch_shares_its_places(kind: str) -> None:
    coder, x = (
        coder_of(kind),
        normal(40, D, seed=5) * torch.rand(40, 1, generator=torch.Generator().manual_seed(0)).mul(5),
    )
    code, cut = coder.of_batch(x)
    pre = torch.relu(coder.pre(x))
    wanted = pre.flatten().topk(40 * K).values.min()
    assert cut is not None
    torch.testing.assert_close(cut, wanted)
    torch.testing.assert_close(code.dense(), pre * (pre >= wanted))
    widths = code.l0()
    assert int(widths.sum()) == 40 * K
    assert int(widths.max()) > K > int(widths.min())


def test_threshold_becomes_the_smallest_kept() -> None:
    """While rows have places of their own every eighth step is looked at; then every step."""
    coder, x = coder_of("batchtopk", by_row=0.5), normal(40, D, seed=5)
    silent, first, second = now().silent, float(coder.of_batch(x)[1]), float(coder.of_batch(2 * x)[1])
    coder.objective(x, x, Progress(0, 40, silent, 100))
    assert float(coder.threshold) == pytest.approx(first)
    coder.objective(2 * x, 2 * x, Progress(1, 40, silent, 100))
    assert float(coder.threshold) == pytest.approx(first)
    coder.objective(2 * x, 2 * x, Progress(8, 40, silent, 100))
    assert float(coder.threshold) == pytest.approx((first + second) / 2)
    coder.objective(x, x, Progress(20, 40, silent, 100))
    assert float(coder.threshold) == pytest.approx((first + second) / 2 * 20 / 21 + first / 21)


def test_what_only_fills_places_counts_as_silent() -> None:
    coder, x = coder_of("batchtopk", by_row=1.0), normal(40, D, seed=5)
    terms = coder.objective(x, x, Progress(0, 40, now().silent, 100))
    code = coder._largest(x, K).dense()
    assert terms.active.tolist() == (code >= coder.threshold).logical_and(code > 0).sum(0).tolist()
    assert terms.active.sum() < (code > 0).sum()


def test_auxiliary_loss_reads_dead_features_alone() -> None:
    coder, x = coder_of("topk"), normal(N, D, seed=2)
    terms = coder.objective(x, x, now(dead=5))
    error = x - coder(x)
    pre = torch.relu(coder.pre(x)[:, :5])
    kept = pre * (pre >= pre.topk(min(3, 5), dim=1).values[:, -1:])
    found = (kept @ coder.W_dec[:5] - error).pow(2).sum(1).mean() * min(1, 5 / 3)
    torch.testing.assert_close(terms.parts["auxiliary"], found)
    torch.testing.assert_close(terms.loss, terms.parts["error"] + found / 32)
    assert "auxiliary" not in coder.objective(x, x, now()).parts


def test_multi_topk_adds_the_output_of_four_times_k() -> None:
    coder, x = coder_of("topk", multi=0.125), normal(N, D, seed=2)
    pre = torch.relu(coder.pre(x))
    more = pre * (pre >= pre.topk(12, dim=1).values[:, -1:])
    wanted = (more @ coder.W_dec + coder.b_dec - x).pow(2).sum(1).mean()
    terms = coder.objective(x, x, now())
    torch.testing.assert_close(terms.loss, terms.parts["error"] + wanted / 8)


def test_matryoshka_explains_with_its_first_features() -> None:
    coder, x = coder_of("matryoshka", by_row=0.3, prefixes=(0.2, 1.0)), normal(N, D, seed=2)
    terms = coder.objective(x, x, now())
    code = coder.of_batch(x)[0].dense()
    small, whole = (((code[:, :m] @ coder.W_dec[:m] + coder.b_dec) - x).pow(2).sum(1).mean() for m in (3, F))
    torch.testing.assert_close(terms.loss, (small + whole) / 2)
    torch.testing.assert_close(terms.parts["error"], whole)


def test_p_anneal_bends_without_a_jump() -> None:
    coder, x = coder_of("p-anneal"), normal(N, D, seed=2)
    f = coder.encode(x)
    sizes = []
    for at in (0, 5, 6, 9):
        moment = Progress(at, 10, now().silent, 100)
        sizes.append(float(coder.penalty(f, moment).detach()))
        size = f * coder.decoder_norms()
        literal_sum = (size ** coder.power(moment)).where(size > 0, 0).sum(1).mean()
        torch.testing.assert_close(coder.penalty(f, moment), coder.factor * literal_sum)
    assert sizes == pytest.approx([sizes[0]] * 4)
    assert coder.power(Progress(0, 10, now().silent, 100)) == 1.0
    assert coder.power(Progress(10, 10, now().silent, 100)) == pytest.approx(0.2)


@pytest.mark.parametrize("kind", coder_kinds())
@pytest.mark.parametrize("shape", ["autoencoder", "transcoder", "crosscoder"])
def test_folding_a_scale_changes_nothing(kind: str, shape: str) -> None:
    arguments = {
        "autoencoder": {},
        "transcoder": {"d_out": 4, "skip": True},
        "crosscoder": {"reads": (2, 4), "writes": (2, 4)},
    }
    coder, x = coder_of(kind, **arguments[shape]), normal(N, D, seed=4)
    if kind in ("batchtopk", "matryoshka"):
        coder.threshold.fill_(0.3)
    one = torch.ones(D, dtype=torch.float64)
    scale_in = {"autoencoder": 3 * one, "transcoder": 3 * one, "crosscoder": torch.cat([2 * one[:2], 5 * one[2:]])}[
        shape
    ]
    scale_out = 0.5 * torch.ones(4, dtype=torch.float64) if shape == "transcoder" else scale_in
    wanted, code = coder(x * scale_in) / scale_out, coder.encode(x * scale_in)
    coder.fold(scale_in, scale_out)
    torch.testing.assert_close(coder(x), wanted, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(coder.encode(x) * scale_in.mean(), code, rtol=1e-9, atol=1e-12)


def test_what_is_wrong_is_told() -> None:
    with pytest.raises(UnknownName, match="kind of coder 'topkk'.*nearest: topk"):
        make_coder("topkk", 4, 8)
    with pytest.raises(UnknownName, match="option of relu coders 'k'"):
        make_coder("relu", 4, 8, k=3)
    with pytest.raises(WorkbenchError, match="coder topk, option k: .*got 'many'"):
        make_coder("topk", 4, 8, k="many")
    with pytest.raises(WorkbenchError, match="1 to 8; got 9"):
        make_coder("topk", 4, 8, k=9)
    with pytest.raises(WorkbenchError, match="features of a coder is a whole number from 1; got 0"):
        make_coder("relu", 4, 0)
    with pytest.raises(WorkbenchError, match=r"reads rows of width 4; got \[2, 5\]"):
        make_coder("relu", 4, 8).encode(torch.zeros(2, 5))
    with pytest.raises(WorkbenchError, match=r"has 8 features; got \[2, 7\]"):
        make_coder("relu", 4, 8).decode(torch.zeros(2, 7))
    with pytest.raises(WorkbenchError, match="growing shares"):
        make_coder("matryoshka", 4, 8, k=2, prefixes=(0.5, 0.25, 1.0))
    with pytest.raises(WorkbenchError, match="do not add up"):
        make_coder("relu", 4, 8, reads=(1, 2))


def test_codes_turn_dense_and_back() -> None:
    dense = torch.tensor([[0.0, 2.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0]])
    code = Code.of(dense)
    assert code.indices.shape == (3, 2)
    assert torch.equal(code.dense(), dense)
    assert code.counts().tolist() == [1, 1, 0, 1]
    assert code.l0().tolist() == [2, 0, 1]
    assert Code.of(torch.zeros(2, 4)).indices.tolist() == [[-1], [-1]]


def test_the_wide_jump_also_passes_gradients_to_what_is_near() -> None:
    pre = torch.tensor([[0.2, 0.1, 0.5, 2.0]], dtype=torch.float64, requires_grad=True)
    theta = torch.full((4,), 0.4, dtype=torch.float64, requires_grad=True)
    output = _JumpBoth.apply(pre, theta, 0.5)
    assert output.tolist() == [[0, 0, 0.5, 2.0]]
    output.sum().backward()
    assert pre.grad is not None
    assert theta.grad is not None
    assert pre.grad.tolist() == [[1, 0, 1, 1]]
    torch.testing.assert_close(theta.grad, torch.tensor([-0.8, 0, -0.8, 0], dtype=torch.float64))
