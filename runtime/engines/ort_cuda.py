"""The ONNX Runtime engine for GPUs: plans on its CUDA provider, in the caller's memory, without a wait or a copy.

Unverified: no GPU has run anything in this file; that onnxruntime has what is used here is tested, and so is all that
happens where its CUDA provider, or a GPU, is missing.

What ONNX Runtime does of its own accord, and what is done about it:

- Where the provider or one of its libraries is missing, it runs on the CPU without an exception. Sessions are asked
  which providers they have.
- What the provider has no kernel for goes to the CPU. That is refused, by name (``session.disable_cpu_ep_fallback``).
- Arithmetic on sizes goes to the CPU too, kernel or not. So sessions are made for fixed shapes, in which none is left:
  one per set of shapes that a plan is called with, when it is first called with them. They share the block's weights,
  and all sessions on a GPU share one arena for their scratch.
- The host waits for the GPU at the end of each run: not with ``disable_synchronize_execution_providers``.
- Each session has a stream of its own: here they have the one of `runtime.engines.streams`, in step with torch's.
- float32 products are taken in TF32: not with ``use_tf32`` off.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from runtime.base.errors import EngineError
from runtime.bundle.spec import Plan
from runtime.engines import Bound, Kernel, no_gpu, plan_bytes
from runtime.engines.ort_cuda_library import open_cuda_library, provider_missing, share_arena
from runtime.engines.ort_library import CUDA, ELEMENTS, Bindings, session_options
from runtime.engines.streams import own_stream, own_stream_in_step

Shapes = tuple[tuple[int, ...], ...]

_turn = threading.Lock()
"""Held while a run is enqueued or a session opened: all sessions share one stream and one arena."""


class OnnxRuntimeCudaEngine:
    """Runs ``plans/*.onnx`` on the CUDA provider of torch's current GPU, in any of `ELEMENTS`, bfloat16 among them.

    EngineError where onnxruntime-gpu, the provider's libraries or a GPU are missing.
    """

    name = "onnxruntime-cuda"
    recordable = False

    def __init__(self) -> None:
        self.ort = open_cuda_library()
        if not torch.cuda.is_available():
            raise EngineError(no_gpu(self.name))
        self.device = torch.device("cuda", torch.cuda.current_device())
        share_arena(self.ort, self.device.index)
        self.run_options = self.ort.RunOptions()
        self.run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def hosting(self, elements: int) -> AbstractContextManager[object]:
        """Nothing to arrange: the host only enqueues."""
        return nullcontext()

    def load(self, plan: Plan, variant: int, files: Mapping[str, bytes]) -> Kernel:
        """Open a session for one row of the first shapes that the plan was compiled for.

        EngineError where the provider cannot run all of the plan.
        """
        kernel = _Kernel(self, plan, variant, plan_bytes(plan, variant, "onnx", files, self.name))
        if plan.buckets:
            kernel.session(tuple(tuple(1 if size is None else size for size in shape) for shape in plan.buckets[0]))
        return kernel

    def open(self, data: bytes, entries: Mapping[str, str], sizes: Mapping[str, int]) -> Any:
        """A session of the graph `data` with the config `entries`, its sizes of these names fixed.

        Whatever onnxruntime raises; EngineError where it would run on the CPU instead.
        """
        options = session_options(self.ort)
        for key, value in entries.items():
            options.add_session_config_entry(key, value)
        for name, size in sizes.items():
            options.add_free_dimension_override_by_name(name, size)
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


class _Kernel:
    """A variant's sessions, by the shapes of the plan's inputs."""

    def __init__(self, engine: OnnxRuntimeCudaEngine, plan: Plan, variant: int, data: bytes) -> None:
        self.engine, self.plan = engine, plan
        self._data = data
        self._where = f"plan {plan.id} at width {plan.variants[variant].width:g}"
        self._sessions: dict[Shapes, Any] = {}
        self._lock = threading.Lock()
        declared = self._open({}, {}).get_inputs()  # with names for the sizes that may differ
        self._declared: dict[str, Sequence[object]] = {given.name: given.shape for given in declared}

    def bind(self, weights: Sequence[Tensor], block: str = "") -> Bound:
        """Weights are bound by address: they must be contiguous and on the engine's GPU."""
        for name, weight in zip(self.plan.weights, weights, strict=True):
            if not weight.is_contiguous():
                raise EngineError(f"weight {name} is not contiguous")
            self.check(name, weight)
        return _Bound(self, weights)

    def check(self, name: str, tensor: Tensor) -> None:
        """EngineError where `tensor` is not on the engine's GPU, or of a type that ONNX Runtime is not given."""
        if tensor.device != self.engine.device:
            raise EngineError(
                f"{name} of {self._where} is on {tensor.device}, {self.engine.name} on {self.engine.device}"
            )
        if tensor.dtype not in ELEMENTS:
            raise EngineError(f"{self.engine.name} does not take {tensor.dtype}, as {name} of {self._where} is")

    def session(self, shapes: Shapes) -> Any:
        """The session for these shapes of the plan's inputs, opened at first; calls of several threads wait for it."""
        with self._lock:
            found = self._sessions.get(shapes)
            if found is None:
                sizes = self._sizes(shapes)
                found = self._sessions[shapes] = self._open({"session.disable_cpu_ep_fallback": "1"}, sizes)
            return found

    def _sizes(self, shapes: Shapes) -> dict[str, int]:
        """The sizes that may differ, by the names that the graph gives them."""
        sizes: dict[str, int] = {}
        for given, shape in zip(self.plan.inputs, shapes, strict=True):
            # an input that the plan does not use may be gone from its file
            for symbol, size in zip(self._declared.get(given.name, ()), shape, strict=False):
                if isinstance(symbol, str) and sizes.setdefault(symbol, size) != size:
                    raise EngineError(f"{given.name} of {self._where} is {shape}: that does not go with {shapes}")
        return sizes

    def _open(self, entries: Mapping[str, str], sizes: Mapping[str, int]) -> Any:
        try:
            return self.engine.open(self._data, entries, sizes)
        except EngineError:
            raise
        except Exception as error:
            strays = self._strays(sizes) if entries else ""
            told = f"{strays} in it would run on the CPU" if strays else str(error)
            raise EngineError(
                f"onnxruntime-gpu {self.engine.ort.__version__} does not run {self._where} on a GPU: {told}; use "
                "engine='torch', or engine='inductor'"
            ) from error

    def _strays(self, sizes: Mapping[str, int]) -> str:
        """Kinds of nodes that would run on the CPU; "" where it cannot be told."""
        try:
            session = self.engine.open(self._data, {"session.record_ep_graph_assignment_info": "1"}, sizes)
            parts = [part for part in session.get_provider_graph_assignment_info() if part.ep_name != CUDA]
        except Exception:  # an older onnxruntime; or what it says was said of the first attempt
            return ""
        return ", ".join(sorted({node.op_type for part in parts for node in part.get_nodes()}))


class _Bound:
    """A kernel with one block's weights; calls from several threads take turns."""

    def __init__(self, kernel: _Kernel, weights: Sequence[Tensor]) -> None:
        self._kernel, self._weights = kernel, tuple(weights)  # kept alive: sessions know their addresses alone
        self._bindings: dict[Shapes, Bindings] = {}

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        kernel, engine = self._kernel, self._kernel.engine
        given = [tensor.detach().contiguous() for tensor in inputs]
        for spec, tensor in zip(kernel.plan.inputs, given, strict=True):
            kernel.check(spec.name, tensor)
        bindings = self._bindings_for(tuple(tuple(tensor.shape) for tensor in given))
        states = [torch.empty_like(given[index]) for index in kernel.plan.states]
        with _turn, own_stream_in_step(engine.device):
            bindings.run(given, states, engine.run_options)
        return states

    def _bindings_for(self, shapes: Shapes) -> Bindings:
        found = self._bindings.get(shapes)
        if found is None:
            kernel, device = self._kernel, self._kernel.engine.device
            made = Bindings(kernel.session(shapes), kernel.plan, self._weights, device.type, device.index or 0)
            found = self._bindings.setdefault(shapes, made)
        return found
