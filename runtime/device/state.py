"""What a request has on the device: its clock, which carries out `runtime.requests.rule` there, and its steps.

The host does not wait for a call's timestep or latents: `advance` in ``decide.cu`` compares them. What it cannot know
it leaves to the host, by a RecordError: another number of timesteps, another shape of latents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import finalize

import torch
from torch import Tensor

from runtime.base.errors import EditError, RecordError
from runtime.device.recorder import Recorder
from runtime.device.step import Step
from runtime.requests.evidence import Chain
from runtime.requests.request import Request, Told
from runtime.requests.rule import Place
from runtime.requests.sighting import Sighting, one_if_equal
from runtime.requests.trace import RequestTrace, Trace

FIELDS = 12
"""Numbers of a clock (see ``decide.cu``)."""
_TICK, _VERDICT, _OWN_TICK = 10, 11, 2

Recorded = tuple[object, ...]
"""What a step was recorded for: its glue, shapes, settings of torch, and whether routers run."""


class Clock:
    """Where a request is.

    `last` and `begun` (times,) float64: its timesteps now and at first. `fields` (FIELDS,) int32: see ``decide.cu``.
    """

    def __init__(self, times: int, device: torch.device) -> None:
        self.last = torch.zeros(times, dtype=torch.float64, device=device)
        self.begun = torch.zeros(times, dtype=torch.float64, device=device)
        self.fields = torch.zeros(FIELDS, dtype=torch.int32, device=device)

    def advance(
        self,
        recorder: Recorder,
        step: Step,
        seen: Sighting,
        chain: Chain | None,
        told: Told,
        trusted: bool,
    ) -> Tensor | None:
        """Come to the call `seen` of a branch, which `step` runs; a sample of its latents, None without a `chain`."""
        sample = gram = first = astray = None
        if chain is not None and seen.latents is not None:
            sample = chain.sample(seen.latents)
            gram, first = chain.gram(sample).contiguous(), chain.begins_again(sample).int().reshape(1)
            astray = chain.astray(sample).int().reshape(1)
        flags = told.renewed + 2 * told.fresh + 4 * told.anew + 8 * trusted
        rows, _, vectors = (0, 0, 0) if gram is None else gram.shape
        recorder.launch(
            "advance", step.time, self.last, self.begun, self.last.numel(), gram, rows, vectors, first,
            astray, torch.full((1,), seen.eps, dtype=torch.float64, device=self.last.device), flags,
            self.fields, step.own, step.held, step.held.numel(),
        )  # fmt: skip
        if chain is not None and sample is not None:
            chain.begin_where(self.new, sample)
        return sample

    @property
    def place(self) -> Place | None:
        """Where it is, None before it has started. Synchronises with the device."""
        started, step, calls, direction, broke, left, split, doubts, *_ = self.fields.tolist()
        times, begun = (one_if_equal(tensor.tolist()) for tensor in (self.last, self.begun))
        known = bool(broke), bool(left), bool(split), doubts
        return Place(step, calls, times, begun, direction, *known) if started else None

    @property
    def new(self) -> Tensor:
        """Whether a generation began with the last call: () bool."""
        return self.fields[_VERDICT] == 1

    def start_at(self, place: Place) -> None:
        """Go on from `place`, in the first tick."""
        for own, times in ((self.last, place.times), (self.begun, place.begun)):
            own.copy_(torch.tensor(times, dtype=torch.float64).expand(own.shape))
        self.fields[_TICK] = 1
        known = [place.broke, place.left, place.split, place.doubts]
        fields = [1, place.step, place.calls, place.direction, *map(int, known)]
        self.fields[: len(fields)].copy_(torch.tensor(fields, dtype=torch.int32))


class Ledger:
    """The traces of a request, which begins anew on the device: one for each of its clock's epochs.

    Once the request has come upon an error it is `closed`: what else was decided in it is not written down.
    """

    def __init__(self, name: str, traces: Trace, record: RequestTrace | None) -> None:
        self.name = name
        self.closed = False
        self._traces = traces
        self._epoch = 0
        self._record = record

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
    """What a request uses and others may use after it: steps by branch and whether routers run, and its clock."""

    steps: dict[tuple[int, Recorded], Step] = field(default_factory=dict)
    clock: Clock | None = None


class Shelf:
    """Steps and clocks that nobody uses now; they are not freed as long as this is, since the device may be late."""

    def __init__(self) -> None:
        self._steps: dict[Recorded, list[Step]] = {}
        self._clocks: dict[int, list[Clock]] = {}

    def take(self, recorded: Recorded, make: Callable[[], Step]) -> Step:
        """A step for `recorded` without residuals, from `make` where none is left."""
        try:
            step = self._steps.get(recorded, []).pop()
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
        for (_, recorded), step in belongings.steps.items():
            self._steps.setdefault(recorded, []).append(step)
        if belongings.clock is not None:
            self._clocks.setdefault(belongings.clock.last.numel(), []).append(belongings.clock)


class DeviceState:
    """The part of `request` that is on the device. `error` is what a call of it came upon.

    What it uses goes back to `shelf` when it is no more.
    """

    def __init__(self, request: Request, traces: Trace, shelf: Shelf) -> None:
        self.error: EditError | None = None
        self.ledger = Ledger(request.name, traces, request.trace)
        self._shelf, self._place = shelf, request.place
        self._seen = request.seen
        self._last: dict[int, Recorded] = {}
        self._mine = Belongings()
        finalize(self, shelf.give_back, self._mine).atexit = False

    def step(self, branch: int, recorded: Recorded, seen: Sighting, make: Callable[[], Step]) -> tuple[Step, Clock]:
        """The step of a branch, from `make` where there is none to have, and the clock.

        A step that takes over from another recording of the branch comes without residuals, but knows when the branch
        was called last. RecordError where the host has to say what the call is to the request.
        """
        times, clock = seen.timestep.numel(), self._mine.clock
        if clock is not None and clock.last.numel() != times:
            raise RecordError("the number of timesteps changed within a request")
        if self._place is not None and not {len(self._place.times), len(self._place.begun)} <= {1, times}:
            raise RecordError("the number of timesteps changed within a request")
        found = self._mine.steps.get((branch, recorded))
        if found is None:
            found = self._mine.steps[branch, recorded] = self._shelf.take(recorded, make)
        last = self._last.get(branch)
        if last is None:
            found.own[_OWN_TICK] = int(branch in self._seen)
        elif last != recorded:
            found.empty()
            found.own[_OWN_TICK].copy_(self._mine.steps[branch, last].own[_OWN_TICK])
        if clock is None:
            clock = self._mine.clock = self._shelf.clock(times, found.own.device)
            if self._place is not None:
                clock.start_at(self._place)
        self._last[branch] = recorded
        return found, clock

    @property
    def place(self) -> Place | None:
        """Where the request is. Synchronises with the device."""
        return self._place if self._mine.clock is None else self._mine.clock.place

    def seen(self) -> set[int]:
        """The branches that have been called in the current step. Synchronises with the device."""
        if self._mine.clock is None:
            return set(self._seen)
        tick, here = int(self._mine.clock.fields[_TICK]), {branch for branch, _ in self._mine.steps}
        found = {branch for (branch, _), step in self._mine.steps.items() if int(step.own[_OWN_TICK]) == tick}
        return found | (self._seen - here if tick == 1 else set())  # on the host, in the step of the handover
