"""What a caller says of its calls: the request and the cache context that they belong to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from runtime.routing.policy import Decider

_context: ContextVar[str | None] = ContextVar("edit_compile_context", default=None)
_request: ContextVar[str | None] = ContextVar("edit_compile_request", default=None)
_deciders: ContextVar[Mapping[object, Decider]] = ContextVar("edit_compile_deciders", default={})  # noqa: B039


@contextmanager
def cache_context(name: str) -> Iterator[None]:
    """Let calls inside the ``with`` block use the residuals of context `name`."""
    token = _context.set(name)
    try:
        yield
    finally:
        _context.reset(token)


@contextmanager
def named_request(name: str) -> Iterator[None]:
    """Let calls inside the ``with`` block belong to the request `name`."""
    token = _request.set(name)
    try:
        yield
    finally:
        _request.reset(token)


@contextmanager
def decided_by(owner: object, policy: Decider | None) -> Iterator[None]:
    """Let `policy` decide for calls of `owner` inside the ``with`` block; None: what decides for it anywhere."""
    others = {each: own for each, own in _deciders.get().items() if each is not owner}
    token = _deciders.set(others if policy is None else {**others, owner: policy})
    try:
        yield
    finally:
        _deciders.reset(token)


def current_decider(owner: object) -> Decider | None:
    """What decides for calls that `owner` gets here, None where nothing was said."""
    return _deciders.get().get(owner)


def current_context() -> str | None:
    """The cache context of the calls made here, None outside of any."""
    return _context.get()


def current_request() -> str | None:
    """The name of the request that calls made here belong to, None where it has none."""
    return _request.get()
