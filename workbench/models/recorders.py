"""Recorders for families outside of transformers' attention interface."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from workbench.models.layers import AttentionLayer
from workbench.models.session import Session


@contextmanager
def recording(layers: Sequence[AttentionLayer], session: Session) -> Iterator[None]:
    yield
