"""Whether a model is still what was compiled, without a copy of its weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from runtime.face.arguments import exactly

_MODULE = frozenset(vars(nn.Module()))


@dataclass(frozen=True)
class Snapshot:
    """Where each tensor of a model is, of what dtype, and how often it was written to; and its plain values.

    Of plain attributes, those in lists, tuples and dicts are seen, too. What goes around torch's counting, as writing
    to ``parameter.data`` does, is not.
    """

    marks: Mapping[str, object]

    @staticmethod
    def of(model: nn.Module) -> Snapshot:
        """As they are now."""
        return Snapshot(_marks(model))

    def changed(self, model: nn.Module) -> str | None:
        """Name of the first that is not as it was; what came to it since does not count."""
        now = _marks(model)
        return next((name for name, mark in self.marks.items() if now.get(name) != mark), None)

    def without_changes(self, model: nn.Module, written: Collection[str]) -> Snapshot:
        """Without those that have changed, and attributes that were `written`: by the model itself, when we ran it."""
        now = _marks(model)
        return Snapshot(
            {
                name: mark
                for name, mark in self.marks.items()
                if now.get(name) == mark and not any(name == own or name.startswith(f"{own}.") for own in written)
            }
        )


def _marks(model: nn.Module) -> dict[str, object]:
    weights = (*model.named_parameters(), *model.named_buffers())
    marks: dict[str, object] = {name: _mark(tensor) for name, tensor in weights}
    for prefix, module in model.named_modules():
        own = {key: value for key, value in vars(module).items() if key not in _MODULE}
        marks.update(_attributes(prefix, own))
    return marks


def _attributes(where: str, value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _attributes(f"{where}.{key}".lstrip("."), item)
    elif isinstance(value, Tensor):
        yield where, (_mark(value), _Same(value))
    elif value is None or isinstance(value, bool | int | float | str):
        yield where, exactly(value)


class _Same:
    """A tensor, equal to itself alone; held, since another one might get its memory."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._tensor is other._tensor

    __hash__ = None  # type: ignore[assignment]


def _mark(tensor: Tensor) -> object:
    version = 0 if tensor.is_inference() else tensor._version
    try:
        place = tensor.data_ptr()
    except RuntimeError:  # without memory, as on the meta device
        place = 0
    return version, place, tensor.dtype, tensor.device, tuple(tensor.shape)
