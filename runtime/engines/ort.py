"""The ONNX Runtime engine: plans with their weights as inputs, run on torch's own memory.

All sessions of the process share one thread pool (of as many threads as torch has when the first
is opened) and one CPU arena: sessions with pools of their own fight over the cores, and sessions
with arenas of their own each keep their largest scratch.

Both that pool and torch's spin for some milliseconds after each piece of work, and the one that spins
takes its cores from the one that works. So the pool is told to sleep between calls, and what torch
does between calls is done by the calling thread alone, unless it is so much that all cores gain more
than the spinning costs.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from importlib import metadata
from typing import Any

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

from runtime.engines import Bound, Kernel, plan_bytes
from runtime.errors import EngineError
from runtime.spec import Plan

_TYPES: dict[torch.dtype, Any] = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.float16: np.float16,
    torch.int64: np.int64,
    torch.int32: np.int32,
    torch.uint8: np.uint8,
    torch.bool: np.bool_,
}
_ALONE = 1 << 20
"""States of up to as many elements are handled by one thread: it takes a few milliseconds, as spinning does."""

_lock = threading.Lock()
_library: Any = None


class OnnxRuntimeEngine:
    """Runs ``plans/*.onnx`` on the CPU provider, in float32, float16 or float64.

    EngineError when onnxruntime is missing, or installed beside onnxruntime-gpu.
    """

    name = "onnxruntime"
    recordable = False

    def __init__(self) -> None:
        self._ort = _shared_library()
        self._pools = _torch_pools()

    def hosting(self, elements: int) -> AbstractContextManager[object]:
        """One thread for torch inside the ``with`` block, where `elements` are few (see above)."""
        limited: AbstractContextManager[object] = self._pools.limit(limits=1) if elements <= _ALONE else nullcontext()
        return limited

    def load(self, plan: Plan, variant: int, files: Mapping[str, bytes]) -> Kernel:
        """Open a session; EngineError for bfloat16, which the CPU provider does not run."""
        if any(given.dtype == "bfloat16" for given in plan.inputs):
            raise EngineError("onnxruntime does not run bfloat16 on a CPU: use engine='torch', or compile in float32")
        ort = self._ort
        options = ort.SessionOptions()
        options.use_per_session_threads = False
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        options.add_session_config_entry("session.use_env_allocators", "1")
        options.add_session_config_entry("session.force_spinning_stop", "1")
        data = plan_bytes(plan, variant, "onnx", files, self.name)
        try:
            session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise EngineError(f"onnxruntime {ort.__version__} cannot load plan {plan.id}: {error}") from error
        return _Kernel(ort, session, plan)


class _Kernel:
    def __init__(self, ort: Any, session: Any, plan: Plan) -> None:
        self.ort = ort
        self.session = session
        self.weights = plan.weights
        self.inputs = tuple(given.name for given in plan.inputs)
        self.taken = frozenset(given.name for given in session.get_inputs())
        self.states = plan.states

    def bind(self, weights: Sequence[Tensor], block: str = "") -> Bound:
        """Weights are bound by address: they must be contiguous and on the CPU."""
        for name, weight in zip(self.weights, weights, strict=True):
            if weight.device.type != "cpu":
                raise EngineError(f"weight {name} is on {weight.device}: onnxruntime runs on the CPU here")
            if weight.dtype not in _TYPES:
                raise EngineError(f"onnxruntime does not run {weight.dtype} on a CPU: use engine='torch'")
            if not weight.is_contiguous():
                raise EngineError(f"weight {name} is not contiguous")
        return _Bound(self, weights)


class _Bound:
    """A session with one block's weights; concurrent calls each get a binding of their own."""

    def __init__(self, kernel: _Kernel, weights: Sequence[Tensor]) -> None:
        self._kernel = kernel
        self._weights = tuple(weights)
        self._free: list[Any] = []

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        kernel = self._kernel
        given = [tensor.detach().contiguous() for tensor in inputs]
        states = [torch.empty_like(given[index]) for index in kernel.states]
        try:
            binding = self._free.pop()
        except IndexError:
            binding = self._binding()
        for name, tensor in zip(kernel.inputs, given, strict=True):
            if name in kernel.taken:  # an input that the plan does not use may be gone from its file
                _bind(binding.bind_input, name, tensor)
        for index, tensor in enumerate(states):
            _bind(binding.bind_output, f"state_{index}", tensor)
        kernel.session.run_with_iobinding(binding)
        self._free.append(binding)
        return states

    def _binding(self) -> Any:
        binding = self._kernel.session.io_binding()
        for name, weight in zip(self._kernel.weights, self._weights, strict=True):
            if name in self._kernel.taken:
                _bind(binding.bind_input, name, weight)
        return binding


def _bind(bind: Any, name: str, tensor: Tensor) -> None:
    bind(name, "cpu", 0, _TYPES[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())


def _shared_library() -> Any:
    """The onnxruntime module, its thread pool and arena set up once per process."""
    global _library
    with _lock:
        if _library is None:
            _check_installed()
            import onnxruntime

            # fails where the application has already made the pool: then it is used as it is
            with suppress(Exception):
                onnxruntime.set_global_thread_pool_sizes(torch.get_num_threads(), 1)
            arena = onnxruntime.OrtMemoryInfo(
                "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
            )
            onnxruntime.create_and_register_allocator(arena, None)
            _library = onnxruntime
        return _library


@functools.cache
def _torch_pools() -> ThreadpoolController:
    """Torch's OpenMP threads; a limit holds for the thread that sets it."""
    return ThreadpoolController().select(user_api="openmp")


def _check_installed() -> None:
    found = [name for name in ("onnxruntime", "onnxruntime-gpu") if _installed(name)]
    if len(found) == 2:
        raise EngineError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files: "
            "uninstall both, then install the one you need"
        )
    if not found:
        raise EngineError("onnxruntime is not installed: pip install 'edit-compile[cpu]', or use engine='torch'")


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
