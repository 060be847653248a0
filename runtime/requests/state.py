"""Where residuals live between calls: by request, cache context and block.

A request is one image being made. Its timestep falls, or rises, all along: a new request starts when
that direction reverses, when a context is called again at the same timestep, when a context's shapes
change, or when the caller says so. The first two timesteps set the direction, so a request of one
step is told from the next only by the same timestep coming again, or by its name. Each thread has a
request of its own unless the caller names one. Within a request, each cache context has its own
residuals. Guidance branches that come without a context are told apart by their order alone: the n-th
call at a timestep is branch n. Once a timestep is seen to have had more or fewer such calls than the
one before, their residuals are dropped. The call that is left out is itself not noticed in time:
pipelines that guide only some of the steps need contexts.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from runtime.base.errors import BusyError
from runtime.requests.bank import Residuals
from runtime.requests.trace import RequestTrace, Trace

Signature = tuple[object, ...]

KEPT = 16
"""Named requests, and traces of requests, that are kept."""

BRANCHES = 4
"""Calls at one timestep without a context beyond which a new request is assumed."""

_context: ContextVar[str | None] = ContextVar("edit_compile_context", default=None)
_request: ContextVar[str | None] = ContextVar("edit_compile_request", default=None)


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


def current_context() -> str | None:
    """The cache context of the calls made here, None outside of any."""
    return _context.get()


class Branch:
    """One cache context of a request: the residuals of every block."""

    def __init__(self, name: str, signature: Signature, named: bool = True) -> None:
        self.name = name
        self.signature = signature
        self.named = named
        self._banks: dict[int, Residuals] = {}

    def bank(self, block: int, rows: int, dims: Sequence[int]) -> Residuals:
        """The bank of `block`, made when first asked for."""
        found = self._banks.get(block)
        if found is None:
            found = self._banks[block] = Residuals(rows, dims)
        return found

    def clear(self) -> None:
        """Empty all banks, keeping their buffers."""
        for bank in self._banks.values():
            bank.clear()


@dataclass(frozen=True)
class Place:
    """Where a request is: its step, the timesteps of its rows there, and whether they rise (1) or fall (-1)."""

    step: int
    times: tuple[float, ...]
    direction: int


class Request:
    """The state of one request between its calls."""

    _times: tuple[float, ...]

    def __init__(self, name: str, traces: Trace) -> None:
        self.name = name
        self.step = -1
        self.busy = threading.Lock()
        self.trace: RequestTrace | None = None
        self._traces = traces
        self._branches: dict[str, Branch] = {}
        self._begin()

    def enter(self, times: tuple[float, ...], context: str | None, signature: Signature) -> Branch:
        """The branch of the call at `times` (one per row, or one for all), in `context`."""
        if self._starts_anew(times, context):
            self.restart()
        if times != self._times:
            self._advance(times)
        name = context if context is not None else f"branch {self._unnamed}"
        branch = self._branches.get(name)
        if branch is not None and branch.signature != signature:
            self.restart()
            self._branches.clear()
            return self.enter(times, context, signature)
        self._note(context)
        if branch is None:
            branch = self._branches[name] = Branch(name, signature, context is not None)
        if self.trace is None:
            self.trace = self._traces.begin(self.name)
        return branch

    def restart(self) -> None:
        """Begin a new request in place: empty banks, step 0 to come, a new trace record."""
        self._begin()
        for branch in self._branches.values():
            branch.clear()

    @property
    def place(self) -> Place | None:
        """Where it is; None before its first call."""
        return Place(self.step, self._times, self._direction) if self._times else None

    def resume(self, place: Place) -> None:
        """Go on from `place`, without residuals."""
        self.restart()
        self.step, self._times, self._direction = place.step, place.times, place.direction

    def forget(self) -> None:
        """Take back what was traced."""
        if self.trace is not None:
            self._traces.discard(self.trace)

    def _begin(self) -> None:
        self.step, self.trace = -1, None
        self._times = ()
        self._direction = 0  # 1 where the timestep rises, -1 where it falls, 0 until it has moved
        self._seen: set[str] = set()  # contexts called at this timestep
        self._unnamed = 0  # calls without a context at this timestep
        self._usual: int | None = None  # and at the one before

    def _starts_anew(self, times: tuple[float, ...], context: str | None) -> bool:
        if not self._times:
            return False
        if times == self._times:
            return self._unnamed == BRANCHES if context is None else context in self._seen
        if len(times) != len(self._times):
            return True
        moves = _moves(self._times, times)
        return len(moves) > 1 or -self._direction in moves

    def _advance(self, times: tuple[float, ...]) -> None:
        """Go on to the next timestep."""
        if self._times:
            (self._direction,) = _moves(self._times, times)
            if self._usual is not None and self._usual != self._unnamed:
                self._drop_unnamed()
            self._usual = self._unnamed
        self.step += 1
        self._times, self._unnamed = times, 0
        self._seen.clear()

    def _note(self, context: str | None) -> None:
        if context is None:
            self._unnamed += 1
        else:
            self._seen.add(context)

    def _drop_unnamed(self) -> None:
        for branch in self._branches.values():
            if not branch.named:
                branch.clear()


def _moves(old: tuple[float, ...], new: tuple[float, ...]) -> set[int]:
    """Where the rows' timesteps go: 1 for up, -1 for down."""
    return {1 if after > before else -1 for before, after in zip(old, new, strict=True) if after != before}


class Held(Protocol):
    """A request as `Requests` needs it."""

    name: str
    busy: threading.Lock

    def forget(self) -> None:
        """Take back what was traced."""


H = TypeVar("H", bound=Held)


class Requests(Generic[H]):
    """All requests of one compiled transformer, made by `make` from their names.

    Unnamed requests belong to their thread and vanish with it. Of the named ones the `keep` used
    last are held; one used again after being dropped starts with empty banks.
    """

    def __init__(self, make: Callable[[str], H], keep: int = KEPT) -> None:
        self.keep = keep
        self._make = make
        self._named: OrderedDict[str, H] = OrderedDict()
        self._own = threading.local()
        self._lock = threading.Lock()

    @contextmanager
    def held(self) -> Iterator[H]:
        """The current request, nobody else's meanwhile; BusyError if another thread has it.

        An exception inside forgets the request and what was traced of it.
        """
        request = self._current()
        if not request.busy.acquire(blocking=False):
            raise BusyError(f"request {request.name!r} is running in another thread: give each its own name")
        try:
            yield request
        except BaseException:
            self._abandon(request)
            raise
        finally:
            request.busy.release()

    def existing(self) -> H | None:
        """The current request, None where there is none yet."""
        name = _request.get()
        with self._lock:
            found: H | None = self._named.get(name) if name is not None else self._own.__dict__.get("request")
            return found

    def drop(self) -> None:
        """Forget the current request."""
        name = _request.get()
        with self._lock:
            if name is None:
                self._own.__dict__.clear()
            else:
                self._named.pop(name, None)

    def clear(self) -> None:
        """Forget every thread's request and all named ones."""
        with self._lock:
            self._own = threading.local()
            self._named.clear()

    def _abandon(self, request: H) -> None:
        """Forget `request` and what was traced of it."""
        request.forget()
        with self._lock:
            if self._named.get(request.name) is request:
                del self._named[request.name]
            if self._own.__dict__.get("request") is request:
                del self._own.request

    def _current(self) -> H:
        name = _request.get()
        if name is None:
            own = self._own  # `clear` may replace it meanwhile
            if not hasattr(own, "request"):
                own.request = self._make(threading.current_thread().name)
            request: H = own.request
            return request
        with self._lock:
            request = self._named.get(name) or self._named.setdefault(name, self._make(name))
            self._named.move_to_end(name)
            while len(self._named) > self.keep:
                self._named.popitem(last=False)
            return request
