"""``decide.cu``, compiled by NVRTC for the GPU that runs it.

Unverified: no GPU has run it. That it compiles, for the GPUs from sm_80 to sm_120, is tested, and so is what it
computes, by compiling the same text for a CPU.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from runtime.base.errors import RecordError
from runtime.device.recorder import Argument, Condition

KERNELS = ("advance", "decide")


class Kernels:
    """The functions of ``decide.cu`` on `device`; RecordError where they cannot be compiled or loaded."""

    def __init__(self, device: torch.device) -> None:
        from cuda.bindings import driver

        self._driver = driver
        major, minor = torch.cuda.get_device_capability(device)
        with torch.cuda.device(device):
            self._module = checked(driver.cuModuleLoadData(compile_source(f"sm_{major}{minor}")))
            self._functions = {
                name: checked(driver.cuModuleGetFunction(self._module, name.encode())) for name in KERNELS
            }

    def launch(self, kernel: str, arguments: Sequence[Argument], stream: int) -> None:
        """Enqueue one thread of `kernel` on the stream with the handle `stream`."""
        values, types = zip(*map(_plain, arguments), strict=True)
        driver, function = self._driver, self._functions[kernel]
        checked(driver.cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, driver.CUstream(stream), (values, types), 0))


def compile_source(architecture: str) -> bytes:
    """``decide.cu`` as a cubin for `architecture` ("sm_90"), which takes NVRTC but no GPU; RecordError otherwise."""
    from cuda.bindings import nvrtc

    source = files("runtime.device").joinpath("decide.cu").read_bytes()
    program = checked(nvrtc.nvrtcCreateProgram(source, b"decide.cu", 0, [], []))
    options = [f"--gpu-architecture={architecture}".encode()]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if status:
        told = bytearray(checked(nvrtc.nvrtcGetProgramLogSize(program)))
        checked(nvrtc.nvrtcGetProgramLog(program, told))
        raise RecordError(f"NVRTC cannot compile decide.cu for {architecture}: {told.decode().strip(chr(0) + chr(10))}")
    cubin = bytearray(checked(nvrtc.nvrtcGetCUBINSize(program)))
    checked(nvrtc.nvrtcGetCUBIN(program, cubin))
    return bytes(cubin)


def checked(result: tuple[Any, ...]) -> Any:
    """The value, or values, of a call of CUDA; RecordError, naming who called, where its status is not success."""
    status, *values = result
    if status:
        caller = sys._getframe(1)
        where = f"{caller.f_code.co_name}, line {caller.f_lineno}"
        raise RecordError(f"CUDA gives {status.name} ({where}): its driver may be too old, or its memory used up")
    return values[0] if len(values) == 1 else values


def _plain(argument: Argument) -> tuple[int, type]:
    if argument is None:
        return 0, ctypes.c_void_p
    if isinstance(argument, Tensor):
        return argument.data_ptr(), ctypes.c_void_p
    return (argument.handle, ctypes.c_ulonglong) if isinstance(argument, Condition) else (argument, ctypes.c_int)
