"""Timing several callables against each other in one process, fairly."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from runtime.base.machine import BUSY, CoreWait

Call = Callable[[], object]


@dataclass(frozen=True)
class Spread:
    """Median with the 25th and 75th percentile of `count` values."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: npt.ArrayLike) -> Spread:
        """Raises ValueError where there are no values."""
        array = np.asarray(values, dtype=float).ravel()
        if not array.size:
            raise ValueError("there is nothing to take the median of")
        low, median, high = np.percentile(array, (25, 50, 75))
        return cls(float(median), float(low), float(high), array.size)

    def __str__(self) -> str:
        return f"{self.median:.4g} ({self.low:.4g} to {self.high:.4g})"


def interleaved(
    runs: Mapping[str, Sequence[Call]], repeats: int, warmup: int = 1, before_run: Call | None = None
) -> dict[str, npt.NDArray[np.float64]]:
    """Seconds of every call, per name as (repeats, steps).

    Step k of all runs is timed before step k + 1 of any, and which one goes first alternates, so that a machine that
    slows down slows all of them. `before_run` is called, untimed, before each of the `warmup` + `repeats` rounds. Warns
    where the machine was too busy with other things.

    Raises:
        ValueError: no repeats, or runs of different lengths.
    """
    lengths = {len(calls) for calls in runs.values()}
    if repeats < 1 or len(lengths) != 1 or lengths == {0}:
        raise ValueError("interleaved needs at least one repeat, and runs of one equal length above zero")
    (steps,) = lengths
    seconds = {name: np.zeros((repeats, steps)) for name in runs}
    order = list(runs)
    with _warning_of_waits():
        for repeat in range(-warmup, repeats):
            if before_run:
                before_run()
            for step in range(steps):
                order.reverse()
                for name in order:
                    elapsed = timed(runs[name][step])
                    if repeat >= 0:
                        seconds[name][repeat, step] = elapsed
    return seconds


@contextmanager
def _warning_of_waits() -> Iterator[None]:
    """UserWarning where, inside the ``with`` block, threads waited for a core for more than a `BUSY` share of time."""
    wait = CoreWait()
    yield
    share = wait.share
    if share > BUSY:
        warnings.warn(
            f"threads waited for a core for {share:.0%} of the time in which they had work: these times tell "
            "little, since other work holds cores, or this process has more threads than cores (OMP_NUM_THREADS=1)",
            stacklevel=4,
        )


def timed(call: Call) -> float:
    """Seconds of wall-clock of one call, with the GPU's queue empty before and after."""
    _synchronise()
    started = time.perf_counter()
    call()
    _synchronise()
    return time.perf_counter() - started


def _synchronise() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
