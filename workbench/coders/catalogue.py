"""The kinds of coders by name."""

from __future__ import annotations

from typing import Any

from workbench.coders.coder import Coder
from workbench.coders.kinds.batchtopk import BatchTopK
from workbench.coders.kinds.discrete import Discrete
from workbench.coders.kinds.gated import Gated
from workbench.coders.kinds.jumprelu import JumpReLU, JumpReLUTanh
from workbench.coders.kinds.matryoshka import Matryoshka
from workbench.coders.kinds.p_anneal import PAnneal
from workbench.coders.kinds.relu import ReLU
from workbench.coders.kinds.topk import TopK
from workbench.errors import UnknownName

_KINDS: tuple[type[Coder], ...] = (
    ReLU, PAnneal, Gated, TopK, BatchTopK, JumpReLU, JumpReLUTanh, Matryoshka, Discrete,
)  # fmt: skip


def coder_kinds() -> dict[str, type[Coder]]:
    """The kinds that can be trained, by name; ``defaults`` of each are its options."""
    return {kind.kind: kind for kind in _KINDS}


def make_coder(kind: str, d_in: int, features: int, **arguments: Any) -> Coder:
    """A coder with a random start: further arguments are those of ``Coder`` and the options of the kind."""
    known = coder_kinds()
    if kind not in known:
        raise UnknownName("kind of coder", kind, known)
    return known[kind](d_in, features, **arguments)
