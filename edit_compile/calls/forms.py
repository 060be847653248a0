"""In which forms a model was called: its arguments by name, shapes, dtypes and constants."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from runtime.face.arguments import all_exactly, flatten


def one_of_each_form(calls: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The first of `calls` (keyword arguments) in each form, in order."""
    found: dict[tuple[object, ...], dict[str, Any]] = {}
    for arguments in calls:
        found.setdefault(_form(arguments), dict(arguments))
    return list(found.values())


def _form(arguments: Mapping[str, Any]) -> tuple[object, ...]:
    # which of its arguments None says something to, the recorded model alone knows
    tensors, constants = flatten({name: value for name, value in arguments.items() if value is not None})
    shapes = sorted((name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors.items())
    return tuple(shapes), tuple(sorted(all_exactly(constants).items()))
