from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.kernels import softmax_backward as operator
from workbench.kernels.backward.cpu import blocked_backward
from workbench.kernels.flash_attention import flash_attention
from workbench.kernels.mask import Mask
from workbench.kernels.pairs import chunks
from workbench.kernels.scores import Relative, Scores
from workbench.kernels.softmax_backward import softmax_backward
from workbench.kernels.stats.reference import dense_attention, pool

Budget = Callable[[Tensor, Sequence[Tensor], Tensor], None]
B, H, G, E, V = 2, 2, 1, 16, 12


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def block_mask(n: int, side: int) -> Mask:
    blocks = rand(9, 1, H, -(-n // side), -(-n // side)) > -0.3
    blocks[:, :, 0] = False
    return Mask(causal=True, blocks=blocks, side=side)


OPTIONS: dict[str, Callable[[int], dict[str, Any]]] = {
    "causal": lambda n: {},
    "window": lambda n: {"mask": Mask(causal=True, window=40)},
    "prefix": lambda n: {"mask": Mask(causal=True, prefix=52)},
    "two-sided window and prefix": lambda n: {"mask": Mask(window=50, prefix=9)},
    "padding": lambda n: {"mask": Mask(causal=True, keys=rand(1, B, n) > -0.5, queries=rand(7, B, n) > -0.5)},
    "documents": lambda n: {"mask": Mask(causal=True, documents=(torch.arange(n) // 30)[None])},
    "dense": lambda n: {"mask": Mask(dense=rand(2, 1, H, n, n) > 0)},
    "blocks": lambda n: {"mask": block_mask(n, 12)},
    "blocks as large as tiles": lambda n: {"mask": block_mask(n, 32)},
    "softcap and sink": lambda n: {"softcap": 3.0, "sink": rand(2, H)},
    "bias and softcap": lambda n: {"bias": rand(3, 1, H, n, n).where(rand(4, 1, H, n, n) > -1, -1e30), "softcap": 2.0},
    "relative": lambda n: {"bias": Relative(rand(3, H, 2 * n), -n), "mask": Mask()},
}
TERMS = ("output", "lse", "blocks", "received", "all", "all gated")


def problem(option: str, n: int, terms: str, block: int, dtype: torch.dtype) -> tuple[Scores, Tensor, dict[str, Any]]:
    """Scores, values and upstream gradients of what ``terms`` names."""
    shapes = ((H, E, 2), (G, E, 2), (G, V, 1))
    q, k, v = ((scale * rand(i, B, h, n, w)).to(dtype) for i, (h, w, scale) in enumerate(shapes))
    given = {"mask": Mask(causal=True), **OPTIONS[option](n)}
    if dtype == torch.float64:
        given = {name: part.double() if isinstance(part, Tensor) else part for name, part in given.items()}
    working = torch.float64 if dtype == torch.float64 else torch.float32
    m = -(-n // block)
    upstream: dict[str, Any] = {}
    if terms in ("output", "all", "all gated"):
        upstream |= {"d_out": rand(10, B, H, n, V).to(dtype)}
    if terms in ("lse", "all", "all gated"):
        upstream |= {"d_lse": rand(11, B, H, n).to(working)}
    if terms in ("blocks", "all", "all gated"):
        upstream |= {"d_blocks": rand(12, B, H, m, m).to(working), "block": block}
    if terms in ("received", "all", "all gated"):
        upstream |= {"d_received": rand(13, B, H, n).to(working)}
    if terms == "all gated":
        upstream |= {"gate": rand(14, B, H, n).to(working)}
    return Scores(q, k, **given), v, upstream


def differentiated(scores: Scores, v: Tensor, given: dict[str, Any], through_lse: bool) -> list[Tensor]:
    """dq, dk, dv and D by autograd through the dense formula; D as the gradient of a shift of the lse, which is -D."""
    q, k, v = (t.detach().clone().requires_grad_() for t in (scores.q, scores.k, v))
    dense = Scores(q, k, scores.mask, scores.scale, scores.softcap, scores.sink, scores.bias)
    _, natural = dense_attention(dense)
    shift = torch.zeros_like(natural).requires_grad_()
    lse = (natural if through_lse else natural.detach()) + shift
    p, _ = dense_attention(dense, lse)
    fold = q.shape[1] // k.shape[1]
    loss = (torch.where(torch.isneginf(lse), 0.0, lse) * given["d_lse"]).sum() if "d_lse" in given else 0.0
    if "d_out" in given:
        loss = loss + (p @ v.to(p).repeat_interleave(fold, 1) * given["d_out"]).sum()
    gated = p * given["gate"][..., None] if "gate" in given else p
    if "d_blocks" in given:
        loss = loss + (pool(gated, given["block"], "sum") * given["d_blocks"]).sum()
    if "d_received" in given:
        loss = loss + (gated.sum(2) * given["d_received"]).sum()
    assert isinstance(loss, Tensor)
    found = torch.autograd.grad(loss, [q, k, v, shift], allow_unused=True)
    dq, dk, dv, d_shift = (
        torch.zeros_like(t) if g is None else g for g, t in zip(found, (q, k, v, shift), strict=True)
    )
    d = -d_shift
    if "d_lse" in given:  # the shift of a row that sees nothing was cut off above
        d = torch.where(torch.isneginf(natural), -given["d_lse"], d)
    return [dq, dk, dv, d]


def run(scores: Scores, v: Tensor, given: dict[str, Any], impl: str, through_lse: bool) -> list[Tensor]:
    """With the output and the lse of the form's own forward, whose roundings are those of the scores that it makes again."""
    options = {name: getattr(scores, name) for name in ("mask", "scale", "softcap", "sink", "bias")}
    forward = flash_attention(scores.q, scores.k, v, **options, impl=impl)
    if "d_out" in given:
        given = {**given, "v": v, "out": forward.output}
    dq, dk, dv, d = softmax_backward(scores, forward.lse, through_lse=through_lse, impl=impl, **given)
    assert (dv is None) == ("d_out" not in given)
    return [dq, dk, torch.zeros_like(v) if dv is None else dv, d]


@pytest.fixture(params=[2**20, 3000], ids=["one chunk", "many chunks"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(chunks, "CHUNK", request.param)
    return request.param


@pytest.mark.parametrize("through_lse", [True, False], ids=["lse computed", "lse given"])
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("option", OPTIONS)
def test_the_cpu_form_is_autograd_of_the_formula_in_float64(
    chunk: int, option: str, terms: str, through_lse: bool
) -> None:
    scores, v, given = problem(option, 61, terms, 7, torch.float64)
    expected = differentiated(scores, v, given, through_lse)
    got = run(scores, v, given, "cpu", through_lse)
    for name, one, other in zip(("dq", "dk", "dv", "D"), got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def within(
    option: str, n: int, terms: str, block: int, dtype: torch.dtype, impl: str, through_lse: bool, check: Budget
) -> None:
    scores, v, given = problem(option, n, terms, block, dtype)

    def exact(part: Any) -> Any:
        return part.double() if isinstance(part, Tensor) and part.is_floating_point() else part

    double = Scores(*(exact(part) for part in (scores.q, scores.k)), scores.mask, scores.scale, scores.softcap,
                    exact(scores.sink), exact(scores.bias))  # fmt: skip
    high = differentiated(double, v.double(), {name: exact(part) for name, part in given.items()}, through_lse)
    low = differentiated(scores, v, given, through_lse)
    got = run(scores, v, given, impl, through_lse)
    if impl == "triton" and terms == "output":  # D is then rowsum(dO * O), with the rounding of O
        p, _ = dense_attention(scores)
        rounded = (p @ v.to(p).repeat_interleave(H // G, 1)).to(v.dtype)
        low[3] = (rounded.to(p) * given["d_out"].to(p)).sum(-1)
    for one, plain, other in zip(got, low, high, strict=True):
        assert one.dtype == plain.dtype
        check(one, [plain], other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_the_cpu_form_stays_within_the_error_budget(
    option: str, dtype: torch.dtype, assert_within_budget: Budget
) -> None:
    within(option, 100, "all gated", 24, dtype, "cpu", True, assert_within_budget)


@pytest.mark.parametrize("option", OPTIONS)
def test_the_triton_form_stays_within_the_error_budget(option: str, assert_within_budget: Budget) -> None:
    within(option, 60, "all gated", 7, torch.float32, "triton", True, assert_within_budget)


@pytest.mark.parametrize("through_lse", [True, False], ids=["lse computed", "lse given"])
@pytest.mark.parametrize("terms", TERMS[:-1])
def test_the_triton_form_of_every_term(terms: str, through_lse: bool, assert_within_budget: Budget) -> None:
    within("softcap and sink", 40, terms, 32, torch.float32, "triton", through_lse, assert_within_budget)


@pytest.mark.parametrize("option", ["causal", "padding", "blocks"])
def test_the_triton_form_in_bfloat16(option: str, assert_within_budget: Budget) -> None:
    within(option, 130, "output", 1, torch.bfloat16, "triton", True, assert_within_budget)


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_flash_attention_differentiates_to_q_k_v_and_sink(impl: str) -> None:
    q, k, v = rand(0, 1, 4, 40, 16), rand(1, 1, 2, 40, 16), rand(2, 1, 2, 40, 8)
    sink, weight = rand(3, 4), rand(4, 1, 4, 6, 6)
    mask = Mask(causal=True, keys=torch.arange(40)[None] > 2)

    def gradients(form: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        inputs = [t.to(dtype).requires_grad_() for t in (q, k, v, sink)]
        found = flash_attention(
            *inputs[:3], sink=inputs[3], mask=mask, block=7, reduce=("sum", "mean", "abs"), impl=form
        )
        terms = [found.output.square().sum(), found.lse.sin().sum()]
        terms += [(found.blocks[name] * weight * i).sum() for i, name in enumerate(("sum", "mean", "abs"), 1)]
        return torch.autograd.grad(sum(terms[1:], terms[0]), inputs)

    high = gradients("reference", torch.float64)
    for one, other in zip(gradients(impl, torch.float32), high, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


def test_gradcheck_of_flash_attention() -> None:
    shapes = ((1, 2, 5, 3), (1, 1, 6, 3), (1, 1, 6, 2), (2,))
    q, k, v, sink = (rand(i, *shape).double().requires_grad_() for i, shape in enumerate(shapes))
    mask = Mask(causal=True, offset=1, blocks=torch.tensor([[[[True, True], [False, True]]]]), side=3)

    def call(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> tuple[Tensor, ...]:
        found = flash_attention(q, k, v, sink=sink, mask=mask, softcap=2.0, block=2, reduce=("sum", "mean"), impl="cpu")
        return found.output, found.lse, *found.blocks.values()

    assert torch.autograd.gradcheck(call, (q, k, v, sink))


def test_the_largest_weight_of_a_block_carries_no_gradient() -> None:
    q, k = rand(0, 1, 2, 9, 4).requires_grad_(), rand(1, 1, 1, 9, 4)
    for impl in ("reference", "cpu"):
        found = flash_attention(q, k, k, block=4, reduce=("sum", "max"), impl=impl)
        assert found.blocks["sum"].requires_grad
        assert not found.blocks["max"].requires_grad


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_what_hidden_keys_and_queries_hold_does_not_matter(impl: str, poison: float) -> None:
    q, k, v, d_out = rand(0, 2, 2, 9, 16), rand(1, 2, 1, 12, 16), rand(2, 2, 1, 12, 16), rand(3, 2, 2, 9, 16)
    real = torch.arange(12) >= torch.tensor([[0], [4]])
    seen = real & (torch.arange(12) < 9)  # causality hides the last keys from everyone
    mask = Mask(causal=True, keys=real, queries=real[:, :9])

    def gradients(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor) -> list[Tensor]:
        inputs = [t.clone().requires_grad_() for t in (q, k, v)]
        return list(torch.autograd.grad(flash_attention(*inputs, mask=mask, impl=impl).output, inputs, d_out))

    expected = gradients(q, k, v, d_out)
    hidden, unseen = ~real[:, None, :9, None], ~seen[:, None, :, None]
    got = gradients(q.masked_fill(hidden, poison), k.masked_fill(unseen, poison), v.masked_fill(unseen, poison),
                    d_out.masked_fill(hidden, poison))  # fmt: skip
    for one, other, blank in zip(got, expected, (hidden, unseen, unseen), strict=True):
        assert torch.equal(one, other)
        assert (one.masked_select(blank) == 0).all()


def test_the_backward_of_block_sparse_attention_multiplies_the_visible_blocks_only() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    n, side = 1000, 50
    scores = Scores(rand(0, 1, 2, n, 8), rand(1, 1, 1, n, 8), Mask(blocks=rand(3, 1, 2, 20, 20) > 1, side=side))
    v, lse, d_out = rand(2, 1, 1, n, 8), torch.zeros(1, 2, n), rand(4, 1, 2, n, 8)
    assert scores.mask.blocks is not None
    visible = int(scores.mask.blocks.sum())
    with FlopCounterMode(display=False) as counter:
        blocked_backward(scores, lse, None, d_out, v, None, None, None, None, None, True)
    assert 0 < visible < 200
    assert counter.get_total_flops() == 2 * 5 * visible * side * side * 8  # s, dO v, dv, dq, dk


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_gradients_are_the_same_every_time(impl: str) -> None:
    scores, v, given = problem("blocks", 40, "all gated", 7, torch.float32)
    first, second = (run(scores, v, given, impl, True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_the_operator_is_a_good_citizen() -> None:
    scores, v, given = problem("softcap and sink", 20, "all gated", 7, torch.float32)
    p, lse = dense_attention(scores)
    out = p @ v.repeat_interleave(H // G, 1)
    extras = (
        lse,
        out,
        given["d_out"],
        v,
        given["d_lse"],
        given["d_blocks"],
        7,
        given["d_received"],
        given["gate"],
        True,
    )
    for impl in ("cpu", "triton"):
        arguments = (*operator.score_parts(scores), *extras, impl)
        tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
        torch.library.opcheck(torch.ops.workbench.softmax_backward.default, arguments, test_utils=tests)


LSE, D_OUT = torch.zeros(1, 2, 5), torch.zeros(1, 2, 5, 3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"lse": LSE[:, :, :4]}, r"lse is \[1, 2, 5\] here; got \[1, 2, 4\]"),
        ({"d_out": D_OUT}, "d_out, v and out go together"),
        ({"d_out": D_OUT, "v": torch.zeros(1, 1, 6, 3)}, "d_out, v and out go together"),
        ({"d_out": D_OUT, "v": torch.zeros(1, 1, 5, 3), "out": D_OUT}, r"v is \[1, 1, 6, 3\] here; got \[1, 1, 5, 3\]"),
        ({"d_blocks": torch.zeros(1, 2, 2, 2)}, "d_blocks and block go together"),
        ({"d_blocks": torch.zeros(1, 2, 2, 2), "block": 4, "gate": LSE[0]}, r"gate is \[1, 2, 5\] here; got \[2, 5\]"),
        ({"d_blocks": torch.zeros(1, 2, 2, 3), "block": 4}, r"d_blocks is \[1, 2, 2, 2\] here; got \[1, 2, 2, 3\]"),
        ({"d_received": LSE}, r"d_received is \[1, 2, 6\] here"),
        ({"impl": "reference"}, "impl: softmax_backward has the forms cpu and triton"),
        ({"impl": "cuda"}, "impl: no form 'cuda'"),
    ],
)
def test_bad_arguments_raise_one_error_naming_them(arguments: dict[str, Any], said: str) -> None:
    scores = Scores(torch.zeros(1, 2, 5, 4), torch.zeros(1, 1, 6, 4), Mask())
    with pytest.raises(ValueError, match=said):
        softmax_backward(scores, **{"lse": LSE, **arguments})
