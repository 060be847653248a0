"""What tells one machine's speed from another's."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path


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
