"""The arguments of a model's forward as a flat set of tensors and plain constants.

Lists, tuples and dicts are flattened to dotted names (``x.0``), and made of them again; leaves are tensors or scalars.
What holds others is a constant, too: models may tell a tuple from a list, and an empty one from None.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runtime.base.errors import InputError, ShapeError, refuse_infinite
from runtime.bundle.spec import Glue, GlueInput

Constant = bool | int | float | str | None

IGNORED = frozenset({"return_dict"})
"""Arguments that only say how the result is wrapped."""


OTHERS = "**"
"""Stands among the names of a forward's arguments for all others, where it takes any."""

MISSING = object()

HOLDERS: dict[str, type] = {"<list>": list, "<tuple>": tuple, "<dict>": dict}
"""What stands among the constants for something that holds others."""


def argument_names(forward: Callable[..., object]) -> tuple[str, ...]:
    """Names of the arguments of `forward`, in order; OTHERS comes last where it takes others by keyword."""
    parameters = inspect.signature(forward).parameters.values()
    names = tuple(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
    return (*names, OTHERS) if any(p.kind is p.VAR_KEYWORD for p in parameters) else names


def telling_none(forward: Callable[..., object]) -> tuple[str, ...]:
    """Names of the arguments of `forward` that default to another value than None, so that None says something.

    OTHERS is among them where it takes any: what it does where they are missing is its own affair.
    """
    parameters = inspect.signature(forward).parameters.values()
    others = (OTHERS,) * any(p.kind is p.VAR_KEYWORD for p in parameters)
    return (*(p.name for p in parameters if p.default is not None and p.default is not p.empty), *others)


def without_silent(given: Mapping[str, Any], names: Sequence[str], telling: Sequence[str]) -> dict[str, Any]:
    """`given` without what is None and says nothing by it; `names` and `telling` are the forward's."""

    def says(name: str) -> bool:
        return name in telling or (OTHERS in telling and name not in names)

    return {name: value for name, value in given.items() if value is not None or says(name)}


def named(arguments: Sequence[str], args: Sequence[object], kwargs: Mapping[str, object]) -> dict[str, object]:
    """Positional and keyword arguments by name; InputError for one the model does not take."""
    own = [name for name in arguments if name != OTHERS]
    if len(args) > len(own):
        raise InputError(f"forward takes {len(own)} arguments, got {len(args)} by position")
    given = dict(zip(own, args, strict=False))
    for name, value in kwargs.items():
        if name not in own and OTHERS not in arguments:
            raise InputError(f"forward takes no argument {name!r}; it takes {', '.join(arguments)}")
        if name in given:
            raise InputError(f"argument {name!r} is given twice")
        given[name] = value
    return given


def flatten(arguments: Mapping[str, object]) -> tuple[dict[str, Tensor], dict[str, Constant]]:
    """Tensors and constants by dotted name; constants are None, scalars, and of `HOLDERS` whatever holds others.

    InputError for a leaf that is neither a tensor nor a scalar.
    """
    tensors: dict[str, Tensor] = {}
    constants: dict[str, Constant] = {}
    for name, value in arguments.items():
        if name not in IGNORED:
            _flatten(name, value, tensors, constants)
    return tensors, constants


def _flatten(name: str, value: object, tensors: dict[str, Tensor], constants: dict[str, Constant]) -> None:
    if isinstance(value, Tensor):
        tensors[name] = value
    elif value is None or (plain := as_plain(value)) is not None:
        constants[name] = None if value is None else plain
    elif isinstance(value, (list, tuple, Mapping)):
        kind = "dict" if isinstance(value, Mapping) else "list" if isinstance(value, list) else "tuple"
        constants[name] = f"<{kind}>"
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            _flatten(f"{name}.{key}", item, tensors, constants)
    else:
        raise InputError(f"argument {name!r} is a {type(value).__name__}: neither a tensor nor plain data")


def as_plain(value: object) -> Constant:
    """A scalar as what a manifest can hold; None for anything else.

    What a model can tell from a plain number or text, as members of enums, numpy's scalars and dtypes, is a text that
    nobody writes: ``<module:Mode.A>``, ``<float32 0.5>``. So are NaN and infinity, which JSON lacks.
    """
    kind = type(value)
    place = f"{kind.__module__}:{kind.__qualname__}"
    if kind in (bool, int, str) or (kind is float and math.isfinite(value)):  # type: ignore[arg-type]
        return value  # type: ignore[return-value]
    if isinstance(value, Enum):
        return f"<{place}.{value.name or value.value}>"
    if isinstance(value, np.generic):
        return f"<{kind.__name__} {value.item()!r}>"
    base = next((base for base in (int, float, str) if isinstance(value, base)), None)
    if base is not None:
        return f"<{place} {base.__repr__(value)}>"
    return f"<{value}>" if isinstance(value, (torch.dtype, torch.device)) else None


def exactly(value: object) -> object:
    """Of a number or text, what is equal for two that are of one type, value and sign alone; all else as it is."""
    plain = isinstance(value, (int, float, complex, str, np.generic))
    return (type(value), repr(value)) if plain else value


def all_exactly(constants: Mapping[str, Constant]) -> dict[str, object]:
    """What `exactly` gives for each of a call's constants that says anything, by name."""
    return {n: exactly(value) for n, value in constants.items() if n not in IGNORED}


def mapped(arguments: Mapping[str, object], change: Callable[[str, Tensor], Tensor]) -> dict[str, Any]:
    """`arguments` with ``change(dotted name, tensor)`` in the place of every tensor."""
    return {name: _mapped(name, value, change) for name, value in arguments.items()}


def _mapped(name: str, value: Any, change: Callable[[str, Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(name, value)
    if isinstance(value, Mapping):
        return {key: _mapped(f"{name}.{key}", item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_mapped(f"{name}.{key}", item, change) for key, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)  # of a named tuple: one by one
    return value


def unflatten(values: Mapping[str, object]) -> dict[str, Any]:
    """Arguments by name, of leaves by dotted name, and of `HOLDERS`.

    Where no holder is named, what has the keys 0, 1, ... becomes a list, all else a dict.
    """
    holders = {name: HOLDERS[value] for name, value in values.items() if type(value) is str and value in HOLDERS}
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *path, last = name.split(".")
        place = tree
        for key in path:
            place = place.setdefault(key, {})
        place.setdefault(last, {}) if name in holders else place.update({last: value})
    return {name: _held(name, value, holders) for name, value in tree.items()}


def _held(name: str, value: Any, holders: Mapping[str, type]) -> Any:
    if type(value) is not dict:
        return value
    items = {key: _held(f"{name}.{key}", item, holders) for key, item in value.items()}
    numbers = [str(index) for index in range(len(items))]
    numbered = items.keys() == set(numbers)
    kind = holders.get(name) or (list if items and numbered else dict)
    return kind(items[key] for key in numbers) if kind is not dict and numbered else items


def find_glue(glues: Sequence[Glue], tensors: Mapping[str, Tensor], constants: Mapping[str, Constant]) -> Glue | None:
    """The glue compiled for this form of call: the same tensors, by name, shape and dtype, and the same constants."""
    return next(
        (g for g in glues if _shaped(g, tensors) and _typed(g, tensors) and _same_constants(g, constants)), None
    )


def retyped(
    glues: Sequence[Glue], tensors: Mapping[str, Tensor], constants: Mapping[str, Constant], name: str
) -> dict[str, Tensor] | None:
    """`tensors` with the one called `name` in the dtype that some glue takes, if that loses nothing.

    Schedulers count timesteps in integers or floats. Synchronises with the device where a glue is found.
    """
    for glue in glues:
        if name in tensors and _shaped(glue, tensors) and _same_constants(glue, constants):
            wanted = {given.name: getattr(torch, given.dtype) for given in glue.inputs}
            cast = {**tensors, name: tensors[name].to(wanted[name])}
            if _typed(glue, cast) and torch.equal(cast[name].double(), tensors[name].double()):
                return cast
    return None


def explain(glues: Sequence[Glue], tensors: Mapping[str, Tensor], constants: Mapping[str, Constant]) -> InputError:
    """Why no glue fits: a missing or surplus input, a dtype, a constant, or the shapes that were compiled."""
    if not glues:
        return ShapeError("nothing has been compiled yet")
    shaped = [glue for glue in glues if _shaped(glue, tensors)]
    for given in shaped[0].inputs if shaped else ():
        dtypes = sorted({i.dtype for glue in shaped for i in glue.inputs if i.name == given.name})
        if str(tensors[given.name].dtype)[6:] not in dtypes:
            told = f"input {given.name!r} is {str(tensors[given.name].dtype)[6:]}, compiled for {' and '.join(dtypes)}"
            return InputError(f"{told}: cast it, or compile with inputs of this dtype, too")
    typed = [glue for glue in shaped if _typed(glue, tensors)]
    if typed:
        traced, called = typed[0].constants, constants
        one, other = all_exactly(traced), all_exactly(called)
        names = sorted(n for n in one.keys() | other.keys() if one.get(n, MISSING) != other.get(n, MISSING))
        told = "; ".join(f"{n}: compiled {_with(traced, n)}, called {_with(called, n)}" for n in names)
        return ShapeError(f"these arguments are fixed when compiling: {told}")
    if shaped:
        told = ", ".join(f"{name} {str(tensor.dtype)[6:]}" for name, tensor in tensors.items())
        return InputError(f"not compiled for these dtypes together: {told}")
    wanted = {given.name for glue in glues for given in glue.inputs}
    for name in sorted(wanted - tensors.keys()):
        if all(name in {given.name for given in glue.inputs} for glue in glues):
            return InputError(f"missing input {name!r}")
    for name in sorted(tensors.keys() - wanted):
        return InputError(f"input {name!r} was not given when compiling: compile with it, or leave it out")
    shapes = "\n".join("  " + ", ".join(f"{i.name} {_shape(i.shape)}" for i in glue.inputs) for glue in glues)
    called_with = ", ".join(f"{name} {_shape(tuple(tensor.shape))}" for name, tensor in tensors.items())
    return ShapeError(f"not compiled for {called_with}\ncompiled shapes (* is any batch size):\n{shapes}")


def check_device(glue: Glue, tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """InputError for an input elsewhere than on `device`."""
    for given in glue.inputs:
        if tensors[given.name].device != device:
            where = tensors[given.name].device
            raise InputError(f"input {given.name!r} is on {where}, the compiled transformer on {device}")


def check_finite(glue: Glue, tensors: Mapping[str, Tensor]) -> None:
    """InputError for a float input that is not finite. Synchronises with the device."""
    floats = {i.name: tensors[i.name] for i in glue.inputs if tensors[i.name].is_floating_point()}
    sums = [value.sum(dtype=torch.float32 if value.dtype.itemsize < 8 else None) for value in floats.values()]
    if sums and not torch.isfinite(sum(sums)):  # type: ignore[arg-type]
        # a sum may overflow on its own, so look again, closely
        refuse_infinite([name for name, value in floats.items() if not torch.isfinite(value).all()])


def rows(glue: Glue, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Rows of the batch in each input that carries it."""
    return {
        given.name: tensors[given.name].shape[given.shape.index(None)] for given in glue.inputs if None in given.shape
    }


def _shaped(glue: Glue, tensors: Mapping[str, Tensor]) -> bool:
    return len(glue.inputs) == len(tensors) and all(
        given.name in tensors and _matches(given, tensors[given.name]) for given in glue.inputs
    )


def _matches(given: GlueInput, tensor: Tensor) -> bool:
    return len(given.shape) == tensor.dim() and all(
        want is None or want == have for want, have in zip(given.shape, tensor.shape, strict=True)
    )


def _typed(glue: Glue, tensors: Mapping[str, Tensor]) -> bool:
    return all(tensors[given.name].dtype == getattr(torch, given.dtype) for given in glue.inputs)


def _same_constants(glue: Glue, constants: Mapping[str, Constant]) -> bool:
    """Whether a call's constants are those of `glue`, also as earlier manifests told them.

    Those had classes without their modules, and nothing of lists, tuples and dicts that hold something.
    """
    traced, called = all_exactly(glue.constants), all_exactly(constants)
    if traced == called:
        return True
    if not any(value in HOLDERS for value in glue.constants.values()):
        holding = {name.rpartition(".")[0] for name in (*constants, *(given.name for given in glue.inputs))}
        constants = {n: v for n, v in constants.items() if not (n in holding and v in HOLDERS)}
    return traced in (all_exactly(constants), all_exactly({n: _unplaced(value) for n, value in constants.items()}))


def _unplaced(value: Constant) -> Constant:
    return re.sub(r"^<[\w.]+:", "<", value) if type(value) is str else value


def _with(constants: Mapping[str, Constant], name: str) -> str:
    value = constants.get(name)
    kind = HOLDERS.get(value) if type(value) is str else None
    return "without it" if name not in constants else f"with a {kind.__name__}" if kind else f"with {value!r}"


def _shape(shape: Sequence[int | None]) -> str:
    return "(" + ", ".join("*" if size is None else str(size) for size in shape) + ")"
