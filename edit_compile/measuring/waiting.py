"""Whether a machine was too busy to be timed on."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from runtime.base.machine import BUSY, CoreWait


@contextmanager
def warning_of_waits() -> Iterator[None]:
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
