"""Whether a model is still what was compiled, without a copy of its weights."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from passes.graphs.held import PLAIN
from runtime.face.arguments import exactly

_MODULE = frozenset(vars(nn.Module()))
_TENSORS = ("_parameters", "_buffers")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_ABSENT = object()
OURS = "edit_compile"


@dataclass(frozen=True)
class Snapshot:
    """Where each tensor of a model is, of what dtype, and how often it was written to; and its plain values.

    Of plain attributes, those in lists, tuples and dicts are seen, too, and those of classes that a module now has of
    its own, its forward among them; modules in them as registered ones; of other objects whether they are the same;
    forward hooks, but for this package's own. What goes around torch's counting, as writing to ``parameter.data`` does,
    is not seen. It is looked at as a generation begins: so that a look is quick, places are found once, and what is
    the very same object there is not compared.
    """

    places: tuple[_Place | _Hooks, ...]

    @staticmethod
    def of(model: nn.Module) -> Snapshot:
        """As they are now."""
        modules = _modules(model)
        return Snapshot((*_places(modules), _Hooks(modules)))

    def changed(self) -> str | None:
        """Name of the first that is not as it was; what came to it since does not count."""
        return next((place.name for place in self.places if not place.is_as_it_was()), None)

    def without_changes(self, written: Collection[str]) -> Snapshot:
        """Without those that have changed, and attributes that were `written`: by the model itself, when we ran it."""
        own = tuple(f"{name}." for name in written)
        return Snapshot(
            tuple(place for place in self.places if not f"{place.name}.".startswith(own) and place.is_as_it_was())
        )


@dataclass(frozen=True)
class _Place:
    """An entry of a module's own dictionary, or what its `keys` lead to from there, and what was there."""

    name: str
    holder: Mapping[str, Any]
    keys: tuple[Any, ...]
    value: object
    mark: object = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "mark", _mark(self.value))

    def is_as_it_was(self) -> bool:
        now: Any = self.holder
        for key in self.keys:
            try:
                now = now[key]
            except (KeyError, IndexError, TypeError):
                return self.value is _ABSENT
        if now is self.value:
            return not isinstance(now, Tensor) or _mark(now) == self.mark
        return isinstance(self.value, PLAIN) and _mark(now) == self.mark


class _Hooks:
    """The forward hooks of `modules`, but for those of this package: an elastic model's, a recorder's."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._names = [f"{name}.{kind}".lstrip(".") for name in modules for kind in _HOOKS]
        self._held = [vars(module)[kind] for module in modules.values() for kind in _HOOKS]
        self._were = self._now()

    @property
    def name(self) -> str:
        """Where the first are that were not there, or are there no more."""
        all_three = zip(self._names, self._were, self._now(), strict=True)
        return next((name for name, were, now in all_three if were != now), "")

    def is_as_it_was(self) -> bool:
        return self._were == self._now() if any(self._held) else not any(self._were)

    def _now(self) -> tuple[tuple[object, ...], ...]:
        return tuple(tuple(filter(_foreign, held.values())) for held in self._held)


def _foreign(hook: object) -> bool:
    return str(getattr(hook, "__module__", "")).partition(".")[0] != OURS


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """`model` and all that it holds, also in attributes, lists, tuples and dicts, by name."""
    found, waiting, seen = dict[str, nn.Module](), [("", model)], set[nn.Module]()
    while waiting:
        outer, one = waiting.pop()
        new = dict(one.named_modules(seen, outer))
        found |= new
        for prefix, module in new.items():
            for place in _attributes(prefix, module):
                if isinstance(place.value, nn.Module):
                    waiting.append((place.name, place.value))
    return found


def _places(modules: Mapping[str, nn.Module]) -> Iterator[_Place]:
    for prefix, module in modules.items():
        own = vars(module)
        for kind in _TENSORS:
            for key, tensor in own[kind].items():
                if tensor is not None:
                    yield _Place(f"{prefix}.{key}".lstrip("."), own[kind], (key,), tensor)
        for key, child in own["_modules"].items():
            yield _Place(f"{prefix}.{key}".lstrip("."), own["_modules"], (key,), child)
        yield from _attributes(prefix, module)
        for key in {"forward", *_of_class(type(module))} - own.keys():  # type: ignore[arg-type]
            yield _Place(f"{prefix}.{key}".lstrip("."), own, (key,), _ABSENT)


def _attributes(prefix: str, module: nn.Module) -> Iterator[_Place]:
    own = vars(module)
    for key, value in own.items():
        if key not in _MODULE:
            yield from _leaves(f"{prefix}.{key}".lstrip("."), own, (key,), value)


@functools.cache
def _of_class(kind: type[nn.Module]) -> frozenset[str]:
    """Plain attributes of a class, which one of its modules may come to have of its own."""
    return frozenset(
        key
        for one in kind.__mro__
        if one not in (nn.Module, object)
        for key, value in vars(one).items()
        if isinstance(value, PLAIN) and not key.startswith("__")
    )


def _leaves(name: str, holder: Mapping[str, Any], keys: tuple[Any, ...], value: object) -> Iterator[_Place]:
    if isinstance(value, dict | list | tuple):
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield from _leaves(f"{name}.{key}", holder, (*keys, key), item)
    else:
        yield _Place(name, holder, keys, value)


def _mark(value: object) -> object:
    """All that is told of a value; of a tensor without its numbers."""
    if not isinstance(value, Tensor):
        return exactly(value)
    version = 0 if value.is_inference() else value._version
    try:
        place = value.data_ptr()
    except RuntimeError:  # without memory, as on the meta device
        place = 0
    return version, place, value.dtype, value.device, value.shape
