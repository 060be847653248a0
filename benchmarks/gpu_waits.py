"""How often the host waits for the GPU: unverified, since no GPU has been here.

Two counts, neither of which sees all:

    counted    calls of CUDA that wait, of whatever library, by torch's profiler
    warned     waits of torch's own, by torch.cuda.set_sync_debug_mode, which does not know waits for an event

A copy from memory that is not pinned waits too, and shows in neither.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")
_REGION = "edit_compile: counted"


def host_waits(call: Callable[[], object], steps: int = 1) -> dict[str, Any]:
    """Both counts of `call`, which makes `steps` steps; `per_step` is the larger one / steps."""
    counted, warned = _counted(call), _warned(call)
    known = counted.values() if "unavailable" not in counted else ()
    return {"per_step": max(sum(known), warned) / steps, "counted": counted, "warned": warned}


def waits_within(events: Iterable[Any]) -> dict[str, int]:
    """Waits between the beginning and the end of the region, by name; the profiler itself waits after it."""
    seen = list(events)
    region = next(e.time_range for e in seen if e.name == _REGION and e.device_type == DeviceType.CPU)
    return dict(Counter(e.name for e in seen if e.name in WAITS and region.start <= e.time_range.start <= region.end))


def _counted(call: Callable[[], object]) -> dict[str, Any]:
    try:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler, record_function(_REGION):
            call()
        return waits_within(profiler.events())
    except (RuntimeError, StopIteration, AttributeError) as error:
        return {"unavailable": f"torch's profiler did not count: {type(error).__name__}: {error}"}


def _warned(call: Callable[[], object]) -> int:
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("called a synchronizing" in str(warning.message) for warning in told)
