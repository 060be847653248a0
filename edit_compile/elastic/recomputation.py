"""What torch.utils.checkpoint computes again in the backward pass is computed as the forward was.

A backward pass calls blocks when the forward is over, with several forwards behind it perhaps, and on a thread of its
own. So each checkpointed region remembers the forwards that were active when it was entered; while it runs again, those
are active. Reentrant checkpoints see neither the parameters of hooks nor gradients that leave by another way than
the region's outputs, as those of the routing do: inside an elastic forward they are made non-reentrant, which gives the
same gradients for the same memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import checkpoint as torch_checkpoint

if TYPE_CHECKING:
    from edit_compile.elastic.forward import Forward


class _Local(threading.local):
    """What is active in this thread, outermost first."""

    forwards: tuple[Forward, ...] = ()


_local = _Local()
_Frame = torch_checkpoint._CheckpointFrame
_Reentrant = torch_checkpoint.CheckpointFunction


def active_forward(owner: object) -> Forward | None:
    """The innermost forward of the elastic model `owner` that is running, or running again, in this thread."""
    return next((forward for forward in reversed(_local.forwards) if forward.owner is owner), None)


@contextmanager
def active(forward: Forward) -> Iterator[None]:
    """Inside the ``with`` block hooks act for `forward`, and so they will in what is computed again of it."""
    following = nullcontext() if torch.compiler.is_compiling() else _followed()  # torch.compile has a way of its own
    with following, _set((*_local.forwards, forward)):
        yield


def in_backward() -> bool:
    """Whether this thread runs a backward pass."""
    return torch._C._current_graph_task_id() != -1


@contextmanager
def _set(forwards: tuple[Forward, ...]) -> Iterator[None]:
    before, _local.forwards = _local.forwards, forwards
    try:
        yield
    finally:
        _local.forwards = before


def _frame(recompute: Callable[..., None], *settings: Any) -> Any:
    """A checkpointed region of whatever is active in this thread."""
    forwards = _local.forwards
    if not forwards:
        return _Frame(recompute, *settings)

    def again(*args: Any) -> None:
        with _followed(), _set(tuple(forward.again() for forward in forwards)):
            recompute(*args)

    return _Frame(again, *settings)


class _NotReentrant:
    """Stands for `CheckpointFunction`."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        """The outputs of ``function(*args)``."""
        if not _local.forwards:
            return _Reentrant.apply(function, preserve_rng_state, *args)
        return torch_checkpoint.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)


_lock = threading.Lock()
_followers = 0


@contextmanager
def _followed() -> Iterator[None]:
    """Inside the ``with`` block torch's checkpoints ask what is active, in whatever thread they are entered.

    Torch has no place to register this. Both names are looked up when a region is entered, so that it does not matter
    how a model came by `checkpoint`; elsewhere and afterwards they are torch's own.
    """
    global _followers
    with _lock:
        _followers += 1
        torch_checkpoint._CheckpointFrame = _frame  # type: ignore[assignment, misc]
        torch_checkpoint.CheckpointFunction = _NotReentrant  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        with _lock:
            _followers -= 1
            if not _followers:
                torch_checkpoint._CheckpointFrame = _Frame  # type: ignore[misc]
                torch_checkpoint.CheckpointFunction = _Reentrant  # type: ignore[misc]
