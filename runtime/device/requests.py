"""Whose residuals a recorded step uses: a request's clock is on the device, and so is the decision to begin anew.

The host knows a call's cache context and shapes, but not its timestep, for which it would have to wait. So calls
without a context are one context here. Where there are two at one timestep, the branches of guidance cannot be told
apart: the clock then says so, and nothing is reused until the request is dropped.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import finalize

import torch

from runtime.base.errors import EditError
from runtime.device.recorder import Recorder
from runtime.device.step import Step
from runtime.requests.state import Place, Signature
from runtime.requests.trace import RequestTrace, Trace

FIELDS = 6
"""Numbers of a clock (see ``decide.cu``)."""


class Clock:
    """Where a request is: `last` (times,) float64, its timestep; `fields` (FIELDS,) int32, see ``decide.cu``."""

    def __init__(self, times: int, device: torch.device) -> None:
        self.last = torch.zeros(times, dtype=torch.float64, device=device)
        self.fields = torch.zeros(FIELDS, dtype=torch.int32, device=device)

    def advance(self, recorder: Recorder, step: Step, named: bool) -> None:
        """Come to the timestep that `step` was given, in its context."""
        recorder.launch(
            "advance", step.time, self.last, self.last.numel(), int(named), self.fields, step.own, step.held,
            step.held.numel(),
        )  # fmt: skip

    @property
    def place(self) -> Place | None:
        """Where it is, None before it has started; waits for the device."""
        started, step, direction, *_ = self.fields.tolist()
        return Place(step, tuple(self.last.tolist()), direction) if started else None

    def start_at(self, place: Place) -> None:
        """Go on from `place`."""
        self.last.copy_(torch.tensor(place.times, dtype=torch.float64))
        self.fields[:3].copy_(torch.tensor([1, place.step, place.direction], dtype=torch.int32))


class Ledger:
    """The traces of a request, which begins anew on the device: one for each of its clock's epochs.

    Once the request has come upon an error it is `closed`: what else was decided in it is not written down.
    """

    def __init__(self, name: str, traces: Trace) -> None:
        self.name = name
        self.closed = False
        self._traces = traces
        self._epoch = -1
        self._record: RequestTrace | None = None

    def record(self, epoch: int) -> RequestTrace:
        """The trace of `epoch`; they come in order."""
        if self._record is None or epoch != self._epoch:
            self._epoch, self._record = epoch, self._traces.begin(self.name)
        return self._record

    def close(self) -> None:
        """Take back the trace of the last epoch, and write nothing more."""
        self.closed = True
        if self._record is not None:
            self._traces.discard(self._record)


@dataclass
class Belongings:
    """What a request uses and others may use after it: steps by context and whether routers run, and its clock."""

    steps: dict[tuple[str | None, bool], tuple[Signature, Step]] = field(default_factory=dict)
    clock: Clock | None = None


class Shelf:
    """Steps and clocks that nobody uses now; they are not freed as long as this is, since the device may be late."""

    def __init__(self) -> None:
        self._steps: dict[Signature, list[Step]] = {}
        self._clocks: dict[int, list[Clock]] = {}

    def take(self, signature: Signature, make: Callable[[], Step]) -> Step:
        """A step for `signature` without residuals, from `make` where none is left."""
        try:
            step = self._steps.get(signature, []).pop()
        except IndexError:
            return make()
        step.reset()
        return step

    def clock(self, times: int, device: torch.device) -> Clock:
        """A clock that has not started."""
        try:
            clock = self._clocks.get(times, []).pop()
        except IndexError:
            return Clock(times, device)
        clock.fields.zero_()
        return clock

    def give_back(self, belongings: Belongings) -> None:
        """Let other requests have them."""
        for signature, step in belongings.steps.values():
            self._steps.setdefault(signature, []).append(step)
        if belongings.clock is not None:
            self._clocks.setdefault(belongings.clock.last.numel(), []).append(belongings.clock)


class DeviceRequest:
    """The state of one request between its calls. `error` is what a call of it came upon; it begins anew after that.

    What it uses goes back to `shelf` when it is no more, or begins anew with other shapes.
    """

    def __init__(self, name: str, traces: Trace, shelf: Shelf) -> None:
        self.name = name
        self.busy = threading.Lock()
        self.error: EditError | None = None
        self._traces, self._shelf = traces, shelf
        self._shapes: dict[str | None, Signature] = {}
        self._begin()

    def step(
        self,
        context: str | None,
        shapes: Signature,
        routed: bool,
        times: int,
        place: Place | None,
        make: Callable[[], Step],
    ) -> tuple[Step, Clock]:
        """The step of `context`, from `make` where there is none to have, and the clock.

        A new request where the context's shapes have changed. One that has not started goes on from `place`. A step
        that was left for the other kind, with or without routers, comes back without its residuals.
        """
        clock = self._mine.clock
        if self._shapes.get(context, shapes) != shapes or (clock is not None and clock.last.numel() != times):
            self._end()
            self._begin()
        signature = (*shapes, routed)
        found = self._mine.steps.get((context, routed))
        if found is None:
            found = signature, self._shelf.take(signature, make)
            self._mine.steps[context, routed] = found
        elif self._last.get(context) != routed:
            found[1].empty()
        if self._mine.clock is None:
            self._mine.clock = self._shelf.clock(times, found[1].own.device)
            if place is not None and len(place.times) == times:
                self._mine.clock.start_at(place)
        self._shapes[context], self._last[context] = shapes, routed
        return found[1], self._mine.clock

    @property
    def place(self) -> Place | None:
        """Where it is; None before its first call. Waits for the device."""
        return None if self._mine.clock is None else self._mine.clock.place

    def forget(self) -> None:
        """Take back what was traced."""
        self.ledger.close()

    def _begin(self) -> None:
        self.ledger = Ledger(self.name, self._traces)
        self._shapes.clear()
        self._last: dict[str | None, bool] = {}
        self._mine = Belongings()
        self._end = finalize(self, self._shelf.give_back, self._mine)
        self._end.atexit = False
