"""What passes may say of a model on the meta device, whose tensors have shapes and no numbers.

A dry run of such a model answers by data flow what is otherwise asked of numbers:

    two values are equal                  <=>  they lie in the same memory                           `same`
    a value changes with the timestep     <=>  it is computed from it                                `changed_by`

Of a comparison that has no such answer, shapes and dtypes remain (`hollow` tells); UNCHECKED says which those are.

States are proven with numbers even here, since a block whose parameters are all zero needs no weights
(passes.observe.residuals): its inputs are noise, and products with a zero factor are not computed but known,

    x W + b = 0    where W = 0 and b = 0

so that what is left costs one pass over the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from passes.graphs.graph import BlockSite, Call
from passes.graphs.record import tensors_in

UNCHECKED = (
    "that the rows of a batch do not influence one another",
    "that the time embedding changes its numbers with the timestep (it is computed from it)",
    "that each block's graph gives what the block gives, for every block of a plan",
    "that each width gives what the block with masked hidden channels gives",
)
"""What a dry run compares by shapes and dtypes alone where there are no weights."""


def weightless(module: nn.Module) -> bool:
    """Whether some of the module's parameters are on the meta device."""
    return any(parameter.is_meta for parameter in module.parameters())


def hollow(*tensors: Tensor) -> bool:
    """Whether one of the tensors has no numbers."""
    return any(tensor.is_meta for tensor in tensors)


def same(value: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal; those without numbers are where they are the same memory."""
    if hollow(value, other):
        return value.shape == other.shape and _memory(value) == _memory(other)
    return torch.equal(value, other)


def changed_by(source: object, run: Callable[[], dict[str, Call]], given: Mapping[str, Call]) -> dict[str, Call]:
    """The calls that `run` records, with `source` among its arguments.

    Where `source` has no numbers, leaves that are not computed from it are those of the `given` calls
    themselves, so that they are the `same`.
    """
    if not isinstance(source, Tensor) or not hollow(source):
        return run()
    with _Following(source) as followed:
        calls = run()
    return {
        name: replace(call, leaves=tuple(followed.settled(call.leaves, given[name].leaves))) if name in given else call
        for name, call in calls.items()
    }


def proving_call(site: BlockSite) -> Call:
    """The last call of a block; where that has no numbers, its smallest one with noise in its arguments.

    Arguments that hold no floats are ones; outputs stay without numbers.
    """
    last = site.calls[-1]
    if not hollow(*tensors_in(last.leaves)):
        return last
    call = min(site.calls, key=lambda call: sum(tensor.numel() for tensor in tensors_in(call.leaves)))
    leaves = (_filled(leaf, at) if isinstance(leaf, Tensor) else leaf for at, leaf in enumerate(call.leaves))
    return replace(call, leaves=tuple(leaves))


def zeros_for(module: nn.Module) -> dict[str, Tensor]:
    """A zero for every parameter, in no memory of its own; noise for buffers that have no numbers."""
    zeros = {
        name: torch.zeros((), dtype=parameter.dtype, device=_place(parameter)).expand(parameter.shape)
        for name, parameter in module.named_parameters()
    }
    return zeros | {name: _filled(buffer, 0) for name, buffer in module.named_buffers() if hollow(buffer)}


def known_zeros(module: nn.Module) -> AbstractContextManager[object]:
    """Inside the ``with`` block a module without weights that runs on zeros computes no product with a zero factor."""
    return _KnownZeros() if weightless(module) else nullcontext()


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _place(tensor: Tensor) -> torch.device:
    return torch.device("cpu") if hollow(tensor) else tensor.device


def _filled(tensor: Tensor, seed: int) -> Tensor:
    if not hollow(tensor):
        return tensor
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return torch.ones((), dtype=tensor.dtype).expand(tensor.shape)
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.complex64 if tensor.is_complex() else torch.float32
    return torch.randn(tensor.shape, generator=generator, dtype=dtype).to(tensor.dtype)


class _Following(TorchDispatchMode):
    """Knows the memory of everything computed from one tensor inside the ``with`` block."""

    def __init__(self, source: Tensor) -> None:
        super().__init__()
        # Memory is told apart by its address in the process, which must not be given out anew.
        self._held = {_memory(source): source.untyped_storage()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        if any(_memory(tensor) in self._held for tensor in tensors_in((args, kwargs))):
            self._held |= {_memory(tensor): tensor.untyped_storage() for tensor in tensors_in(outputs)}
        return outputs

    def settled(self, leaves: Sequence[object], given: Sequence[object]) -> Iterator[object]:
        """`leaves`, those that do not follow from the source replaced by `given` ones of the same place."""
        for leaf, before in zip(leaves, given, strict=True):
            follows = isinstance(leaf, Tensor) and _memory(leaf) in self._held
            yield leaf if follows or not isinstance(before, Tensor) else before


_MAPS = (F.linear, F.conv1d, F.conv2d, F.conv3d)
_PRODUCTS = (torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm)


class _KnownZeros(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _vanishes(func, args, kwargs):
            return func(*args, **kwargs)
        bare = pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        result = func(*bare[0], **bare[1])
        return torch.zeros(result.shape, dtype=result.dtype)


def _vanishes(func: object, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call is a product that is known to be zero."""
    if func in _PRODUCTS:
        return any(map(_is_zero, args))
    if func in _MAPS:
        _, weight, bias = (*args, *(kwargs[name] for name in ("weight", "bias") if name in kwargs), None)[:3]
        return _is_zero(weight) and (bias is None or _is_zero(bias))
    return func is F.scaled_dot_product_attention and _is_zero(args[2] if len(args) > 2 else kwargs["value"])


def _is_zero(tensor: Tensor) -> bool:
    """Whether all elements are zero; an expanded dimension is looked at once."""
    return not tensor[tuple(slice(0, 1) if step == 0 else slice(None) for step in tensor.stride())].any()
