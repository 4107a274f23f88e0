"""Which layers an input reaches at all: a decoder without an encoder never runs its cross attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from workbench.models.current import current

if TYPE_CHECKING:
    from workbench.models.layers import AttentionLayer
    from workbench.models.session import Session


@contextmanager
def noticing(layers: Sequence[AttentionLayer], session: Session) -> Iterator[None]:
    """Put the modules of ``layers`` whose forward is called into ``session.ran``, where the layers are of several stacks."""
    with ExitStack() as undo:
        if len({layer.stack for layer in layers}) > 1:
            session.ran = ran = set[int]()
            for layer in layers:
                undo.callback(layer.module.register_forward_pre_hook(_noter(session, ran)).remove)
        yield


def _noter(session: Session, ran: set[int]) -> Callable[..., None]:
    def note(module: nn.Module, args: Any) -> None:
        if current() is session:
            ran.add(id(module))

    return note
