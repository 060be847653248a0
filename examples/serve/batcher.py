"""Continuous batching: jobs join and leave a running batch at any sampling step. Plain threads, no server in here."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import InvalidStateError
from typing import Any, Protocol

from examples.serve.jobs import Ask, Draining, Drawn, Job, QueueFull, Stopped, TimedOut

log = logging.getLogger(__name__)


class Sampler(Protocol):
    """What advances images; a drawing is one under way, immutable, with `done`. See `sampling.EulerSampler`.

    `most_together`: drawings of a call.
    """

    most_together: int

    def check(self, ask: Ask) -> Ask: ...
    def begin(self, name: str, ask: Ask) -> Any: ...
    def advance(self, drawings: Sequence[Any]) -> list[Any]: ...
    def image(self, drawing: Any) -> Any: ...
    def flops_share(self, drawing: Any) -> float: ...
    def end(self, name: str) -> None: ...


class Watch:
    """Is told what happens; does nothing."""

    def queued(self, waiting: int) -> None:
        """So many jobs wait."""

    def taken(self, job: Job) -> None:
        """It waits, or soon runs; `ended` is told of it later."""

    def advanced(self, rows: int, seconds: float) -> None:
        """A step of so many jobs was taken."""

    def ended(self, job: Job, outcome: str) -> None:
        """With "done", "cancelled", "timed out", "failed" or "stopped"."""


class Batcher:
    """A thread that takes one step after another, each of up to `max_batch` jobs, whatever step each of them is at.

    At most `max_waiting` jobs wait for a place. Jobs of a call that raises begin anew, each in calls of its own, so
    that the one at fault fails alone; the images of the others are what they would have been. Once `ending` gives True,
    no job is taken.
    """

    def __init__(
        self,
        sampler: Sampler,
        *,
        max_batch: int = 8,
        max_waiting: int = 32,
        watch: Watch | None = None,
        ending: Callable[[], bool] = lambda: False,
    ) -> None:
        most = sampler.most_together
        if not 1 <= max_batch <= most or max_waiting < 1:
            raise ValueError(f"max_batch={max_batch} is from 1 to {most}, max_waiting={max_waiting} at least 1")
        self._sampler, self._max_batch, self._max_waiting = sampler, max_batch, max_waiting
        self._watch, self._ending = watch or Watch(), ending
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._changed = threading.Condition()
        self._numbers = itertools.count(1)
        self._draining = self._stopping = False
        self._crash: Exception | None = None
        self._seconds_per_job = 1.0
        self._looked = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    def submit(self, ask: Ask, timeout: float | None = None) -> Job:
        """A job that ends within `timeout` seconds, or with TimedOut.

        Draining or QueueFull where nothing is taken, Refused for what cannot be had.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            if self._draining or self._crash is not None or self._ending():
                raise Draining()
            checked = self._sampler.check(ask)
            self._sweep()
            if len(self._waiting) >= self._max_waiting:
                raise QueueFull(len(self._waiting), self._retry_after())
            job = Job(f"image {next(self._numbers)}", checked, deadline)
            self._watch.taken(job)
            if not (self._waiting or self._running):
                self._looked = time.monotonic()  # whether it gets on is told from now
            self._waiting.append(job)
            self._watch.queued(len(self._waiting))
            self._changed.notify_all()
        return job

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more and wait for the jobs there are; whether all ended within `timeout` seconds."""
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: not (self._waiting or self._running), timeout)

    def close(self) -> None:
        """End at the next step; jobs that are not done get Stopped."""
        with self._changed:
            self._draining = self._stopping = True
            self._changed.notify_all()
        self._thread.join()

    def check(self, stalled: float = 60.0) -> None:
        """RuntimeError where no job can get on: the thread died, or one step has taken `stalled` seconds."""
        if self._crash is not None:
            raise RuntimeError(f"the batcher died: {self._crash!r}") from self._crash
        busy = self._waiting or self._running
        if busy and time.monotonic() - self._looked > stalled:
            raise RuntimeError(f"no step has ended for {stalled:.0f} s")

    @property
    def load(self) -> tuple[int, int]:
        """Jobs running, and waiting."""
        return len(self._running), len(self._waiting)

    def _run(self) -> None:
        try:
            while self._wait():
                self._tick()
        except Exception as error:  # of the batcher or the sampler's bookkeeping, not of a job
            log.exception("the batcher died")
            self._crash = error
        with self._changed:
            left, self._running = [*self._running, *self._waiting], []
            self._waiting.clear()
            for job in left:
                self._end(job, "stopped", error=Stopped("the server stopped before the image was done: ask again"))
            self._changed.notify_all()

    def _wait(self) -> bool:
        """Wait for a job; whether to go on."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._running or self._stopping)
            self._looked = time.monotonic()
            return not self._stopping

    def _tick(self) -> None:
        """One step of every job there is room for."""
        for job in [job for job in self._running if _over(job)]:
            self._give_up(job)
        self._join()
        together = [job for job in self._running if not job.alone]
        for group in [together, *([job] for job in self._running if job.alone)]:
            if group:
                self._advance(group)
                self._looked = time.monotonic()
        for job in [job for job in self._running if job.drawing.done]:
            self._deliver(job)

    def _join(self) -> None:
        """Let jobs that wait take the free places."""
        with self._changed:
            self._sweep()
            free = self._max_batch - len(self._running)
            joining = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
            self._running += joining
            self._watch.queued(len(self._waiting))
        for job in joining:
            job.waited = job.age
            self._begin(job)

    def _sweep(self) -> None:
        """Let jobs go that gave up waiting."""
        for job in [job for job in self._waiting if _over(job)]:
            self._waiting.remove(job)
            self._give_up(job)
            self._watch.queued(len(self._waiting))
            self._changed.notify_all()

    def _begin(self, job: Job) -> None:
        try:
            job.drawing = self._sampler.begin(job.name, job.ask)
        except Exception as error:
            self._leave(job, "failed", error=error)

    def _advance(self, group: list[Job]) -> None:
        began = time.monotonic()
        try:
            advanced = self._sampler.advance([job.drawing for job in group])
        except Exception as error:
            self._failed(group, error)
            return
        seconds = time.monotonic() - began
        for job, drawing in zip(group, advanced, strict=True):
            job.drawing = drawing
            job.computed += seconds
        self._watch.advanced(len(group), seconds)

    def _failed(self, group: list[Job], error: Exception) -> None:
        """A call raised, which ended all the requests in it: who was alone fails, others begin anew, each alone."""
        if len(group) == 1:
            self._leave(group[0], "failed", error=error)
            return
        log.warning("a step of %d jobs failed, each begins anew by itself: %s", len(group), error)
        for job in group:
            job.alone, job.restarts = True, job.restarts + 1
            self._forget(job)
            self._begin(job)

    def _deliver(self, job: Job) -> None:
        assert job.ask.steps is not None
        self._seconds_per_job += 0.1 * (job.computed - self._seconds_per_job)
        try:
            image, share = self._sampler.image(job.drawing), self._sampler.flops_share(job.drawing)
        except Exception as error:
            self._leave(job, "failed", error=error)
            return
        took = job.waited, job.computed, share, job.restarts
        self._leave(job, "done", Drawn(image, job.ask.tier, job.ask.steps, *took))

    def _leave(self, job: Job, outcome: str, drawn: Drawn | None = None, error: Exception | None = None) -> None:
        """Hand over what became of a running job, and give its place and its residuals back."""
        self._end(job, outcome, drawn, error)
        self._forget(job)
        with self._changed:
            self._running.remove(job)
            self._changed.notify_all()

    def _give_up(self, job: Job) -> None:
        """For one that was cancelled or is late, whether it runs or waits."""
        error = TimedOut(f"the image was not done in the time that it was given; {job.age:.1f} s are over")
        ending = self._leave if job in self._running else self._end
        ending(job, "cancelled" if job.future.cancelled() else "timed out", error=error)

    def _forget(self, job: Job) -> None:
        try:
            self._sampler.end(job.name)
        except Exception as error:  # what a GPU came upon in a request is said when it ends
            log.warning("%s ended with: %s", job.name, error)

    def _end(self, job: Job, outcome: str, drawn: Drawn | None = None, error: Exception | None = None) -> None:
        """Hand over what became of the job, unless it was cancelled meanwhile."""
        try:
            if error is not None:
                job.future.set_exception(error)
            else:
                assert drawn is not None
                job.future.set_result(drawn)
        except InvalidStateError:
            outcome = "cancelled"
        self._watch.ended(job, outcome)

    def _retry_after(self) -> float:
        """Seconds after which there should be room."""
        return max(1.0, self._seconds_per_job * len(self._waiting) / self._max_batch)


def _over(job: Job) -> bool:
    return job.future.cancelled() or job.late
