"""The ONNX Runtime engine for CPUs: plans with their weights as inputs, run on torch's own memory.

Both its thread pool and torch's spin for some milliseconds after each piece of work, and the one that spins takes its
cores from the one that works. So the pool is told to sleep between calls (`runtime.engines.ort_library`), and what
torch does between calls is done by the calling thread alone, unless it is so much that all cores gain more than the
spinning costs.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from runtime.base.errors import EngineError
from runtime.bundle.spec import Plan
from runtime.engines import Bound, Kernel, plan_bytes
from runtime.engines.ort_library import ELEMENTS, Bindings, open_library, session_options

_ALONE = 1 << 20
"""States of up to as many elements are handled by one thread: it takes a few milliseconds, as spinning does."""


class OnnxRuntimeEngine:
    """Runs ``plans/*.onnx`` on the CPU provider, in float32, float16 or float64.

    EngineError when onnxruntime is missing, or installed beside onnxruntime-gpu.
    """

    name = "onnxruntime"
    recordable = False

    def __init__(self) -> None:
        self._ort = open_library()
        self._pools = _torch_pools()

    def hosting(self, elements: int) -> AbstractContextManager[object]:
        """One thread for torch inside the ``with`` block, where `elements` are few (see above)."""
        limited: AbstractContextManager[object] = self._pools.limit(limits=1) if elements <= _ALONE else nullcontext()
        return limited

    def load(self, plan: Plan, variant: int, files: Mapping[str, bytes]) -> Kernel:
        """Open a session; EngineError for bfloat16, which the CPU provider does not run."""
        if any(given.dtype == "bfloat16" for given in plan.inputs):
            raise EngineError(
                "onnxruntime does not run bfloat16 on a CPU: use engine 'torch' or 'inductor', or compile in float32"
            )
        ort = self._ort
        data = plan_bytes(plan, variant, "onnx", files, self.name)
        try:
            session = ort.InferenceSession(data, session_options(ort), providers=["CPUExecutionProvider"])
        except Exception as error:
            raise EngineError(f"onnxruntime {ort.__version__} cannot load plan {plan.id}: {error}") from error
        return _Kernel(session, plan)


class _Kernel:
    def __init__(self, session: Any, plan: Plan) -> None:
        self._session, self._plan = session, plan

    def bind(self, weights: Sequence[Tensor], block: str = "") -> Bound:
        """Weights are bound by address: they must be contiguous and on the CPU."""
        for name, weight in zip(self._plan.weights, weights, strict=True):
            if weight.device.type != "cpu":
                raise EngineError(f"weight {name} is on {weight.device}: onnxruntime runs on the CPU here")
            if weight.dtype not in ELEMENTS or weight.dtype == torch.bfloat16:
                raise EngineError(f"onnxruntime does not run {weight.dtype} on a CPU: use engine 'torch' or 'inductor'")
            if not weight.is_contiguous():
                raise EngineError(f"weight {name} is not contiguous")
        return _Bound(self._plan, Bindings(self._session, self._plan, weights))


class _Bound:
    """A session with one block's weights."""

    def __init__(self, plan: Plan, bindings: Bindings) -> None:
        self._plan, self._bindings = plan, bindings

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        given = [tensor.detach().contiguous() for tensor in inputs]
        states = [torch.empty_like(given[index]) for index in self._plan.states]
        self._bindings.run(given, states)
        return states


@functools.cache
def _torch_pools() -> Any:
    """Torch's OpenMP threads; a limit holds for the thread that sets it."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="openmp")
