"""What a caller says of its calls: the request and the cache context that they belong to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar

_context: ContextVar[str | None] = ContextVar("edit_compile_context", default=None)
_request: ContextVar[str | None] = ContextVar("edit_compile_request", default=None)


@contextmanager
def cache_context(name: str) -> Iterator[None]:
    """Let calls inside the ``with`` block use the residuals of context `name`."""
    token = _context.set(name)
    try:
        yield
    finally:
        with suppress(ValueError):  # each step of a generator may run in a context of its own, which ends with it
            _context.reset(token)


@contextmanager
def named_request(name: str) -> Iterator[None]:
    """Let calls inside the ``with`` block belong to the request `name`."""
    token = _request.set(name)
    try:
        yield
    finally:
        with suppress(ValueError):  # as above
            _request.reset(token)


def current_context() -> str | None:
    """The cache context of the calls made here, None outside of any."""
    return _context.get()


def current_request() -> str | None:
    """The name of the request that calls made here belong to, None where it has none."""
    return _request.get()
