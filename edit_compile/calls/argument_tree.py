"""A call's arguments as flat, plain data, and exactly what was passed again: tuples, None and empty places too."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor

from runtime.base.errors import InputError
from runtime.face.arguments import IGNORED, Constant, as_plain, flatten, unflatten

Kind = Literal["tuple", "list", "dict"]


@dataclass(frozen=True)
class FlatArguments:
    """Arguments by dotted name: tensors, constants (None among them), and the kind of everything that holds others."""

    tensors: Mapping[str, Tensor]
    constants: Mapping[str, Constant]
    kinds: Mapping[str, Kind]


def flat_arguments(arguments: Mapping[str, object]) -> FlatArguments:
    """`arguments` without `return_dict`; InputError that names what is neither a tensor nor plain data."""
    given = {name: value for name, value in arguments.items() if name not in IGNORED}
    kinds: dict[str, Kind] = {}
    constants: dict[str, Constant] = {}
    for name, value in given.items():
        _check_key(name, "the forward")
        _describe(name, value, kinds, constants)
    return FlatArguments(flatten(given)[0], constants, kinds)


def whole_arguments(leaves: Mapping[str, object], kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """Arguments as they were, of leaves by dotted name; ValueError where leaves and kinds contradict each other."""
    if both := leaves.keys() & kinds.keys():
        raise ValueError(f"{min(both)} is a leaf and holds others")
    holders: dict[str, Any] = {name: {} for name in sorted(kinds)}  # whatever holds others comes before them
    try:
        tree = unflatten({**holders, **leaves})
    except (AttributeError, TypeError) as error:
        raise ValueError("an argument is a leaf and holds others") from error
    return {name: _restored(name, value, kinds) for name, value in tree.items()}


def _describe(name: str, value: object, kinds: dict[str, Kind], constants: dict[str, Constant]) -> None:
    """Note constants, None among them, and which places are tuples, lists or dicts, empty ones among them."""
    if as_plain(value) is not None or value is None:
        constants[name] = _plain(name, value)
    elif isinstance(value, Mapping):
        kinds[name] = "dict"
        for key, item in value.items():
            _check_key(key, f"argument {name!r}")
            _describe(f"{name}.{key}", item, kinds, constants)
    elif isinstance(value, (list, tuple)):
        if hasattr(value, "_fields"):
            raise InputError(f"argument {name!r} is a {type(value).__name__}: pass a plain tuple, list or dict")
        kinds[name] = "tuple" if isinstance(value, tuple) else "list"
        for index, item in enumerate(value):
            _describe(f"{name}.{index}", item, kinds, constants)


def _check_key(key: object, where: str) -> None:
    if not isinstance(key, str) or "." in key:
        raise InputError(f"{where} holds the key {key!r}: keys have to be text without a dot")


def _plain(name: str, value: object) -> Constant:
    """`value` in one of JSON's own types; enumerations of numbers or text, and numpy's scalars, are what they hold."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise InputError(f"argument {name!r} is an integer of more than 64 bits")
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise InputError(f"argument {name!r} is {value}: NaN or infinity")
        return float(value)
    raise InputError(f"argument {name!r} is a {type(value).__name__}: a recording holds plain data, pass its text")


def _restored(name: str, value: Any, kinds: Mapping[str, Kind]) -> Any:
    kind = kinds.get(name)
    if kind is None:
        if isinstance(value, (dict, list)):
            raise ValueError(f"{name} holds others, and nothing says how")
        return value
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    items = {str(key): _restored(f"{name}.{key}", item, kinds) for key, item in pairs}
    if kind == "dict":
        return items
    if items.keys() != {str(index) for index in range(len(items))}:
        raise ValueError(f"{name} lacks an entry")
    ordered = [items[str(index)] for index in range(len(items))]
    return tuple(ordered) if kind == "tuple" else ordered
