"""What a caller says of its calls: the request and the cache context that they belong to, and what decides in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from typing import TypeVar

from runtime.routing.policy import Decider

T = TypeVar("T")
Deciders = Mapping[tuple[object, str | None], Decider]
"""By whose calls they are, and in which request; None: in all that have none of their own."""

_context: ContextVar[str | None] = ContextVar("edit_compile_context", default=None)
_requests: ContextVar[tuple[str, ...]] = ContextVar("edit_compile_requests", default=())
_deciders: ContextVar[Deciders] = ContextVar("edit_compile_deciders", default={})  # noqa: B039


def cache_context(name: str) -> AbstractContextManager[None]:
    """Let calls inside the ``with`` block use the residuals of context `name`."""
    return _said(_context, name)


def named_requests(names: Sequence[str]) -> AbstractContextManager[None]:
    """Let calls inside the ``with`` block belong to the requests `names`, which share their rows."""
    return _said(_requests, tuple(names))


def decided_by(owner: object, policy: Decider) -> AbstractContextManager[None]:
    """Let `policy` decide for calls of `owner` inside the ``with`` block."""
    others = {key: own for key, own in _deciders.get().items() if key[0] is not owner}
    return _said(_deciders, {**others, (owner, None): policy})


def each_decided_by(owner: object, policies: Mapping[str, Decider | None]) -> AbstractContextManager[None]:
    """Let each of `policies` decide for calls of `owner` in the request of that name, inside the ``with`` block.

    None: what decides for `owner` in any.
    """
    named: dict[tuple[object, str | None], Decider | None] = {(owner, name): one for name, one in policies.items()}
    said = {**_deciders.get(), **named}
    return _said(_deciders, {key: policy for key, policy in said.items() if policy is not None})


def current_decider(owner: object, request: str | None) -> Decider | None:
    """What decides for calls that `owner` gets here, in `request`; None where nothing was said."""
    said = _deciders.get()
    return said.get((owner, request)) or said.get((owner, None))


def current_context() -> str | None:
    """The cache context of the calls made here, None outside of any."""
    return _context.get()


def current_requests() -> tuple[str, ...]:
    """The names of the requests that calls made here belong to; none where it has no name."""
    return _requests.get()


@contextmanager
def _said(variable: ContextVar[T], value: T) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        with suppress(ValueError):  # each step of a generator may run in a context of its own, which ends with it
            variable.reset(token)
