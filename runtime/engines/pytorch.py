"""The torch engine: a plan's graph run op by op, on the device of its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from runtime import pt2
from runtime.engines import Bound, Kernel, plan_bytes, plan_file
from runtime.spec import Plan


class TorchEngine:
    """Runs ``plans/*.pt2``; on CPU or CUDA, in any dtype torch has."""

    name = "torch"
    recordable = True

    def load(self, plan: Plan, variant: int, files: Mapping[str, bytes]) -> Kernel:
        """Read the variant's graph; BundleError if it is not one."""
        data = plan_bytes(plan, variant, "pt2", files, self.name)
        return _Kernel(data, plan_file(plan, variant, "pt2"))

    def hosting(self, elements: int) -> AbstractContextManager[object]:
        """Nothing to arrange: routers, banks and plans share torch's threads."""
        return nullcontext()


class _Kernel:
    def __init__(self, data: bytes, name: str) -> None:
        self._data, self._name = data, name
        self._graphs: dict[torch.device | None, Callable[..., tuple[Tensor, ...]]] = {}

    def bind(self, weights: Sequence[Tensor], block: str = "") -> Bound:
        device = weights[0].device if weights else None
        if device not in self._graphs:
            self._graphs[device] = pt2.load(self._data, self._name, device)
        graph, fixed = self._graphs[device], tuple(weights)
        return lambda inputs: list(graph(*fixed, *inputs))
