"""What a block holds beside its parameters and children when it is called, and what of it its code reads.

Attributes are flattened to plain leaves and tensors, so that two sights of a block can be compared. A trace bakes in
what it reads of them, which must then be the same

    in every call          else the model's forward sets it from what it is given      passes.observe.sights
    in every block         that shares the graph                                       passes.blocks.export.validate
"""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from passes.graphs.weightless import hollow

Name = tuple[int, str]
"""-1 and the qualified name of an attribute of the block, or k and that of one of the k-th module that it is given."""
Held = Mapping[Name, Mapping[str, object]]
"""The leaves of each attribute, by the keys that lead to them."""
Plain = tuple[tuple[Name, tuple[tuple[str, object], ...]], ...]

MODULE = frozenset({*vars(nn.Module()), "_compiled_call_impl"})
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, Enum, np.generic)
"""Kinds of data that say what they are, and do not change."""
_DEEPEST = 4
_FOREIGN = ("torch", "threading", "logging", "builtins")


def held_by(block: nn.Module, given: Sequence[nn.Module] = ()) -> dict[Name, dict[str, object]]:
    """What `block` and the modules `given` to it hold now, parameters and children aside."""
    return {
        (k, f"{path}.{key}".lstrip(".")): dict(_leaves(value, "", 0))
        for k, outer in enumerate((block, *given), -1)
        for path, module in outer.named_modules()
        for key, value in (*vars(module).items(), *module._buffers.items())
        if key not in MODULE and key != "forward"
    }


def differing(held: Held, later: Held) -> frozenset[str]:
    """Names of attributes of a module that hold something else `later`."""
    return frozenset(
        name
        for (k, name), leaves in held.items()
        if (now := later.get((k, name))) is None
        or leaves.keys() - now.keys()
        or not all(same_held(leaf, now[key]) for key, leaf in leaves.items())
    )


def plainly(held: Held) -> Plain:
    """The leaves in `held` that are no tensors."""
    leaves = (
        (name, tuple(pair for pair in own.items() if not isinstance(pair[1], Tensor))) for name, own in held.items()
    )
    return tuple((name, own) for name, own in leaves if own)


def holds(block: nn.Module, given: Sequence[nn.Module], wanted: Plain) -> bool:
    """Whether `block` and the modules `given` to it hold what is `wanted` of them."""
    for (k, name), leaves in wanted:
        path, _, key = name.rpartition(".")
        found = dict(_leaves(vars((block, *given)[k + 1].get_submodule(path)).get(key), "", 0))
        if any(own not in found or found[own] != leaf for own, leaf in leaves):
            return False
    return True


def same_held(one: object, other: object) -> bool:
    """Whether two leaves are equal; tensors are where their numbers are."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return type(one) is type(other) and one == other
    if one is other:
        return True
    same = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
    return same and (hollow(one, other) or torch.equal(one, other))


def _leaves(value: object, path: str, depth: int) -> Iterator[tuple[str, object]]:
    """Tensors, and all else as its type and what it says; an object that is no data is what it holds."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, PLAIN):
        yield path, (type(value), repr(value))
    elif depth == _DEEPEST or isinstance(value, nn.Module):
        yield path, type(value)
    elif isinstance(value, functools.partial):
        yield from _inside({"func": value.func, "args": value.args, "keywords": value.keywords}, path, depth)
    elif isinstance(value, types.MethodType):
        yield from _inside({"func": value.__func__, "self": value.__self__}, path, depth)
    elif isinstance(value, Mapping):
        yield path, type(value)
        yield from _inside(value, path, depth)
    elif isinstance(value, list | tuple | set | frozenset):
        yield path, (type(value), len(value))
        ordered = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
        yield from _inside(dict(enumerate(ordered)), path, depth)
    elif hasattr(value, "__qualname__"):
        yield path, (getattr(value, "__module__", ""), value.__qualname__)
        cells = getattr(value, "__closure__", None) or ()
        yield from _inside({k: _content(cell) for k, cell in enumerate(cells)}, path, depth)
    elif isinstance(value, np.ndarray):
        yield path, (value.dtype.str, value.shape, value.tobytes() if value.dtype != object else repr(value))
    else:
        yield path, type(value)
        if type(value).__module__.partition(".")[0] not in _FOREIGN:
            own = {key: getattr(value, key) for key in _slots(type(value)) if hasattr(value, key)}
            yield from _inside(own | getattr(value, "__dict__", {}), path, depth)


def _slots(kind: type) -> Iterator[str]:
    for one in kind.__mro__:
        own = vars(one).get("__slots__", ())
        yield from (own,) if isinstance(own, str) else own


def _inside(items: Mapping[object, object], path: str, depth: int) -> Iterator[tuple[str, object]]:
    for key, item in items.items():
        yield from _leaves(item, f"{path}[{key!r}]", depth + 1)


def _content(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not set yet
        return None


def modules_in(leaves: Sequence[object]) -> list[nn.Module]:
    """The modules among the leaves of a call."""
    return [leaf for leaf in leaves if isinstance(leaf, nn.Module)]


_lock = threading.Lock()
_noting: dict[int, Callable[[nn.Module, str, bool], None]] = {}
_replaced: dict[str, Any] = {}
"""What nn.Module had itself of the two methods by which it tells what is read and set, while somebody notes."""


@contextmanager
def noting_reads(block: nn.Module, given: Sequence[nn.Module] = ()) -> Iterator[set[Name]]:
    """Inside the ``with`` block, the attributes that this thread reads before it has set them itself."""
    names = {id(one): (k, path) for k, outer in enumerate((block, *given), -1) for path, one in outer.named_modules()}
    read: set[Name] = set()
    written: set[Name] = set()

    def note(module: nn.Module, key: str, writes: bool) -> None:
        if id(module) in names:
            k, path = names[id(module)]
            name = (k, f"{path}.{key}".lstrip("."))
            if writes:
                written.add(name)
            elif name not in written:
                read.add(name)

    with _lock:
        if not _noting:
            _install()
        _noting[threading.get_ident()] = note
    try:
        yield read
    finally:
        with _lock:
            del _noting[threading.get_ident()]
            if not _noting:
                _remove()


def _install() -> None:
    """Have modules tell what is read and set of them."""
    _replaced.update({key: vars(nn.Module).get(key) for key in ("__getattribute__", "__setattr__")})
    get, put = nn.Module.__getattribute__, nn.Module.__setattr__

    def reading(module: nn.Module, key: str) -> object:
        if key not in MODULE and (own := _noting.get(threading.get_ident())) is not None:
            own(module, key, False)
        return get(module, key)

    def setting(module: nn.Module, key: str, value: Any) -> None:
        if (own := _noting.get(threading.get_ident())) is not None:
            own(module, key, True)
        put(module, key, value)

    nn.Module.__getattribute__, nn.Module.__setattr__ = reading, setting  # type: ignore[method-assign, assignment]


def _remove() -> None:
    """Give nn.Module back what it had."""
    for key, own in _replaced.items():
        if own is None:
            delattr(nn.Module, key)
        else:
            setattr(nn.Module, key, own)
