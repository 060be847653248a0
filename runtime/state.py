"""Where residuals live between calls: by request, cache context and block.

A request is one image being made. It starts when the timestep rises, when a context's shapes
change, or when the caller says so. Each thread has a request of its own unless the caller names
one. Within a request, each cache context has its own residuals. Guidance branches that come without
a context are told apart by being called again at the same timestep: the n-th call at a timestep is
branch n, which a call left out at some step does not shift.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from runtime.bank import Residuals
from runtime.errors import BusyError
from runtime.trace import RequestTrace, Trace

Signature = tuple[object, ...]

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


class Branch:
    """One cache context of a request: the residuals of every block."""

    def __init__(self, name: str, signature: Signature) -> None:
        self.name = name
        self.signature = signature
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


class Request:
    """The state of one request between its calls."""

    def __init__(self, name: str, traces: Trace) -> None:
        self.name = name
        self.step = -1
        self.busy = threading.Lock()
        self.trace: RequestTrace | None = None
        self._traces = traces
        self._times: tuple[float, ...] = ()
        self._repeats = 0
        self._branches: dict[str, Branch] = {}

    def enter(self, times: tuple[float, ...], context: str | None, signature: Signature) -> Branch:
        """The branch of the call at `times` (one per row, or one for all), in `context`."""
        if self._starts_anew(times):
            self.restart()
        if times != self._times:
            self.step += 1
            self._repeats = 0
        elif context is None:
            self._repeats += 1
            if self._repeats == BRANCHES:
                self.restart()
                self.step, self._repeats = 0, 0
        self._times = times
        name = context if context is not None else f"branch {self._repeats}"
        branch = self._branches.get(name)
        if branch is not None and branch.signature != signature:
            self.restart()
            self._branches.clear()
            self.step, self._times, branch = 0, times, None
        if branch is None:
            branch = self._branches[name] = Branch(name, signature)
        if self.trace is None:
            self.trace = self._traces.begin(self.name)
        return branch

    def restart(self) -> None:
        """Begin a new request in place: empty banks, step 0 to come, a new trace record."""
        self.step, self._times, self._repeats, self.trace = -1, (), 0, None
        for branch in self._branches.values():
            branch.clear()

    def _starts_anew(self, times: tuple[float, ...]) -> bool:
        if not self._times:
            return False
        return len(times) != len(self._times) or any(new > old for new, old in zip(times, self._times, strict=True))


class Requests:
    """All requests of one compiled transformer.

    Unnamed requests belong to their thread and vanish with it. Of the named ones the `keep` used
    last are held; one used again after being dropped starts with empty banks.
    """

    def __init__(self, keep: int = 16) -> None:
        self.keep = keep
        self.trace = Trace(keep)
        self._named: OrderedDict[str, Request] = OrderedDict()
        self._own = threading.local()
        self._lock = threading.Lock()

    @contextmanager
    def entered(self, times: tuple[float, ...], signature: Signature) -> Iterator[tuple[Request, Branch]]:
        """The current request and branch, nobody else's meanwhile; BusyError if another thread has it."""
        request = self._current()
        if not request.busy.acquire(blocking=False):
            raise BusyError(f"request {request.name!r} is running in another thread: give each its own name")
        try:
            yield request, request.enter(times, _context.get(), signature)
        finally:
            request.busy.release()

    def abandon(self) -> None:
        """Forget the current request and what was traced of it."""
        request = self._current()
        if request.trace is not None:
            self.trace.discard(request.trace)
        self.drop()

    def drop(self) -> None:
        """Forget the current request."""
        name = _request.get()
        with self._lock:
            if name is None:
                self._own.__dict__.clear()
            else:
                self._named.pop(name, None)

    def clear(self) -> None:
        """Forget this thread's request and all named ones."""
        with self._lock:
            self._own.__dict__.clear()
            self._named.clear()

    def _current(self) -> Request:
        name = _request.get()
        if name is None:
            if not hasattr(self._own, "request"):
                self._own.request = Request(threading.current_thread().name, self.trace)
            request: Request = self._own.request
            return request
        with self._lock:
            request = self._named.setdefault(name, Request(name, self.trace))
            self._named.move_to_end(name)
            while len(self._named) > self.keep:
                self._named.popitem(last=False)
            return request
