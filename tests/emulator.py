"""A recorder of steps for the CPU that is as strict as a CUDA graph.

Operators are recorded with the very tensors they were called with, and replayed on them: whatever a step keeps in
Python, or reads on the host, shows. While recording, nothing counts: results are overwritten with NaN afterwards.
``decide.cu`` is compiled by the C++ compiler of this machine, so that what decides here is what decides on a GPU.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from runtime.base.guard import _guard as answer_guard
from runtime.base.guard import guard
from runtime.device.recorder import Argument, Condition, Work

SHIM = """
#include <cmath>
#define __global__
#define __device__
#define __cudart_builtin__
#include "decide.cu"
extern "C" void cudaGraphSetConditional(unsigned long long handle, unsigned int value) { *(unsigned*)handle = value; }
"""
READS = ("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::nonzero", "aten::equal")


@cache
def library() -> ctypes.CDLL:
    """``decide.cu`` for this machine; skips the test where there is no C++ compiler."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    with tempfile.TemporaryDirectory() as folder:
        source, built = Path(folder) / "shim.cpp", Path(folder) / "decide.so"
        source.write_text(SHIM)
        include = f"-I{files('runtime.device')}"
        subprocess.run([compiler, "-shared", "-fPIC", "-Wall", include, "-o", built, source], check=True)
        return ctypes.CDLL(str(built))


class Emulator(TorchDispatchMode):
    """See above; a `runtime.device.recorder.Recorder`. `replays` counts them, `launches` names the kernels run."""

    def __init__(self) -> None:
        super().__init__()
        self._tape: list[Callable[[], None]] | None = None
        self._conditions: list[ctypes.c_uint] = []
        self._turns = threading.Lock()
        self.replays = 0
        self.launches: list[str] = []

    def turn(self) -> AbstractContextManager[Any]:
        return self._turns

    def finish(self) -> None:
        pass

    def record(self, work: Work) -> Work:
        tape: list[Callable[[], None]] = []
        with self._onto(tape), self:
            outputs = list(work())

        def replay() -> Sequence[Tensor]:
            self.replays += 1
            for run in tape:
                run()
            return outputs

        return replay

    def launch(self, kernel: str, *arguments: Argument) -> None:
        def run() -> None:
            self.launches.append(kernel)
            call_kernel(kernel, arguments)

        run() if self._tape is None else self._tape.append(run)

    def condition(self) -> Condition:
        value = ctypes.c_uint(99)
        self._conditions.append(value)
        return Condition(ctypes.addressof(value))

    def switch(self, condition: Condition, bodies: Sequence[Callable[[], None]]) -> None:
        assert self._tape is not None
        tapes: list[list[Callable[[], None]]] = []
        for body in bodies:
            tapes.append([])
            with self._onto(tapes[-1]):
                body()

        def run() -> None:
            chosen = ctypes.c_uint.from_address(condition.handle).value
            for each in tapes[chosen] if chosen < len(tapes) else []:
                each()

        self._tape.append(run)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is guard:  # what happens inside is to be recorded
            with self:
                return answer_guard(*args, **kwargs or {})
        assert self._tape is not None
        result, run = record_operator(func, args, kwargs or {})
        self._tape.append(run)
        return result

    @contextmanager
    def _onto(self, tape: list[Callable[[], None]]) -> Iterator[None]:
        before, self._tape = self._tape, tape
        try:
            yield
        finally:
            self._tape = before


def record_operator(func: Any, args: Any, kwargs: Any) -> tuple[Any, Callable[[], None]]:
    """What `func` gives, NaN where it is new, and what computes it again into the same tensors."""
    assert func._schema.name not in READS, f"{func} waits for the device"
    result = func(*args, **kwargs)
    given = {_storage(leaf) for leaf in _tensors((args, kwargs))}
    made = _tensors(result)

    def run() -> None:
        for old, new in zip(made, _tensors(func(*args, **kwargs)), strict=True):
            if _storage(old) not in given:
                old.copy_(new)

    for tensor in made:
        if _storage(tensor) not in given and tensor.is_floating_point():
            tensor.fill_(float("nan"))
    return result, run


def call_kernel(kernel: str, arguments: Sequence[Argument]) -> None:
    """Run a function of ``decide.cu`` here and now."""
    function = getattr(library(), kernel)
    function.restype = None
    function(*map(_plain, arguments))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _plain(argument: Argument) -> Any:
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_ulonglong(argument.handle) if isinstance(argument, Condition) else ctypes.c_int(argument)
