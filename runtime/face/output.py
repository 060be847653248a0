"""What diffusers pipelines expect around a model: its configuration and its output."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

from torch import Tensor
from torch.utils import _pytree as pytree

Part = Any
"""A tensor, or a list of one tensor for each sample."""


class Config(dict[str, Any]):
    """A model's configuration, read by key or by attribute; cannot be changed."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the model's configuration has no {name!r}") from None

    def _fixed(self, *args: object, **kwargs: object) -> NoReturn:
        raise TypeError("the configuration of a compiled transformer cannot be changed")

    __setattr__ = __setitem__ = __delitem__ = __delattr__ = update = pop = clear = setdefault = _fixed


class Output:
    """Outputs of a forward by attribute (``.sample``), by name and by position."""

    def __init__(self, items: Iterable[tuple[str, Part]]) -> None:
        self._items = dict(items)

    def __getattr__(self, name: str) -> Part:
        try:
            return self.__dict__["_items"][name]
        except KeyError:
            raise AttributeError(f"the output has no {name!r}") from None

    def __getitem__(self, key: int | str) -> Part:
        return self._items[key] if isinstance(key, str) else self.to_tuple()[key]

    def __len__(self) -> int:
        return len(self._items)

    def to_tuple(self) -> tuple[Part, ...]:
        """The outputs in order."""
        return tuple(self._items.values())


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors of a model's output, in order: a tensor, a container, or a class with ``to_tuple`` or of a dict.

    pytree does not see into every class of outputs.
    """
    whole = output.to_tuple() if hasattr(output, "to_tuple") else output
    leaves = pytree.tree_leaves(tuple(whole.values()) if isinstance(whole, dict) else whole)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


pytree.register_pytree_node(
    Output,
    lambda output: (list(output.to_tuple()), list(output._items)),
    lambda parts, names: Output(zip(names, parts, strict=True)),
)
