"""Arguments of blocks whose numbers no argument of the model sets: made of shapes, buffers and plain values alone.

Such numbers are the same in every call of one form, so that a block's code may read them into Python. Data flow tells:
what is computed from a tensor among the model's arguments follows from it, but for what is made of its shape alone.
Where the code reads a tensor that follows, or lets its numbers set a size, all that is made afterwards may follow too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from passes.graphs.graph import Call, Discovery
from passes.graphs.record import record, tensors_in, undisturbed

_aten = torch.ops.aten
_OF_SHAPES = frozenset(
    getattr(_aten, name).default
    for name in ("zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_full", "new_empty")
)
_UNSEEN_READS = (Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.__contains__)
_UNSEEN_SIZES = (torch.tensor_split, Tensor.tensor_split)


Settled = frozenset[int]
"""The leaves of a block's call that are settled."""


def settled_in_every_run(discovery: Discovery) -> dict[str, Settled]:
    """For each block, what is settled of its own call in every given run; repeats those runs.

    Nothing is where a run cannot be followed.
    """
    blocks = {site.name: discovery.model.get_submodule(site.name) for site in discovery.blocks}
    found: dict[str, Settled] = {}
    for given, _ in discovery.buckets:
        now = _settled_in(discovery.model, given.kwargs, blocks)
        found = {name: found.get(name, own) & own for name in blocks for own in [now.get(name, Settled())]}
    return found


def _settled_in(model: nn.Module, kwargs: Mapping[str, object], blocks: Mapping[str, nn.Module]) -> dict[str, Settled]:
    calls: dict[str, Call] = {}
    followed = _Following(tensors_in(dict(kwargs)))
    with suppress(RuntimeError, NotImplementedError), undisturbed(model), followed, _Reads(followed):
        calls = record(model, kwargs, blocks)[0]
    return {
        name: frozenset(
            at for at, leaf in enumerate(call.leaves) if isinstance(leaf, Tensor) and not followed.has([leaf])
        )
        for name, call in calls.items()
    }


class _Following(TorchDispatchMode):
    """Knows the memory of all that follows from the `sources`; once their numbers were `read`, of all that is made.

    What an operator that is given functions (flex attention) makes is taken to follow: they may hold what does.
    """

    supports_higher_order_operators = True

    def __init__(self, sources: Sequence[Tensor]) -> None:
        super().__init__()
        self.read = False
        self._held: dict[int, object] = {}  # storages, whose addresses must not be given out anew
        self._hold(sources)

    def has(self, tensors: Sequence[Tensor]) -> bool:
        """Whether one of `tensors` follows."""
        return any(tensor.untyped_storage()._cdata in self._held for tensor in tensors)

    def _hold(self, tensors: Sequence[Tensor]) -> None:
        self._held |= {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        if isinstance(func, HigherOrderOperator):
            self._hold(tensors_in(outputs))
            return outputs
        given = tensors_in((args, kwargs))
        follows = self.has(given)
        if self.read or (follows and func not in _OF_SHAPES):
            self._hold(tensors_in(outputs))
            if func._schema.is_mutable:
                self._hold(given)
        self.read = self.read or (follows and _lets_out(func, args))
        return outputs


def _lets_out(func: Any, args: Sequence[Any]) -> bool:
    """Whether what an operator gives tells numbers of its arguments otherwise than in a tensor's elements."""
    if func is _aten.index.Tensor:
        return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


class _Reads(TorchFunctionMode):
    """Tells what follows of the reads that no operator is called for."""

    def __init__(self, following: _Following) -> None:
        super().__init__()
        self._following = following

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = tensors_in((args, kwargs))
        looked = tensors if func in _UNSEEN_READS else tensors[1:] if func in _UNSEEN_SIZES else ()
        if looked and self._following.has(looked):
            self._following.read = True
        return func(*args, **(kwargs or {}))
