"""What a server is asked for, what it gives, and how a job can end otherwise."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Ask:
    """One image: of the class `label`, from the noise of `seed`, in `steps` steps, decided by the bundle's `tier`.

    `steps` None: as many as the tier was made for. `tier` None: every block is computed.
    """

    label: int
    seed: int = 0
    tier: str | None = None
    steps: int | None = None


@dataclass(frozen=True)
class Drawn:
    """An image, and what it took.

    `image` is what the sampler gives. `queue_seconds` passed before its first step, `compute_seconds` in calls that it
    had rows in, alone or with others. `flops_share` is what its rows took of the dense model's FLOPs. `restarts`: how
    often it began anew, because a call that it shared failed.
    """

    image: Any
    tier: str | None
    steps: int
    queue_seconds: float
    compute_seconds: float
    flops_share: float
    restarts: int


class Refused(ValueError):
    """What was asked for is not there: the message names what is."""


class Unavailable(RuntimeError):
    """Nothing is taken now; `retry_after` seconds may help, None where they will not."""

    retry_after: float | None = None


class QueueFull(Unavailable):
    """As many jobs wait as may."""

    def __init__(self, waiting: int, retry_after: float) -> None:
        super().__init__(f"{waiting} jobs are waiting, which is the limit: ask again in {retry_after:.0f} s")
        self.retry_after = retry_after


class Draining(Unavailable):
    """The server finishes what it has and takes no more."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down: it finishes its jobs and takes no new ones")


class TimedOut(TimeoutError):
    """A job was not done in the time that it was given."""


class Stopped(RuntimeError):
    """The server stopped before the job was done."""


@dataclass(eq=False)
class Job:
    """An accepted `ask`: `future` gives its `Drawn`; `future.cancel()` ends it at the next step, with its residuals.

    All other fields are the batcher's own. `deadline` is on the clock of time.monotonic. `alone`: it shares no call any
    more, because one that it shared failed.
    """

    name: str
    ask: Ask
    deadline: float | None
    submitted: float = field(default_factory=time.monotonic)
    future: Future[Drawn] = field(default_factory=Future)
    drawing: Any = None
    waited: float = 0.0
    computed: float = 0.0
    restarts: int = 0
    alone: bool = False

    @property
    def late(self) -> bool:
        """Whether its deadline has passed."""
        return self.deadline is not None and time.monotonic() > self.deadline

    @property
    def age(self) -> float:
        """Seconds since it was accepted."""
        return time.monotonic() - self.submitted
