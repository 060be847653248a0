"""The ONNX Runtime engines: plans with their weights as inputs, in the caller's memory, on a CPU or a GPU.

On a CPU both its thread pool and torch's spin for some milliseconds after each piece of work, and the one that spins
takes its cores from the one that works. So the pool is told to sleep between calls (`runtime.engines.ort_library`), and
what torch does between calls is done by the calling thread alone, unless it is so much that all cores gain more than
the spinning costs.

On a GPU there is no wait and no copy. Unverified: no GPU has run that; that onnxruntime has what is used here is
tested, and so is all that happens where its CUDA provider, or a GPU, is missing. What it does of its own accord there,
and what is done about it:

- Where the provider or one of its libraries is missing, it runs on the CPU without an exception. Sessions are asked
  which providers they have.
- What the provider has no kernel for goes to the CPU. That is refused, by name (``session.disable_cpu_ep_fallback``).
- Arithmetic on sizes goes to the CPU too, kernel or not. So sessions are made for fixed shapes, in which none is left:
  one per set of shapes that a plan is called with, when it is first called with them. They share the block's weights.
- The host waits for the GPU at the end of each run: not with ``disable_synchronize_execution_providers``.
- Each session has a stream of its own: here they have the one of `runtime.engines.streams`, in step with torch's.
- float32 products are taken in TF32: not with ``use_tf32`` off.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from runtime.base.errors import EngineError, inside
from runtime.bundle.program import Program
from runtime.bundle.spec import Plan, plan_file
from runtime.engines import TABLE, Bound, Engine, Kernel, no_gpu, plan_bytes
from runtime.engines.ort_library import CUDA, GPU_BUILD, open_library, provider_missing, session_options, share_arena
from runtime.engines.streams import own_stream, own_stream_in_step

Shapes = tuple[tuple[int, ...], ...]

ELEMENTS = {
    torch.float32: 1,
    torch.uint8: 2,
    torch.int8: 3,
    torch.int16: 5,
    torch.int32: 6,
    torch.int64: 7,
    torch.bool: 9,
    torch.float16: 10,
    torch.float64: 11,
    torch.bfloat16: 16,
}
"""Types by their numbers in ONNX (TensorProto.DataType): numpy has no bfloat16."""

_ALONE = 1 << 20
"""States of up to as many elements are handled by one thread: it takes a few milliseconds, as spinning does."""

_KEPT = 32
"""Bindings of a block that wait for their next call: more threads at once than that make theirs anew."""

_turn = threading.Lock()
"""Held while a run is enqueued on a GPU or a session opened there: all sessions share one stream and one arena."""


class OnnxRuntimeEngine(Engine):
    """Runs ``plans/*.onnx`` on the provider that its name tells: in any of `ELEMENTS`, on a CPU without bfloat16.

    EngineError where onnxruntime, the provider's libraries or a GPU are missing.
    """

    def __init__(self, name: str, program: Program | None = None) -> None:
        super().__init__(name)
        self.provider: Cpu | Cuda = Cpu() if TABLE[name].cpu else Cuda(name)

    def hosting(self, elements: int) -> AbstractContextManager[object]:
        """On a CPU one thread for torch inside the ``with`` block, where `elements` are few (see above)."""
        return self.provider.hosting(elements)

    def load(self, plan: Plan, variant: int, files: Mapping[str, bytes]) -> Kernel:
        """Open a session, with fixed shapes one for a row of the first that the plan was compiled for.

        EngineError where the provider cannot run all of the plan.
        """
        return _Kernel(self, plan, variant, plan_bytes(plan, variant, "onnx", files, self.name))


class Cpu:
    """The CPU provider; a session takes any shapes, and several threads may run it at once."""

    fixed_shapes = False
    run_options = None
    device = torch.device("cpu")
    types = ELEMENTS.keys() - {torch.bfloat16}

    def __init__(self) -> None:
        self.ort = open_library()
        self._pools = _torch_pools()

    def hosting(self, elements: int) -> AbstractContextManager[object]:
        """See `OnnxRuntimeEngine.hosting`."""
        limited: AbstractContextManager[object] = self._pools.limit(limits=1) if elements <= _ALONE else nullcontext()
        return limited

    def running(self) -> AbstractContextManager[object]:
        """Entered around each run."""
        return nullcontext()

    def open(self, data: bytes, options: Any) -> Any:
        """A session of the graph `data`; whatever onnxruntime raises."""
        return self.ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


class Cuda:
    """The CUDA provider on torch's current GPU; a session for each set of shapes."""

    fixed_shapes = True
    types = ELEMENTS.keys()

    def __init__(self, name: str) -> None:
        self.ort = open_library(GPU_BUILD)
        if not torch.cuda.is_available():
            raise EngineError(no_gpu(name))
        self.device = torch.device("cuda", torch.cuda.current_device())
        share_arena(self.ort, self.device.index)
        self.run_options = self.ort.RunOptions()
        self.run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def hosting(self, elements: int) -> AbstractContextManager[object]:
        """Nothing to arrange: the host only enqueues."""
        return nullcontext()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Entered around each run: in turn, on our own stream."""
        with _turn, own_stream_in_step(self.device):
            yield

    def open(self, data: bytes, options: Any) -> Any:
        """A session of the graph `data`; whatever onnxruntime raises, EngineError where it would run on the CPU."""
        stream = own_stream(self.device)
        provider = {
            "device_id": str(self.device.index),
            "user_compute_stream": str(stream.cuda_stream),
            "use_tf32": "0",
        }
        with _turn:
            stream.synchronize()  # the arena takes back what a run in flight still works in, and constants may go there
            session = self.ort.InferenceSession(data, options, providers=[(CUDA, provider)], enable_fallback=False)
        if CUDA not in session.get_providers():
            raise EngineError(provider_missing(self.ort))
        return session


class _Session:
    """A session, and the names of what it takes: an input that a plan does not use may be gone from its file."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.taken: dict[str, Sequence[object]] = {given.name: given.shape for given in session.get_inputs()}


class _Kernel:
    """A variant's sessions: one, or one for each set of shapes of the plan's inputs."""

    def __init__(self, engine: OnnxRuntimeEngine, plan: Plan, variant: int, data: bytes) -> None:
        self.name, self.provider, self.plan, self._data = engine.name, engine.provider, plan, data
        self.variant = variant
        self._where = f"plan {plan.id} at width {plan.variants[variant].width:g}"
        self._sessions: dict[Shapes, _Session] = {}
        self._lock = threading.Lock()
        for given in plan.inputs:
            self._check_type(given.name, getattr(torch, given.dtype))
        self._any = self._open({}, {})  # where shapes are fixed, it has the names of the sizes that may differ
        if self.provider.fixed_shapes and plan.buckets:
            self.session(tuple(tuple(1 if size is None else size for size in shape) for shape in plan.buckets[0]))

    def bind(self, weights: Sequence[Tensor], block: str = "") -> Bound:
        """Weights are bound by address: they must be contiguous and on the provider's device."""
        for name, weight in zip(self.plan.weights, weights, strict=True):
            if not weight.is_contiguous():
                raise EngineError(f"weight {name} is not contiguous")
            self.check(name, weight)
        return _Bound(self, weights)

    def check(self, name: str, tensor: Tensor) -> None:
        """EngineError where `tensor` is not on the provider's device, or of a type that it is not given."""
        if tensor.device != self.provider.device:
            raise EngineError(f"{name} of {self._where} is on {tensor.device}, {self.name} on {self.provider.device}")
        self._check_type(name, tensor.dtype)

    def session(self, shapes: Shapes) -> _Session:
        """The session for these shapes of the plan's inputs, opened at first; calls of several threads wait for it."""
        if not self.provider.fixed_shapes:
            return self._any
        with self._lock:
            if shapes not in self._sessions:
                self._sessions[shapes] = self._open(self._sizes(shapes), {"session.disable_cpu_ep_fallback": "1"})
            return self._sessions[shapes]

    def _check_type(self, name: str, dtype: torch.dtype) -> None:
        if dtype not in self.provider.types:
            raise EngineError(
                f"{self.name} does not take {dtype}, as {name} of {self._where} is: use engine 'torch' or 'inductor', "
                "or compile in float32"
            )

    def _sizes(self, shapes: Shapes) -> dict[str, int]:
        """The sizes that may differ, by the names that the graph gives them."""
        sizes: dict[str, int] = {}
        for given, shape in zip(self.plan.inputs, shapes, strict=True):
            for symbol, size in zip(self._any.taken.get(given.name, ()), shape, strict=False):
                if isinstance(symbol, str) and sizes.setdefault(symbol, size) != size:
                    raise EngineError(f"{given.name} of {self._where} is {shape}: that does not go with {shapes}")
        return sizes

    def _open(self, sizes: Mapping[str, int] = {}, entries: Mapping[str, str] = {}) -> _Session:
        """A session with these sizes fixed and the config `entries`; EngineError where it cannot be opened."""
        options = session_options(self.provider.ort)
        for key, value in entries.items():
            options.add_session_config_entry(key, value)
        for name, size in sizes.items():
            options.add_free_dimension_override_by_name(name, size)
        try:
            return _Session(self.provider.open(self._data, options))
        except EngineError:
            raise
        except Exception as error:
            strays = self._strays(sizes) if "session.disable_cpu_ep_fallback" in entries else ""
            told = f"{strays} in it would run on the CPU" if strays else str(error)
            raise EngineError(
                f"onnxruntime {self.provider.ort.__version__} does not run {self._where} on {self.provider.device}: "
                f"{told}; use engine='torch', or engine='inductor'"
            ) from error

    def _strays(self, sizes: Mapping[str, int]) -> str:
        """Kinds of nodes that would run on the CPU; "" where it cannot be told."""
        try:
            session = self._open(sizes, {"session.record_ep_graph_assignment_info": "1"}).session
            parts = [part for part in session.get_provider_graph_assignment_info() if part.ep_name != CUDA]
        except Exception:  # an older onnxruntime; or what it says was said of the first attempt
            return ""
        return ", ".join(sorted({node.op_type for part in parts for node in part.get_nodes()}))


class _Bound:
    """A kernel with one block's weights, bound by address; concurrent calls each take a binding of their own."""

    def __init__(self, kernel: _Kernel, weights: Sequence[Tensor]) -> None:
        self._kernel = kernel
        self._weights = dict(zip(kernel.plan.weights, weights, strict=True))  # kept: bindings know addresses alone
        self._free: dict[_Session, list[Any]] = {}

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        kernel, plan = self._kernel, self._kernel.plan
        given = {spec.name: t.detach().contiguous() for spec, t in zip(plan.inputs, inputs, strict=True)}
        for name, tensor in given.items():
            kernel.check(name, tensor)
        found = kernel.session(tuple(tuple(tensor.shape) for tensor in given.values()))
        free = self._free.setdefault(found, [])
        states = [torch.empty_like(given[plan.inputs[index].name]) for index in plan.states]
        with kernel.provider.running():
            try:
                binding = free.pop()
            except IndexError:
                binding = found.session.io_binding()
                bind(binding.bind_input, self._weights, found.taken)
            bind(binding.bind_input, given, found.taken)
            bind(binding.bind_output, {f"state_{index}": state for index, state in enumerate(states)})
            with inside(plan_file(plan, kernel.variant, "onnx")):
                found.session.run_with_iobinding(binding, kernel.provider.run_options)
        if len(free) < _KEPT:
            free.append(binding)
        return states


def bind(into: Callable[..., None], tensors: Mapping[str, Tensor], taken: Container[str] | None = None) -> None:
    """Bind contiguous tensors by address; only those whose names are `taken`, where that is given."""
    for name, tensor in tensors.items():
        if taken is None or name in taken:
            place = tensor.device.type, tensor.device.index or 0
            into(name, *place, ELEMENTS[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())


@functools.cache
def _torch_pools() -> Any:
    """Torch's OpenMP threads; a limit holds for the thread that sets it."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="openmp")
