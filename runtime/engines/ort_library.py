"""ONNX Runtime as both of its engines use it: which build is installed, its process-wide parts, and binding by address.

All sessions of the process share one thread pool (of as many threads as torch has when the first is opened) and one CPU
arena: sessions with pools of their own fight over the cores, and sessions with arenas of their own each keep their
largest scratch. The pool is told to sleep between calls: a pool that spins takes its cores from torch.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from runtime.base.errors import EngineError
from runtime.bundle.spec import Plan

ELEMENTS = {
    torch.float32: 1,
    torch.uint8: 2,
    torch.int32: 6,
    torch.int64: 7,
    torch.bool: 9,
    torch.float16: 10,
    torch.float64: 11,
    torch.bfloat16: 16,
}
"""Types by their numbers in ONNX (TensorProto.DataType): numpy has no bfloat16."""

CPU_BUILD, GPU_BUILD = "onnxruntime", "onnxruntime-gpu"
"""Names of the packages; both install the module onnxruntime."""

CUDA = "CUDAExecutionProvider"

_lock = threading.Lock()
_library: Any = None


def open_library(needed: str = "") -> Any:
    """The onnxruntime module, its thread pool and arena set up once per process.

    EngineError where it is not installed, where both builds are, or where the build is not the one `needed`.
    """
    global _library
    with _lock:
        _check_installed(needed)
        if _library is None:
            try:
                import onnxruntime
                import threadpoolctl  # noqa: F401  which the engine uses
            except ImportError as error:
                raise EngineError(f"onnxruntime cannot be loaded ({error}): pip install '.[cpu]'") from error
            # fails where the application has already made the pool: then it is used as it is
            with suppress(Exception):
                onnxruntime.set_global_thread_pool_sizes(torch.get_num_threads(), 1)
            arena = onnxruntime.OrtMemoryInfo(
                "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
            )
            onnxruntime.create_and_register_allocator(arena, None)
            _library = onnxruntime
        return _library


def session_options(ort: Any) -> Any:
    """Options of a session in the shared pool and arena, with every optimisation."""
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


class Bindings:
    """A session with one block's weights, bound by address; concurrent calls each take a binding of their own.

    `device` is "cpu" or "cuda", `index` that of the GPU. Weights and what is run are contiguous and on it.
    """

    def __init__(
        self, session: Any, plan: Plan, weights: Sequence[Tensor], device: str = "cpu", index: int = 0
    ) -> None:
        self._session, self._plan, self._weights = session, plan, tuple(weights)
        self._place = device, index
        self._taken = frozenset(given.name for given in session.get_inputs())
        self._free: list[Any] = []

    def run(self, inputs: Sequence[Tensor], states: Sequence[Tensor], options: Any = None) -> None:
        """Compute `states` (written) from `inputs` in plan order, with the run options `options`."""
        try:
            binding = self._free.pop()
        except IndexError:
            binding = self._new()
        for given, tensor in zip(self._plan.inputs, inputs, strict=True):
            if given.name in self._taken:  # an input that the plan does not use may be gone from its file
                self._bind(binding.bind_input, given.name, tensor)
        for index, tensor in enumerate(states):
            self._bind(binding.bind_output, f"state_{index}", tensor)
        self._session.run_with_iobinding(binding, options)
        self._free.append(binding)

    def _new(self) -> Any:
        binding = self._session.io_binding()
        for name, weight in zip(self._plan.weights, self._weights, strict=True):
            if name in self._taken:
                self._bind(binding.bind_input, name, weight)
        return binding

    def _bind(self, bind: Any, name: str, tensor: Tensor) -> None:
        bind(name, *self._place, ELEMENTS[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())


def _check_installed(needed: str) -> None:
    found = [name for name in (CPU_BUILD, GPU_BUILD) if _installed(name)]
    extra = "gpu" if needed == GPU_BUILD else "cpu"
    if len(found) == 2:
        raise EngineError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files: "
            f"uninstall both, then pip install '.[{extra}]'"
        )
    if not found:
        raise EngineError(f"{needed or CPU_BUILD} is not installed: pip install '.[{extra}]', or use engine='torch'")
    if needed and needed not in found:
        raise EngineError(
            f"{found[0]} is installed, which does not run on a GPU: pip uninstall {found[0]}, then pip install "
            f"'.[{extra}]', or use engine='torch'"
        )


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
