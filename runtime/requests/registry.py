"""All requests of a compiled transformer: found by name or thread, one caller at a time, within a limit of memory."""

from __future__ import annotations

import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from weakref import WeakKeyDictionary, WeakSet

import torch

from runtime.base.errors import BusyError, EditError
from runtime.requests.request import Request
from runtime.requests.scope import current_requests
from runtime.requests.trace import Trace

NAMES = 4096
"""Named requests whose step is remembered."""
SHARE = 4
"""Residuals may take one part in so many of a device's memory, unless a limit is set."""


_registries: WeakSet[Requests] = WeakSet()


class Requests:
    """Requests, traced in `traces`.

    Unnamed requests belong to their thread and vanish with it. Named ones stay until they are dropped. Where all of
    them together hold more than `limit` bytes, those used longest ago lose their residuals, but not their step; beyond
    NAMES names, the one used longest ago is forgotten. Both are said in a warning.
    """

    def __init__(self, traces: Trace) -> None:
        self.limit: int | None = None
        self._traces = traces
        self._named: OrderedDict[str, Request] = OrderedDict()
        self._own = threading.local()
        self._sizes: WeakKeyDictionary[Request, int] = WeakKeyDictionary()  # the one used last comes last
        self._lock = threading.Lock()
        _registries.add(self)

    @contextmanager
    def held(self, device: torch.device) -> Iterator[tuple[Request, ...]]:
        """The current requests, nobody else's meanwhile; BusyError if another thread has one of them.

        An exception inside forgets them and what was traced of them.
        """
        requests = self._current()
        with ExitStack() as busy:
            for request in requests:
                if not request.busy.acquire(blocking=False):
                    raise BusyError(f"request {request.name!r} is running in another thread: give each its own name")
                busy.callback(request.busy.release)
            try:
                yield requests
            except BaseException:
                for request in requests:
                    self._abandon(request)
                raise
            grown = [self._weigh(request) for request in requests]
        if any(grown):
            self._make_room(requests[-1], device)

    def existing(self) -> list[Request]:
        """The current requests, as far as there are any yet."""
        names = current_requests()
        with self._lock:
            found = [self._named.get(name) for name in names] if names else [self._own.__dict__.get("request")]
            return [request for request in found if request is not None]

    @classmethod
    def drop_everywhere(cls, name: str) -> None:
        """Forget the request `name` of every compiled transformer: a pipeline may call two inside one request."""
        for each in list(_registries):
            with each._lock:
                each._named.pop(name, None)

    def drop(self) -> None:
        """Forget the current requests."""
        names = current_requests()
        with self._lock:
            if not names:
                self._own.__dict__.clear()
            for name in names:
                self._named.pop(name, None)

    def lose_all(self, leave: Callable[[Request], None] | None = None) -> None:
        """Have every request that is not running give up its residuals; `leave` first brings its place to the host."""
        with self._lock:
            everyone = list(self._sizes)
        for request in everyone:
            _lose_if_idle(request, leave)

    def _current(self) -> tuple[Request, ...]:
        names = current_requests()
        if not names:
            if not hasattr(self._own, "request"):
                self._own.request = Request(threading.current_thread().name, self._traces)
            own: Request = self._own.request
            return (own,)
        with self._lock:
            requests = tuple(self._get_or_make(name) for name in names)
            forgotten = [self._named.popitem(last=False)[0] for _ in range(len(self._named) - NAMES)]
        if forgotten:
            warnings.warn(
                f"more than {NAMES} named requests: the one used longest ago is forgotten, with its step; end requests "
                "with compiled.reset() inside them",
                RuntimeWarning,
                stacklevel=2,
            )
        return requests

    def _get_or_make(self, name: str) -> Request:
        """The request `name`, as the one used last; the caller holds the lock."""
        if name not in self._named:
            self._named[name] = Request(name, self._traces, trusted=True)
        self._named.move_to_end(name)
        return self._named[name]

    def _abandon(self, request: Request) -> None:
        """Forget `request` and what was traced of it."""
        request.forget()
        with self._lock:
            if self._named.get(request.name) is request:
                del self._named[request.name]
            if self._own.__dict__.get("request") is request:
                del self._own.request

    def _weigh(self, request: Request) -> bool:
        """Note the size of `request`, used last; whether it has grown."""
        size = request.nbytes
        with self._lock:
            grown = self._sizes.pop(request, 0) < size
            self._sizes[request] = size
            return grown

    def _make_room(self, last: Request, device: torch.device) -> None:
        """Free what others than `last` hold, those used longest ago first, where all are beyond the limit."""
        with self._lock:
            total, limit, lost = sum(self._sizes.values()), self._limit_on(device), 0
            for other in list(self._sizes):
                if total <= limit or other is last:
                    break
                if self._sizes[other] and _lose_if_idle(other):
                    total, lost = total - self._sizes[other], lost + 1
                    self._sizes[other] = 0
        if lost:
            warnings.warn(
                f"requests under way hold more than {limit >> 20} MiB of residuals: those used longest ago lose theirs "
                "and go on at their own step; raise compiled.memory_limit, or end requests with compiled.reset()",
                RuntimeWarning,
                stacklevel=2,
            )

    def _limit_on(self, device: torch.device) -> int:
        return _memory(device) // SHARE if self.limit is None else self.limit


def _lose_if_idle(request: Request, leave: Callable[[Request], None] | None = None) -> bool:
    if not request.busy.acquire(blocking=False):
        return False
    try:
        if leave is not None:
            with suppress(EditError):  # what its next call, or its end, will raise
                leave(request)
        request.lose()
    finally:
        request.busy.release()
    return True


def _memory(device: torch.device) -> int:
    """Bytes of memory on `device`, or of the host."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
