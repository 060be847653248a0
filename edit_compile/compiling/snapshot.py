"""Whether a model is still what was compiled, without a copy of its weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from runtime.face.arguments import exactly

_MODULE = frozenset(vars(nn.Module()))
_TENSORS = ("_parameters", "_buffers")


@dataclass(frozen=True)
class Snapshot:
    """Where each tensor of a model is, of what dtype, and how often it was written to; and its plain values.

    Of plain attributes, those in lists, tuples and dicts are seen, too. What goes around torch's counting, as writing
    to ``parameter.data`` does, is not. It is looked at as a generation begins: so that a look is quick, places are
    found once, and what is the very same object there is not compared.
    """

    places: tuple[_Place, ...]

    @staticmethod
    def of(model: nn.Module) -> Snapshot:
        """As they are now."""
        return Snapshot(tuple(_places(model)))

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
                return False
        if now is self.value:
            return not isinstance(now, Tensor) or _mark(now) == self.mark
        return not isinstance(self.value, Tensor | nn.Module) and _mark(now) == self.mark


def _places(model: nn.Module) -> Iterator[_Place]:
    for prefix, module in model.named_modules():
        own = vars(module)
        for kind in _TENSORS:
            for key, tensor in own[kind].items():
                if tensor is not None:
                    yield _Place(f"{prefix}.{key}".lstrip("."), own[kind], (key,), tensor)
        for key, child in own["_modules"].items():
            yield _Place(f"{prefix}.{key}".lstrip("."), own["_modules"], (key,), child)
        for key, value in own.items():
            if key not in _MODULE:
                yield from _leaves(f"{prefix}.{key}".lstrip("."), own, (key,), value)


def _leaves(name: str, holder: Mapping[str, Any], keys: tuple[Any, ...], value: object) -> Iterator[_Place]:
    if isinstance(value, dict | list | tuple):
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield from _leaves(f"{name}.{key}", holder, (*keys, key), item)
    elif value is None or isinstance(value, Tensor | bool | int | float | str):
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
