"""What turns a step into something that runs without the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from runtime.base.errors import RecordError


@dataclass(frozen=True)
class Condition:
    """What a kernel sets to choose the body of a switch (`cudaGraphSetConditional`)."""

    handle: int


Argument = Tensor | Condition | int | None
"""Of a kernel: the address of a tensor's first element (null for None), a condition's handle (64 bits), an int (32)."""

Work = Callable[[], Sequence[Tensor]]


class Recorder(Protocol):
    """Records what is done on the device, with the tensors that it is done to, and does it again.

    Inside `record` nothing may read a tensor on the host, and every tensor that must be there at a replay has to be
    kept by the caller, save those that the recorded work makes itself.
    """

    def turn(self) -> AbstractContextManager[None]:
        """Entered around all that a call does on the device: calls of other threads and streams are over by then."""

    def finish(self) -> None:
        """Wait for all calls so far."""

    def record(self, work: Work) -> Work:
        """What replays `work` on the current stream and gives the very tensors that `work` gave.

        `work` may be run more than once, with the bodies of all switches in turn: what it leaves in the caller's
        tensors is not a result. What it makes itself may be overwritten by any other replay.
        """

    def launch(self, kernel: str, *arguments: Argument) -> None:
        """Run the function `kernel` of ``decide.cu`` on the current stream; also outside `record`."""

    def condition(self) -> Condition:
        """A condition for one switch of what is being recorded."""

    def switch(self, condition: Condition, bodies: Sequence[Callable[[], None]]) -> None:
        """Record all `bodies`; a replay runs the one that `condition` was set to, none if that is past the last."""


def absent(device: torch.device) -> str | None:
    """Why there is no recorder for `device`; None where there may be one."""
    return None if device.type == "cuda" else f"steps are recorded on a GPU, and this program is on {device}"


def recorder_for(device: torch.device) -> Recorder:
    """The recorder for `device`; RecordError where what it needs is missing."""
    from runtime.device.cuda_graph import CudaRecorder

    try:
        return CudaRecorder(device)
    except RecordError:
        raise
    except Exception as error:  # libraries that are not there, or not the ones that fit
        raise RecordError(f"{error} (cuda-bindings and NVRTC: pip install '.[device-dispatch]')") from error
