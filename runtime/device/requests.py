"""Whose residuals a recorded step uses: a request's clock is on the device, and so is the decision to begin anew.

The host knows a call's cache context and shapes, but not its timestep, for which it would have to wait. So calls
without a context are one context here. Where there are two at one timestep, the branches of guidance cannot be told
apart: the clock then says so, and nothing is reused until the request is dropped.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from weakref import finalize

import torch

from runtime.device.recorder import Recorder
from runtime.device.step import Step
from runtime.state import Signature
from runtime.trace import RequestTrace, Trace

UNNAMED = "branch 0"
"""The context of calls that come without one."""


class Clock:
    """Where a request is: `last` (times,) float64, its timestep; `fields` (6,) int32, see ``decide.cu``."""

    def __init__(self, times: int, device: torch.device) -> None:
        self.last = torch.zeros(times, dtype=torch.float64, device=device)
        self.fields = torch.zeros(6, dtype=torch.int32, device=device)

    def advance(self, recorder: Recorder, step: Step, named: bool) -> None:
        """Come to the timestep that `step` was given, in its context."""
        recorder.launch(
            "advance", step.time, self.last, self.last.numel(), int(named), self.fields, step.own, step.held,
            step.held.numel(),
        )  # fmt: skip


class Ledger:
    """The traces of a request, which begins anew on the device: one for each of its clock's epochs."""

    def __init__(self, name: str, traces: Trace) -> None:
        self.name = name
        self._traces = traces
        self._epoch = -1
        self._record: RequestTrace | None = None

    def record(self, epoch: int) -> RequestTrace:
        """The trace of `epoch`; they come in order."""
        if self._record is None or epoch != self._epoch:
            self._epoch, self._record = epoch, self._traces.begin(self.name)
        return self._record

    def forget(self) -> None:
        """Take back the trace of the last epoch."""
        if self._record is not None:
            self._traces.discard(self._record)
            self._record = None


class DeviceRequest:
    """The state of one request between its calls: its clock, and the recorded step of each of its contexts.

    The steps go back to `give_back` when the request is no more, or begins anew with other shapes.
    """

    def __init__(self, name: str, traces: Trace, give_back: Callable[[Signature, Step], None]) -> None:
        self.name = name
        self.busy = threading.Lock()
        self._traces = traces
        self._give_back = give_back
        self.ledger = Ledger(name, traces)
        self.clock: Clock | None = None
        self._take_steps()

    def step(self, context: str, signature: Signature, times: int, make: Callable[[], Step]) -> Step:
        """The step of `context`, from `make` where it has none; a new request where the shapes have changed."""
        found = self._steps.get(context)
        if (found is not None and found[0] != signature) or (self.clock and self.clock.last.numel() != times):
            self._end()
            self.ledger, self.clock, found = Ledger(self.name, self._traces), None, None
            self._take_steps()
        if found is None:
            found = self._steps[context] = (signature, make())
        if self.clock is None:
            self.clock = Clock(times, found[1].own.device)
        return found[1]

    def forget(self) -> None:
        """Take back what was traced."""
        self.ledger.forget()

    def _take_steps(self) -> None:
        """Steps of our own, that go back when they are no longer needed."""
        self._steps: dict[str, tuple[Signature, Step]] = {}
        self._end = finalize(self, _return, self._steps, self._give_back)
        self._end.atexit = False


def _return(steps: dict[str, tuple[Signature, Step]], give_back: Callable[[Signature, Step], None]) -> None:
    for signature, step in steps.values():
        give_back(signature, step)


class Shelf:
    """Steps that nobody uses now, by what they were recorded for."""

    def __init__(self) -> None:
        self._free: dict[Signature, list[Step]] = {}

    def take(self, signature: Signature, make: Callable[[], Step]) -> Step:
        """A step for `signature` without residuals, from `make` where none is left."""
        try:
            step = self._free.get(signature, []).pop()
        except IndexError:
            return make()
        step.reset()
        return step

    def give_back(self, signature: Signature, step: Step) -> None:
        """Let another request have `step`."""
        self._free.setdefault(signature, []).append(step)
