"""Addition of several digits, least significant digit first.

::

    clean    <bos> 7 2 9 5 + 8 3 0 6 = 5 6 9 1     at k = 1, after the 5  ->  6     (5927 + 6038 = 11965)
    corrupt  <bos> 7 2 9 5 + 8 1 0 6 = 5 6 9 1     at k = 1               ->  4     (operand)
    corrupt  <bos> 7 2 9 5 + 8 1 0 6 = 5 4 9 1     at k = 1               ->  4     (problem)
    corrupt  <bos> 7 2 9 5 + 0 0 0 0 = 7 2 9 5     at k = 1               ->  2     (zero)

    chain    <bos> 7 2 9 5 + 8 3 0 6 : 5 1 , 6 0 , 9 0 , 1 1 = 5 6 9 1

The chain of thought, which is ours after the model of multiplication, is the running sum of every place in two digits, least
significant first: c_hat_k = a_k + b_k + floor(c_hat_(k-1) / 10), and c_k = c_hat_k mod 10; the last digit of the answer is the
last carry. The corruption may change c_k through its own place or through a carry from a lower one. Spans: ``A0`` ..., ``B0``
... (operand digits), ``CHANGED``, ``CHAIN``, ``EQUALS``, ``END``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from workbench.datasets.tasks.arithmetic import ArithmeticTask, Digits, written


@dataclass(frozen=True)
class Addition(ArithmeticTask):
    """The task."""

    operator: ClassVar[str] = "+"
    name: str = field(default="addition", init=False)

    @property
    def places(self) -> int:
        return self.digits + 1

    def columns(self, a: Digits, b: Digits) -> list[int]:
        return [*(x + y for x, y in zip(a, b, strict=True)), 0]

    def thought(self, a: Digits, b: Digits) -> list[str]:
        tokens: list[str] = []
        for k, value in enumerate(self.running(a, b)[:-1]):
            tokens += [","] * bool(k) + written(value, 2)
        return tokens


TASKS = {"addition": (Addition, "one digit of a sum, least significant first")}
