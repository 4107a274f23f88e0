"""``flash_attention`` as an operator: registration, compilation, export, errors, and its kernels compiled for GPUs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.kernels import softmax_backward as operator
from workbench.kernels.flash_attention import flash_attention
from workbench.kernels.mask import Mask
from workbench.kernels.scores import Relative, Scores

HERE = Path(__file__).parent


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def example(**more: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    q, k, v = rand(0, 1, 4, 20, 16), rand(1, 1, 2, 20, 16), rand(2, 1, 2, 20, 8)
    mask = Mask(causal=True, keys=torch.arange(20)[None] != 3)
    return (q, k, v), {"mask": mask, "block": 8, "reduce": ("sum", "mean", "max"), **more}


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_the_operator_is_a_good_citizen(impl: str) -> None:
    (q, k, v), asked = example()
    for tensor in (q, k, v):
        tensor.requires_grad_()
    scores = Scores(q, k, asked["mask"], sink=torch.zeros(4, requires_grad=True))
    arguments = (*operator.score_parts(scores), v, 8, True, True, impl)
    torch.library.opcheck(torch.ops.workbench.flash_attention.default, arguments)


@pytest.mark.parametrize(("impl", "dynamic"), [("cpu", False), ("cpu", True), ("triton", False)])
def test_it_compiles_whole_and_trains_compiled(impl: str, dynamic: bool) -> None:
    (q, k, v), asked = example(impl=impl)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = flash_attention(q, k, v, **asked)
        weights = torch.arange(9.0).view(3, 3)
        return found.output.square().sum() + (found.blocks["mean"] * weights).sum() + found.blocks["max"].sum()

    inputs = [t.clone().requires_grad_() for t in (q, k, v)]
    expected = torch.autograd.grad(run(*inputs), inputs)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    got = torch.autograd.grad(compiled(*inputs), inputs)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_it_exports() -> None:
    (q, k, v), asked = example()

    class Layer(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            found = flash_attention(q, k, v, **asked)
            return found.output, found.blocks["sum"]

    program = torch.export.export(Layer(), (q, k, v))
    assert "workbench.flash_attention" in str(program.graph)
    for one, other in zip(program.module()(q, k, v), Layer()(q, k, v), strict=True):
        torch.testing.assert_close(one, other)


Q, K, V = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 6, 8), torch.zeros(2, 2, 6, 3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"q": Q[0]}, r"q is a tensor \[B, heads, tokens, E\]; got \[4, 5, 8\]"),
        ({"k": K[:1]}, "k must share B=2"),
        ({"v": V[:, :, :5]}, r"v is \[B, G, K, V\] with B, G and K of k \[2, 2, 6, 8\]; got \[2, 2, 5, 3\]"),
        ({"v": V[..., :0]}, r"v is \[B, G, K, V\]"),
        ({"v": V.double()}, "v must have q's dtype"),
        ({"softcap": 0.0}, "softcap is a positive number"),
        ({"sink": torch.zeros(2)}, "sink is one logit per query head"),
        ({"bias": torch.zeros(4, 5, 5)}, "bias must broadcast"),
        ({"bias": torch.zeros(4, 5, 6, requires_grad=True)}, "bias asks for a gradient"),
        ({"bias": Relative(torch.zeros(4, 11, requires_grad=True), -4)}, "bias asks for a gradient"),
        (
            {"bias": lambda lo, hi: torch.zeros(hi - lo, 6), "q": Q.clone().requires_grad_()},
            "bias is a function, through",
        ),
        ({"block": 0}, "block is a positive number"),
        ({"block": True}, "block is a positive number"),
        ({"reduce": ("median",)}, "reduce: no 'median'; known: sum, mean, max, abs"),
        ({"impl": "cuda"}, "impl: no form 'cuda'; known: reference, cpu, triton"),
        ({"mask": Mask(keys=torch.ones(2, 5, dtype=torch.bool))}, "mask.keys"),
    ],
)
def test_bad_arguments_raise_one_error_naming_them(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        flash_attention(**{"q": Q, "k": K, "v": V, "mask": Mask(), **arguments})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"bias": lambda lo, hi: torch.zeros(hi - lo, 6)}, "the bias is a function"), ({"q": Q.double()}, "float64")],
)
def test_a_form_that_cannot_run_raises_and_nothing_else_runs(arguments: dict[str, Any], said: str) -> None:
    arguments = {"q": Q, "k": K, "v": V, "mask": Mask(), **arguments}
    if arguments["q"].dtype == torch.float64:
        arguments |= {"k": K.double(), "v": V.double()}
    with pytest.raises(RuntimeError, match=said):
        flash_attention(**arguments, impl="triton")


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_gpus(capability: int, compiled_for: Callable[[int, str], list[str]]) -> None:
    assert compiled_for(capability, "aot_flash_attention:forward") == 8 * ["_flash"]
    assert compiled_for(capability, "aot_flash_attention:backward") == 4 * ["_by_row", "_by_key"]
