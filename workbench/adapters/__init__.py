"""Attention operators of other libraries, wrapped: their own output, unchanged, and the exact map beside it.

One module per library: ``flex`` (torch's FlexAttention), ``timm`` (vision modules), ``fla`` (flash-linear-attention),
``natten`` (neighborhood attention). A library is imported when its adapter is called, not before.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from workbench.errors import WorkbenchError


def library(name: str, install: str) -> ModuleType:
    """The module, or a ``WorkbenchError`` that says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise WorkbenchError(f"this needs {name.partition('.')[0]}: {install} ({error})") from None
