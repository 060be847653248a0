"""The stream on which an engine's library works, in step with the stream on which torch works.

Unverified: no GPU has run this; the order of waits is tested with streams that are stood in for.

What is enqueued inside `enqueueing` or `own_stream_in_step` comes after what torch has enqueued and before what it will
enqueue; the host waits for neither. Memory that torch frees meanwhile is safe: it is handed out again on torch's stream
alone, which by then waits for the other.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_own: dict[torch.device, torch.cuda.Stream] = {}
_lock = threading.Lock()


def own_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream of ours on `device`, an indexed one; made when first asked for."""
    with _lock:
        return _own.get(device) or _own.setdefault(device, torch.cuda.Stream(device))


@contextmanager
def own_stream_in_step(device: torch.device) -> Iterator[int]:
    """The handle of our own stream, which waits for torch's current one here, and for which that waits afterwards."""
    current, own = torch.cuda.current_stream(device), own_stream(device)
    with torch.cuda.device(device):
        own.wait_stream(current)
        try:
            yield own.cuda_stream
        finally:
            current.wait_stream(own)


@contextmanager
def enqueueing(device: torch.device) -> Iterator[int]:
    """The handle of torch's current stream; of our own in step with it where that is the default stream.

    Libraries that take a stream per call wait for the GPU where it is the default one.
    """
    current = torch.cuda.current_stream(device).cuda_stream
    if current:
        with torch.cuda.device(device):
            yield current
        return
    with own_stream_in_step(device) as own:
        yield own
