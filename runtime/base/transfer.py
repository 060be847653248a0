"""What little goes between the host and a GPU while a model runs.

With decisions on the host (`runtime.device` is the other way) it waits for the GPU

- twice per call: for whether the inputs are finite (`runtime.face.arguments.check_finite`), which is to be known before
  anything is kept of them, and for the timestep, which tells one request from the next. The first wait leaves next to
  nothing for the second;
- once per guard that has a router, for its logits: what the host enqueues next depends on them.

Everything else is enqueued: plans, glue, routers, banks, and the regrouping of rows. Unverified: no GPU has run this.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

_kept = threading.local()


def to_host(tensor: Tensor) -> list[Any]:
    """`tensor` as (nested) lists.

    From a GPU it is one copy into pinned memory, enqueued behind what makes `tensor`, and a wait for that copy: not for
    what other streams do, nor by way of the pageable memory that `Tensor.tolist` takes.
    """
    if not tensor.is_cuda:
        return tensor.tolist()
    return _landing(tensor).fetch(tensor)


@lru_cache(maxsize=4096)
def row_index(rows: tuple[int, ...], device: torch.device) -> Tensor:
    """`rows` as an int64 tensor on `device`, made once: to make it on a GPU is a copy that the host waits for."""
    with torch.inference_mode(False):  # what is kept is for calls outside of it too
        return torch.tensor(rows, dtype=torch.int64, device=device)


class _Landing:
    """Pinned memory that tensors of one shape are copied to, and the event that tells when they are there."""

    def __init__(self, like: Tensor) -> None:
        self._host = _pinned(like)
        self._event = torch.cuda.Event()

    def fetch(self, tensor: Tensor) -> list[Any]:
        self._host.copy_(tensor, non_blocking=True)
        self._event.record(torch.cuda.current_stream(tensor.device))
        self._event.synchronize()
        return self._host.tolist()


def _landing(tensor: Tensor) -> _Landing:
    """This thread's own for tensors like this one: two threads never write into the same."""
    key = (tensor.device, tensor.dtype, tensor.shape)
    places: dict[object, _Landing] = _kept.__dict__.setdefault("places", {})
    found = places.get(key)
    if found is None:
        found = places[key] = _Landing(tensor)
    return found


def _pinned(like: Tensor) -> Tensor:
    with torch.inference_mode(False):
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
