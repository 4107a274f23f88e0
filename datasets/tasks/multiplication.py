"""Multiplication of several digits, least significant digit first (arXiv 2510.00184; format of the implicit chain of thought,
arXiv 2405.14838).

::

    clean    <bos> 5 6 3 2 * 7 4 3 4 = 5 5 6 0 8 2 0     at k = 2, after the second 5  ->  6     (2365 * 4347 = 10280655)
    corrupt  <bos> 5 6 1 2 * 7 4 3 4 = 5 5 6 0 8 2 0     at k = 2                      ->  2     (operand)
    corrupt  <bos> 5 6 1 2 * 7 4 3 4 = 5 5 2 1 1 4 9     at k = 2                      ->  2     (problem)
    corrupt  <bos> 5 6 3 2 * 0 0 0 0 = 0 0 0 0 0 0 0     at k = 2                      ->  0     (zero)

    chain    <bos> 5 6 3 2 * 7 4 3 4 : 5 5 5 6 1 + 0 0 6 4 9 0 ( 5 5 1 1 1 1 ) + 0 0 5 9 0 7 0 ( 5 5 6 0 2 8 0 )
             + 0 0 0 0 6 4 9 0 = 5 5 6 0 8 2 0

The chain of thought is the published one: the product with each digit of the second operand, shifted, and in brackets the sum
of those so far, but not the last sum, which is the answer. ``:`` and ``=`` stand where the published rows have an end-of-text
token and ``####``; with ``chain``, ``:`` stays when all of the chain is removed. With c_hat_k = sum over i + j = k of a_i b_j,
plus floor(c_hat_(k-1) / 10), the answer is c_k = c_hat_k mod 10. A digit a_i or b_i acts on c_k for k >= i only, and under
``operand`` (the published attribution) the emitted digits are those of the clean problem. Spans: ``A0`` ..., ``B0`` ... (operand
digits), ``CHANGED``, ``CHAIN``, ``EQUALS``, ``END``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from workbench.datasets.tasks.arithmetic import ArithmeticTask, Digits, number, written


@dataclass(frozen=True)
class Multiplication(ArithmeticTask):
    """The task."""

    operator: ClassVar[str] = "*"
    name: str = field(default="multiplication", init=False)

    @property
    def places(self) -> int:
        return 2 * self.digits

    def columns(self, a: Digits, b: Digits) -> list[int]:
        return [sum(a[i] * b[k - i] for i in range(len(a)) if 0 <= k - i < len(b)) for k in range(len(a) + len(b))]

    def thought(self, a: Digits, b: Digits) -> list[str]:
        tokens: list[str] = []
        for j, digit in enumerate(b):
            if j:
                tokens += ["+", *["0"] * j]
            tokens += written(number(a) * digit, len(a) + 1)
            if 0 < j < len(b) - 1:
                tokens += ["(", *written(number(a) * number(b[: j + 1]), len(a) + j + 1), ")"]
        return tokens


TASKS = {"multiplication": (Multiplication, "one digit of a product, least significant first")}
