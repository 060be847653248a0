"""What the arguments of a block's call are called."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from passes.graphs.graph import Call


def argument_names(module: nn.Module, call: Call) -> list[tuple[str, ...]]:
    """For each leaf of a call, its parameter's name and the keys that lead to it from there."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    more = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    positional = [parameter.name for parameter in parameters if parameter.kind not in more]
    names = []
    for path, _ in pytree.tree_flatten_with_path(pytree.tree_unflatten(call.leaves, call.spec))[0]:
        whole, first, *rest = (_key(key) for key in path)
        if whole == "0" and int(first) < len(positional):
            first = positional[int(first)]
        names.append((first, *rest))
    return names


def output_names(call: Call) -> list[str]:
    """For each leaf that a call returned, the keys that lead to it, joined by dots ("0" if it is all)."""
    tree = pytree.tree_unflatten(call.outputs, call.output_spec)
    return [".".join(map(_key, path)) or "0" for path, _ in pytree.tree_flatten_with_path(tree)[0]]


def spoken(module: nn.Module, call: Call, at: int) -> str:
    """Leaf `at` of a call as a message names it: ``argument 'rope'``, ``argument 'cache.k'``."""
    return f"argument {'.'.join(argument_names(module, call)[at])!r}"


def told_of_structure(module: nn.Module, calls: Sequence[Call]) -> str:
    """What differs between calls that are made of other leaves, or return other ones."""
    names = [{".".join(name) for name in argument_names(module, call)} for call in calls]
    different = sorted({name for own in names for name in own if not all(name in other for other in names)})
    if not different:
        return "is called with other arguments in another run (other shapes, batch or timestep)"
    where = different[0].partition(".")[0]
    told = f"is called with other arguments in another run: argument {where!r} has other entries there"
    return told + (" (one for each sample? pass a tensor instead)" if "." in different[0] else "")


def held_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Tensors that `module` and its children hold beside their parameters: buffers and plain attributes, by name."""
    found: dict[str, Tensor] = {}
    for prefix, inner in module.named_modules():
        own: dict[str, Any] = {**inner._buffers, **vars(inner)}
        found |= {f"{prefix}.{name}".lstrip("."): value for name, value in own.items() if isinstance(value, Tensor)}
    return found


def _key(key: object) -> str:
    return str(next(getattr(key, field) for field in ("idx", "key", "name") if hasattr(key, field)))
