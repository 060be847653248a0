"""What is known of ATen operators by name: their arguments, which act by element, how reshapes move dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

_ACTIVATIONS = """gelu silu relu relu6 sigmoid tanh leaky_relu elu celu selu hardswish hardsigmoid hardtanh mish
    softplus erf log_sigmoid threshold"""
_ELEMENTWISE = "dropout detach alias _to_copy to contiguous type_as lift_fresh_copy"
ACTIVATIONS = frozenset(_ACTIVATIONS.split())
ELEMENTWISE = ACTIVATIONS | frozenset(_ELEMENTWISE.split())
IGNORED = frozenset({"_assert_tensor_metadata", "_assert_scalar"})


def op_name(node: fx.Node) -> str:
    """Name of an ATen operator without overload; "" for anything else."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return ""
    return target._schema.name.removeprefix("aten::")


def is_elementwise(node: fx.Node) -> bool:
    """Whether each element of the result is a function of one element of every tensor argument."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable:
        return False
    return op_name(node) in ELEMENTWISE or torch.Tag.pointwise in node.target.tags


def arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of an ATen call by name, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload)
    schema = node.target._schema.arguments
    given = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    given.update(zip((argument.name for argument in schema), node.args, strict=False))
    given.update(node.kwargs)
    return given


def same_dims(
    source: Sequence[int | torch.SymInt], target: Sequence[int | torch.SymInt]
) -> tuple[dict[int, int], range, range]:
    """Which dimensions a reshape keeps, {target: source}, and the source and target ranges that it mixes.

    Equal sizes are matched from the left and from the right; what is left between is mixed.
    """
    left = 0
    while left < min(len(source), len(target)) and same_size(source[left], target[left]):
        left += 1
    right = 0
    while right < min(len(source), len(target)) - left and same_size(source[-1 - right], target[-1 - right]):
        right += 1
    kept = {index: index for index in range(left)}
    kept.update({len(target) - 1 - index: len(source) - 1 - index for index in range(right)})
    mixed_from, mixed_to = range(left, len(source) - right), range(left, len(target) - right)
    from_real = [index for index in mixed_from if not same_size(source[index], 1)]
    to_real = [index for index in mixed_to if not same_size(target[index], 1)]
    if len(from_real) == len(to_real) == 1:
        kept[to_real[0]] = from_real[0]
    return kept, mixed_from, mixed_to


def shape_of(node: fx.Node) -> tuple[int | torch.SymInt, ...]:
    """Shape of a tensor node's fake value."""
    return tuple(node.meta["val"].shape)


def same_size(one: int | torch.SymInt, other: int | torch.SymInt) -> bool:
    """Whether two sizes are provably equal, without adding a guard."""
    if isinstance(one, int) and isinstance(other, int):
        return one == other
    if isinstance(one, torch.SymInt) and isinstance(other, torch.SymInt):
        return bool(one.node.expr == other.node.expr)
    return False
