"""Which operators a graph may call: those that only compute what they give from what they are given.

That is read off an operator's schema and tags, so that operators of a later torch are judged too. What schemas do not
tell is named here: memory that is read before it is written, layouts whose contents torch does not check, and files.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from runtime.base import guard as _guard  # noqa: F401  registers the operator that glue graphs call
from runtime.bundle import limits

_NAMESPACES = ("aten", "prims", "edit_compile")
_NAMES = "eq ne le ge lt gt neg pos mul add sub floordiv mod pow truediv and_ or_ lshift rshift"
ARITHMETIC: dict[str, Callable[..., Any]] = {
    **{f"_operator.{name}": getattr(operator, name) for name in _NAMES.split()},
    **{f"math.{name}": getattr(math, name) for name in ("trunc", "ceil", "floor", "sqrt")},
    **{
        f"torch.sym_{name}": getattr(torch, f"sym_{name}")
        for name in ["not", "int", "float", "ite", "max", "min", "sqrt"]
    },
}
"""What is done with sizes, by the names that torch.export writes."""

_CHECKS = ("_assert_scalar", "_assert_tensor_metadata", "sym_constrain_range", "sym_constrain_range_for_size")
"""Give nothing, and do nothing but raise."""

_PRIVATE = ("_unsafe_view", "_conj")
"""Of torch's private operators (a leading underscore), those that exports hold beside the core ones."""

_UNSAFE = re.compile(
    "^set$|from_file|empty|resize|as_strided|linalg_lstsq|sparse|quantize|mkldnn|nested|fbgemm|cudnn|miopen|backward"
    "|^_fft_|^_native_batch_norm_legit$"
)
"""Read what was never written, or lies beside their input, or layouts whose indices torch does not check, or end the
process where arguments make no sense (python -m tests.torture.operators)."""

WRITTEN = {
    torch.ops.aten.empty.memory_format: torch.ops.aten.zeros.default,
    torch.ops.aten.empty_like.default: torch.ops.aten.zeros_like.default,
    torch.ops.aten.new_empty.default: torch.ops.aten.new_zeros.default,
}
"""What is read in the place of operators whose result holds whatever was in memory: exports have them, written over."""

_TRAINING = ("training", "train", "use_input_stats")


def find(target: str) -> Callable[..., Any] | None:
    """What a graph calls `target`; None for what is neither arithmetic nor an operator that this torch has."""
    if target in ARITHMETIC:
        return ARITHMETIC[target]
    parts: Sequence[str] = target.split(".")
    if parts[:2] != ["torch", "ops"] or len(parts) != 5 or parts[2] not in _NAMESPACES:
        return None
    found = getattr(getattr(getattr(torch.ops, parts[2]), parts[3], None), parts[4], None)
    return found if isinstance(found, torch._ops.OpOverload) else None


def refusal(called: Callable[..., Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] = {}) -> str | None:
    """Why a graph may not call `called` with these arguments (nodes, or numbers written down); None where it may."""
    if not isinstance(called, torch._ops.OpOverload):
        return None
    if called.namespace == "edit_compile" or called in WRITTEN:
        return _too_large(called, _given(called, args, kwargs))
    if called._schema.is_mutable:
        return "writes into its arguments"
    why = _no_function(called)
    if why is not None:
        return why
    given = _given(called, args, kwargs)
    off = any(given.get(name) is False for name in _TRAINING)
    if torch.Tag.nondeterministic_seeded in called.tags and not off and given.get("dropout_p") != 0:
        return "draws random numbers"
    learns = given.get("running_mean") is not None or given.get("running_var") is not None
    if learns and not off and not called._opname.endswith("_no_training"):
        return "may write into its running statistics"
    return _too_large(called, given)


def refused_in(graph: fx.Graph) -> str | None:
    """The first call in a graph that no bundle may hold, and why; None where there is none."""
    for node in graph.nodes:
        why = refusal(node.target, node.args, node.kwargs) if node.op == "call_function" else None
        if why is not None:
            return f"{node.target} {why}"
    return None


def _no_function(called: torch._ops.OpOverload) -> str | None:
    """Why `called` is no public function of tensors; None where it is one."""
    schema, name = called._schema, called._opname
    kinds = [str(value.type) for value in schema.arguments]
    if name in _CHECKS:
        return None
    if not schema.returns or not torch._C._dispatch_has_kernel(called.name()):
        return "is called for what it does, not for what it gives"
    if not any("Tensor" in kind for kind in (*kinds, *(str(value.type) for value in schema.returns))):
        return "is no operator on tensors"
    if _UNSAFE.search(name):
        return "may read memory that is not its input's"
    if re.match("_(?!_)", name) and torch.Tag.core not in called.tags and name not in _PRIVATE:
        return "is private to torch"
    return None


def _given(called: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, those left out with their defaults."""
    arguments = called._schema.arguments
    defaults = {value.name: value.default_value for value in arguments if value.has_default_value()}
    own = {value.name: kwargs[value.name] for value in arguments if value.name in kwargs}
    return {**defaults, **dict(zip((value.name for value in arguments), args, strict=False)), **own}


def _too_large(called: torch._ops.OpOverload, given: Mapping[str, Any]) -> str | None:
    """Why the sizes that a call writes down cannot be meant; None where they can."""
    arguments = called._schema.arguments
    made = not any("Tensor" in str(value.type) for value in arguments)
    most = limits.MADE if made else limits.SIZES
    counts = [_steps(given)] if made else []
    for value in arguments:
        kind, one = str(value.type), given.get(value.name)
        if kind in ("List[int]", "Optional[List[int]]") and isinstance(one, (list, tuple)):
            counts.append(math.prod(max(abs(size), 1) for size in one if type(size) is int))
        elif kind == "int" and type(one) is int and value.name not in ("start", "end"):  # 2^63 - 1: to the last
            counts.append(abs(one))
    if max(counts, default=0) > most or (made and math.prod(max(count, 1) for count in counts) > most):
        return f"is given sizes of more than {most} elements"
    return None


def _steps(given: Mapping[str, Any]) -> int:
    """How many numbers a range has that is written down; 0 for all else."""
    start, end, step = given.get("start", 0), given.get("end"), given.get("step", 1)
    if "steps" in given or not all(type(value) in (int, float) for value in (start, end, step)) or not step:
        return 0
    length = (end - start) / step
    return int(abs(length)) if math.isfinite(length) else limits.MADE + 1
