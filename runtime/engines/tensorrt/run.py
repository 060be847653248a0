"""The TensorRT engines: plans on a GPU, on the caller's stream and in the caller's memory.

Unverified: nothing in this file has been run, for want of a GPU; that the libraries have every name and argument that
is used here is tested.

All execution contexts of a stream share one scratch, which is as large as the hungriest of them wants: they run one
after another. Nothing here waits for the GPU. TensorRT itself would, on the default stream: `runtime.engines.streams`
has the way around that.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from runtime.base.errors import EngineError
from runtime.bundle.program import Program
from runtime.bundle.spec import Plan
from runtime.engines import TABLE, Bound, Engine, Kernel, no_gpu
from runtime.engines.streams import enqueueing
from runtime.engines.tensorrt.build import make_logger
from runtime.engines.tensorrt.cache import read
from runtime.engines.tensorrt.jobs import Profile, jobs, key_of, make, profile_for
from runtime.engines.tensorrt.library import gpu_here, open_library, targets

if TYPE_CHECKING:
    import tensorrt as trt

_scratch: dict[tuple[torch.device, int], Tensor] = {}
_recorded: list[Tensor] = []
_lock = threading.Lock()


class TensorRTEngine(Engine):
    """Runs the engines of `program`'s bundle that were built for the GPU here, with weights shared or packed.

    Engines of a program that has no bundle yet are built as it is loaded. EngineError where the library or a GPU is
    missing, and for engines that are missing, damaged, or of another library version, GPU, precision or plan.
    """

    def __init__(self, name: str, program: Program) -> None:
        super().__init__(name)
        self._program = program
        self.packed = TABLE[name].packed
        self.library = open_library(name.removesuffix("-packed"))
        if gpu_here() is None:
            raise EngineError(no_gpu(name))
        (self._target,) = targets(self.library)
        self._told: list[str] = []
        self._runtime = self.library.api.Runtime(make_logger(self.library, self._told))

    def load(self, plan: Plan, variant: int, files: Mapping[str, bytes]) -> Kernel:
        """A kernel whose engine is deserialised here, or, packed, for each block that is bound."""
        return _Kernel(self, plan, variant)

    def open(self, plan: Plan, variant: int, block: str) -> tuple[trt.ICudaEngine, tuple[Profile, ...]]:
        """The engine of a variant, for the block of that name where weights are packed."""
        data, profiles = self._bytes(plan, variant, block if self.packed else "")
        runtime: trt.Runtime = self._runtime
        engine = runtime.deserialize_cuda_engine(data)
        if engine is None:
            told = "; ".join(self._told) or "it gives no reason"
            raise EngineError(f"{self.name} {self.library.version} cannot load plan {plan.id}: {told}")
        return engine, profiles

    def _bytes(self, plan: Plan, variant: int, block: str) -> tuple[bytes, tuple[Profile, ...]]:
        program, of = self._program, next((b for b in self._program.manifest.blocks if b.name == block), None)
        if program.folder is not None:
            data, record = read(program.folder, key_of(program, self.library, self._target, plan, variant, of))
            return data, record.profiles
        every = jobs(program, self.library, (self._target,), "packed" if self.packed else "shared")
        job = next(j for j in every if j.plan.id == plan.id and j.variant == variant and j.block == of)
        return make(job, program, self.library)[0], job.profiles


class _Kernel:
    def __init__(self, owner: TensorRTEngine, plan: Plan, variant: int) -> None:
        self._owner, self._plan, self._variant = owner, plan, variant
        self._shared = None if owner.packed else owner.open(plan, variant, "")

    def bind(self, weights: Sequence[Tensor], block: str = "") -> Bound:
        """Weights are bound by address, contiguous and on the GPU; where they are packed, those given are not read."""
        if self._shared is None:
            return _Bound(self._owner, *self._owner.open(self._plan, self._variant, block), self._plan, ())
        engine, profiles = self._shared
        for name, weight in zip(self._plan.weights, weights, strict=True):
            if not weight.is_cuda or not weight.is_contiguous():
                raise EngineError(
                    f"weight {name} is on {weight.device}, or not contiguous: {self._owner.name} needs both"
                )
        return _Bound(self._owner, engine, profiles, self._plan, weights)


class _Bound:
    """An execution context with one block's weights; calls from several threads take turns."""

    def __init__(
        self,
        owner: TensorRTEngine,
        engine: trt.ICudaEngine,
        profiles: tuple[Profile, ...],
        plan: Plan,
        weights: Sequence[Tensor],
    ) -> None:
        trt = owner.library.api
        self._owner, self._engine, self._profiles, self._plan = owner, engine, profiles, plan
        self._weights = tuple(weights)  # kept alive: the context knows their addresses alone
        self._context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        self._lock = threading.Lock()
        self._taken = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
        for name, weight in zip(plan.weights, weights, strict=bool(weights)):
            if name in self._taken:
                self._context.set_tensor_address(name, weight.data_ptr())

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        context: trt.IExecutionContext = self._context
        given = {spec.name: t.detach().contiguous() for spec, t in zip(self._plan.inputs, inputs, strict=True)}
        states = [torch.empty_like(given[self._plan.inputs[index].name]) for index in self._plan.states]
        device = states[0].device
        with self._lock, enqueueing(device) as stream:
            wanted = profile_for(self._profiles, {name: tuple(t.shape) for name, t in given.items()})
            if wanted != context.active_optimization_profile:
                context.set_optimization_profile_async(wanted, stream)
            recorded = torch.cuda.is_current_stream_capturing()
            memory = _memory(device, stream, self._engine.device_memory_size_v2, recorded)
            context.set_device_memory(memory.data_ptr(), memory.numel())
            for name, tensor in given.items():
                if name in self._taken:
                    context.set_input_shape(name, tuple(tensor.shape))
                    context.set_tensor_address(name, tensor.data_ptr())
            for index, tensor in enumerate(states):
                context.set_tensor_address(f"state_{index}", tensor.data_ptr())
            if not context.execute_async_v3(stream):
                raise EngineError(f"{self._owner.name} could not enqueue plan {self._plan.id}: see the log")
        return states


def _memory(device: torch.device, stream: int, size: int, recorded: bool = False) -> Tensor:
    """The scratch of all contexts on `stream`, of at least `size` bytes; torch aligns to 512.

    One that was `recorded` in a CUDA graph, which knows its address alone, is kept even when it is outgrown.
    """
    with _lock:
        found = _scratch.get((device, stream))
        if found is None or found.numel() < size:
            found = _scratch[device, stream] = torch.empty(max(size, 512), dtype=torch.uint8, device=device)
        if recorded and not any(kept is found for kept in _recorded):
            _recorded.append(found)
        return found
