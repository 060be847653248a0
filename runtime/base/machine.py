"""What tells one machine's speed from another's."""

from __future__ import annotations

import os
import platform
import re
from contextlib import suppress
from pathlib import Path

BUSY = 0.1
"""A machine is too busy for timing where threads wait for a core for more than that share of the time."""


def cpu_model() -> str:
    """The processor's name, with the matrix and vector units that decide how fast bf16 is."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    flags = re.search(r"^flags\s*:\s*(.+)$", text, re.M)
    units = [unit for unit in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flags and unit in flags[1].split()]
    name = model[1] if model else platform.machine()
    return f"{name} ({units[0]})" if units else name


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class CoreWait:
    """For how much of the time since it was made this process's threads had work, but no core."""

    def __init__(self) -> None:
        self._begun = core_seconds()

    @property
    def share(self) -> float:
        """In [0, 1]; 0 where the system does not count it (it is Linux that does)."""
        ran, waited = (now - before for now, before in zip(core_seconds(), self._begun, strict=True))
        return max(waited, 0.0) / max(ran + waited, 1e-9)


def core_seconds() -> tuple[float, float]:
    """Seconds for which the threads of this process ran, and for which they waited for a core; 0 where not known."""
    ran = waited = 0
    for place in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError, ValueError):  # a thread that has ended
            on, off, _ = map(int, place.read_text().split())
            ran, waited = ran + on, waited + off
    return ran / 1e9, waited / 1e9
