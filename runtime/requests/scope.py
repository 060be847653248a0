"""What a caller says of its calls: the request and the cache context that they belong to, and what decides in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from typing import TypeVar

from runtime.routing.policy import Decider

T = TypeVar("T")

_context: ContextVar[str | None] = ContextVar("edit_compile_context", default=None)
_request: ContextVar[str | None] = ContextVar("edit_compile_request", default=None)
_deciders: ContextVar[Mapping[object, Decider]] = ContextVar("edit_compile_deciders", default={})  # noqa: B039


def cache_context(name: str) -> AbstractContextManager[None]:
    """Let calls inside the ``with`` block use the residuals of context `name`."""
    return _said(_context, name)


def named_request(name: str) -> AbstractContextManager[None]:
    """Let calls inside the ``with`` block belong to the request `name`."""
    return _said(_request, name)


def decided_by(owner: object, policy: Decider | None) -> AbstractContextManager[None]:
    """Let `policy` decide for calls of `owner` inside the ``with`` block; None: what decides for it anywhere."""
    others = {each: own for each, own in _deciders.get().items() if each is not owner}
    return _said(_deciders, others if policy is None else {**others, owner: policy})


def current_decider(owner: object) -> Decider | None:
    """What decides for calls that `owner` gets here, None where nothing was said."""
    return _deciders.get().get(owner)


def current_context() -> str | None:
    """The cache context of the calls made here, None outside of any."""
    return _context.get()


def current_request() -> str | None:
    """The name of the request that calls made here belong to, None where it has none."""
    return _request.get()


@contextmanager
def _said(variable: ContextVar[T], value: T) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        with suppress(ValueError):  # each step of a generator may run in a context of its own, which ends with it
            variable.reset(token)
