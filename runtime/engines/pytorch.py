"""The torch engines: a plan's graph run op by op, or compiled by torch.compile, on the device of its weights."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from runtime.base.errors import EngineError
from runtime.bundle import archive as pt2
from runtime.bundle.spec import Plan
from runtime.engines import Bound, Engine, Kernel, plan_bytes, plan_file
from runtime.engines.products import quickened

Graph = Callable[..., tuple[Tensor, ...]]
Shapes = tuple[tuple[int, ...], ...]


class TorchEngine(Engine):
    """Runs ``plans/*.pt2``; on CPU or CUDA, in any dtype torch has."""

    def load(self, plan: Plan, variant: int, files: Mapping[str, bytes]) -> Kernel:
        """Read the variant's graph; BundleError if it is not one."""
        data = plan_bytes(plan, variant, "pt2", files, self.name)
        return _Kernel(data, plan_file(plan, variant, "pt2"))


class InductorEngine(Engine):
    """The same graphs compiled by torch.compile, for fixed shapes, when a plan is first called with them.

    On CUDA unverified: no GPU has run it. EngineError at that call where torch.compile has no compiler to work with, or
    does not compile; it never falls back to running op by op.
    """

    def load(self, plan: Plan, variant: int, files: Mapping[str, bytes]) -> Kernel:
        """Read the variant's graph; BundleError if it is not one."""
        data = plan_bytes(plan, variant, "pt2", files, self.name)
        where = f"plan {plan.id} at width {plan.variants[variant].width:g}"
        return _CompilingKernel(data, plan_file(plan, variant, "pt2"), where)


class _Kernel:
    def __init__(self, data: bytes, name: str) -> None:
        self._data, self._name = data, name
        self._graphs: dict[torch.device | None, Graph] = {}

    def bind(self, weights: Sequence[Tensor], block: str = "") -> Bound:
        device = _device(weights)
        if device not in self._graphs:
            self._graphs[device] = pt2.load(self._data, self._name, device)
        return functools.partial(_run, self._graphs[device], tuple(weights))


def _run(graph: Graph, weights: tuple[Tensor, ...], inputs: Sequence[Tensor]) -> list[Tensor]:
    with quickened(next(iter(weights), None)):
        return list(graph(*weights, *inputs))


class _CompilingKernel:
    def __init__(self, data: bytes, name: str, where: str) -> None:
        self._data, self._name, self._where = data, name, where
        self._compiled: dict[torch.device | None, _Compiled] = {}

    def bind(self, weights: Sequence[Tensor], block: str = "") -> Bound:
        device = _device(weights)
        if device not in self._compiled:
            load = functools.partial(pt2.load, self._data, self._name, device)
            self._compiled[device] = _Compiled(load, f"{self._where} on {device}")
        compiled, fixed = self._compiled[device], [_plain(weight) for weight in weights]
        return lambda inputs: list(compiled(fixed, inputs))


class _Compiled:
    """A graph compiled once per set of shapes; weights are inputs, so all blocks of a plan share what was compiled.

    Each set of shapes has a graph of its own: torch counts compilations by graph, and beyond a limit it would run op by
    op. Here it raises instead, as for a graph that it cannot compile whole (``fullgraph``).
    """

    def __init__(self, load: Callable[[], Graph], where: str) -> None:
        self._load, self._where = load, where
        self._graphs: dict[Shapes, Graph] = {}
        self._lock = threading.Lock()

    @torch.no_grad()
    def __call__(self, weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        given = [_plain(tensor) for tensor in inputs]
        shapes = tuple(tuple(tensor.shape) for tensor in given)
        graph = self._graphs.get(shapes)
        if graph is not None:
            return graph(*weights, *given)
        with self._lock:
            if shapes not in self._graphs:
                self._graphs[shapes] = self._compile((*weights, *given))
        return self._graphs[shapes](*weights, *given)

    def _compile(self, examples: Sequence[Tensor]) -> Graph:
        asked: list[object] = []

        def backend(graph: Any, given: Any) -> Any:
            asked.append(graph)
            return torch._dynamo.lookup_backend("inductor")(graph, given)

        compiled: Graph = torch.compile(self._load(), backend=backend, fullgraph=True, dynamic=False)
        try:
            compiled(*examples)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            told = str(error).partition("\n")[0] or type(error).__name__
            raise EngineError(
                f"torch.compile does not compile {self._where}: {told} (it needs a C++ compiler on a CPU, Triton and "
                "a C compiler on a GPU); use engine='torch'"
            ) from error
        if not asked:
            raise EngineError(
                f"torch.compile left {self._where} as it is: it is switched off, by TORCH_COMPILE_DISABLE, "
                "TORCHDYNAMO_DISABLE or torch.compiler.set_stance; use engine='torch' to run op by op"
            )
        return compiled


def _device(weights: Sequence[Tensor]) -> torch.device | None:
    return weights[0].device if weights else None


def _plain(tensor: Tensor) -> Tensor:
    """`tensor` contiguous, and with the strides that such a one usually has: torch.compile compiles for strides too."""
    tensor = tensor.detach().contiguous()
    strides, count = [], 1
    for size in reversed(tensor.shape):
        strides.append(count)
        count *= max(size, 1)
    usual = tuple(reversed(strides))
    return tensor if tensor.stride() == usual else tensor.as_strided(tensor.shape, usual)
