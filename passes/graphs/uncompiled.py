"""Code under torch.compile, run as the Python that it is.

What was compiled once heeds no hook that is put on later, so that it could be neither watched nor masked.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

WRAPPER = "_orig_mod"
"""Name of the module inside what ``torch.compile(module)`` gives."""

_lock = threading.Lock()
_inside: list[object] = []
_stances: list[Any] = []


@contextmanager
def uncompiled() -> Iterator[None]:
    """Inside the ``with`` block nothing under torch.compile runs compiled, in any thread."""
    with _lock:
        _inside.append(None)
        if len(_inside) == 1:
            _stances.append(torch.compiler.set_stance("force_eager"))
    try:
        yield
    finally:
        with _lock:
            _inside.pop()
            if not _inside:
                _stances.pop().__exit__(None, None, None)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` was given, where `module` is what it gave."""
    inner = module._modules.get(WRAPPER)
    return unwrapped(inner) if inner is not None else module


def compiles(module: nn.Module) -> bool:
    """Whether calling `module` runs code that torch.compile compiles."""
    if module._compiled_call_impl is not None or WRAPPER in module._modules:
        return True
    return hasattr(module.forward, "_torchdynamo_orig_callable")


def only_compiled(module: nn.Module) -> bool:
    """Whether the forward that stands on `module` itself is that of its class, under torch.compile."""
    inner = getattr(vars(module)["forward"], "_torchdynamo_orig_callable", None)
    return getattr(inner, "__func__", None) is type(module).forward
