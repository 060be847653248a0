"""The torch engine: a plan's graph run op by op, on the device of its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from runtime import pt2
from runtime.engines import Bound, Kernel, plan_bytes
from runtime.spec import Plan


class TorchEngine:
    """Runs ``plans/*.pt2``; on CPU or CUDA, in any dtype torch has."""

    name = "torch"

    def load(self, plan: Plan, variant: int, files: Mapping[str, bytes]) -> Kernel:
        """Read the variant's graph."""
        return _Kernel(pt2.load(plan_bytes(plan, variant, "pt2", files, self.name)))


class _Kernel:
    def __init__(self, graph: Callable[..., tuple[Tensor, ...]]) -> None:
        self._graph = graph

    def bind(self, weights: Sequence[Tensor]) -> Bound:
        graph, fixed = self._graph, tuple(weights)
        return lambda inputs: list(graph(*fixed, *inputs))
