"""The torch engines: a plan's graph run op by op, or compiled by torch.compile, on the device of its weights."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from runtime.base.errors import EngineError, inside
from runtime.bundle import archive as pt2
from runtime.bundle.spec import Plan, plan_file
from runtime.engines import Bound, Engine, Kernel, plan_bytes
from runtime.engines.products import quickened

Graph = Callable[..., tuple[Tensor, ...]]
Bind = Callable[[Sequence[Tensor]], Bound]
Shapes = tuple[tuple[int, ...], ...]

log = logging.getLogger(__name__)


class TorchEngine(Engine):
    """Runs ``plans/*.pt2``; on CPU or CUDA, in any dtype torch has."""

    def load(self, plan: Plan, variant: int, files: Mapping[str, bytes]) -> Kernel:
        """A kernel that reads the variant's graph at the first block on a device, with a BundleError if it is none."""
        data, name = plan_bytes(plan, variant, "pt2", files, self.name), plan_file(plan, variant, "pt2")
        where = f"plan {plan.id} at width {plan.variants[variant].width:g}"
        return _Kernel(
            lambda device: self._ready(
                functools.partial(pt2.load, data, name, device), plan, f"{where} on {device}", name
            )
        )

    def _ready(self, load: Callable[[], Graph], plan: Plan, where: str, name: str) -> Bind:
        """What binds weights to the graph of a variant of `plan`, the file `name`."""
        graph = load()
        return lambda weights: functools.partial(_run, graph, name, tuple(weights))


class InductorEngine(TorchEngine):
    """The same graphs compiled by torch.compile, when a plan is first called with shapes: for one row, or for any more.

    On CUDA unverified: no GPU has run it. EngineError at that call where torch.compile has no compiler to work with, or
    does not compile; it never falls back to running op by op.
    """

    def _ready(self, load: Callable[[], Graph], plan: Plan, where: str, name: str) -> Bind:
        compiled = _Compiled(load, [given.batch_dim for given in plan.inputs], where)
        return lambda weights: functools.partial(compiled, [_plain(weight) for weight in weights])


class _Kernel:
    """A graph, once per device."""

    def __init__(self, ready: Callable[[torch.device | None], Bind]) -> None:
        self._ready = functools.cache(ready)

    def bind(self, weights: Sequence[Tensor], block: str = "") -> Bound:
        return self._ready(weights[0].device if weights else None)(weights)


def _run(graph: Graph, name: str, weights: tuple[Tensor, ...], inputs: Sequence[Tensor]) -> list[Tensor]:
    with inside(name), quickened(next(iter(weights), None)):
        return list(graph(*weights, *inputs))


class _Compiled:
    """A graph compiled once per set of shapes; weights are inputs, so all blocks of a plan share what was compiled.

    Inputs hold the rows of the batch in `batch_dims`. What is compiled for two rows or more is for any number of them,
    so that groups of rows that decide apart do not each compile. Each set of shapes has a graph of its own: torch
    counts compilations by graph, and beyond a limit it would run op by op. Here it raises instead, as for a graph that
    it cannot compile whole (``fullgraph``).
    """

    def __init__(self, load: Callable[[], Graph], batch_dims: Sequence[int | None], where: str) -> None:
        self._load, self._batch_dims, self._where = load, batch_dims, where
        self._graphs: dict[Shapes, Graph] = {}
        self._lock = threading.Lock()

    @torch.no_grad()
    def __call__(self, weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
        given = [_plain(tensor) for tensor in inputs]
        shapes = tuple(map(_of_any_rows, given, self._batch_dims))
        if shapes not in self._graphs:
            with self._lock:
                if shapes not in self._graphs:
                    self._graphs[shapes] = self._compile(weights, given)
        return list(self._graphs[shapes](*weights, *given))

    def _compile(self, weights: Sequence[Tensor], given: Sequence[Tensor]) -> Graph:
        log.info("torch.compile compiles %s for shapes %s", self._where, [tuple(tensor.shape) for tensor in given])
        for tensor, dim in zip(given, self._batch_dims, strict=True):
            if dim is not None and tensor.shape[dim] > 1:
                torch._dynamo.mark_dynamic(tensor, dim)
        asked: list[object] = []

        def backend(graph: Any, given: Any) -> Any:
            asked.append(graph)
            return torch._dynamo.lookup_backend("inductor")(graph, given)

        compiled: Graph = torch.compile(self._load(), backend=backend, fullgraph=True, dynamic=None)
        try:
            compiled(*weights, *given)
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


def _of_any_rows(tensor: Tensor, dim: int | None) -> tuple[int, ...]:
    """The shape of `tensor`, with two for any number of rows above that in its dimension `dim`."""
    return tuple(min(size, 2) if at == dim else size for at, size in enumerate(tensor.shape))


def _plain(tensor: Tensor) -> Tensor:
    """`tensor` contiguous, and with the strides that such a one usually has: torch.compile compiles for strides too."""
    tensor = tensor.detach().contiguous()
    strides, count = [], 1
    for size in reversed(tensor.shape):
        strides.append(count)
        count *= max(size, 1)
    usual = tuple(reversed(strides))
    return tensor if tensor.stride() == usual else tensor.as_strided(tensor.shape, usual)
