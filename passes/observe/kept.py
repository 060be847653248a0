"""What a model keeps on itself between calls: tables that it makes once are fine, what it makes of an argument is not.

Some models compute at the first call what they need in all others. Where that is made of shapes alone, it holds in
every call. Where it is made of an argument's numbers (a prompt's embedding), the argument has no effect from then on,
and a graph would freeze what the example said. The two are told apart by running the model: with ``a0`` what its
modules held before the first run and ``a1`` what that left, an argument x is kept if

    f(x', a1)  !=  f(x', a0)        for another value x' of x alone
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from passes.graphs.held import MODULE
from passes.graphs.record import own, tensors_in
from passes.graphs.weightless import hollow
from passes.observe.batch_probe import disturbed, other_steps


@dataclass(frozen=True)
class Attributes:
    """The plain attributes of a model's modules at some time: neither parameters, buffers nor submodules."""

    held: Mapping[tuple[nn.Module, str], object]
    contents: Mapping[tuple[nn.Module, str], Any]
    names: Mapping[nn.Module, str]

    @staticmethod
    def of(model: nn.Module) -> Attributes:
        """Those that `model` has now."""
        names = {module: name for name, module in model.named_modules()}
        held = {(module, key): value for module in names for key, value in vars(module).items() if key not in MODULE}
        contents: dict[tuple[nn.Module, str], Any] = {
            place: value.copy() for place, value in held.items() if type(value) in (dict, OrderedDict, list)
        }
        return Attributes(held, contents, names)

    def restore(self) -> None:
        """Give the modules these attributes again."""
        for module in self.names:
            for key in [key for key in vars(module) if key not in MODULE and (module, key) not in self.held]:
                delattr(module, key)
        for (module, key), value in self.held.items():
            vars(module)[key] = value
        for place, content in self.contents.items():
            container: Any = self.held[place]
            container.clear()
            container.update(content) if isinstance(container, dict) else container.extend(content)

    def new_in(self, later: Attributes) -> Iterator[str]:
        """Names of the attributes that hold other tensors in `later`."""
        for (module, key), value in later.held.items():
            now = later.contents.get((module, key), value)
            before = self.contents.get((module, key), self.held.get((module, key)))
            known = set(map(id, tensors_in(before)))
            if any(id(tensor) not in known for tensor in tensors_in(now)):
                yield f"{later.names[module]}.{key}"


def find_kept(model: nn.Module, kwargs: Mapping[str, object], step: str, before: Attributes) -> str | None:
    """Why a model that was run with `kwargs` must not be: what it keeps of them. None where it keeps nothing of them.

    `before` are its attributes before the run. Where it keeps something, they are restored.
    """
    left = Attributes.of(model)
    places = tuple(before.new_in(left))
    if not places or hollow(*tensors_in(dict(kwargs))):
        return None
    try:
        for name, value in kwargs.items():
            other = other_steps(value) if name == step else pytree.tree_map_only(Tensor, disturbed, value)
            changed = {**kwargs, name: other}
            if not _same(_outputs(model, changed, left), _outputs(model, changed, before)):
                left = before
                where = " and ".join(place if place[0] != "." else f"its {place}" for place in places[:3])
                return (
                    f"{type(model).__name__} keeps what it makes of {name!r} in {where} at the first call, so that a "
                    f"later call's {name!r} would have no effect: clear it in the forward, or compute it outside and "
                    "pass it"
                )
    finally:
        left.restore()
    return None


def _outputs(model: nn.Module, kwargs: Mapping[str, object], attributes: Attributes) -> list[Tensor] | None:
    """What the model gives when its modules have these attributes; None where it cannot."""
    attributes.restore()
    try:
        return tensors_in(pytree.tree_leaves(model(**own(kwargs))))
    except (RuntimeError, ValueError, IndexError, TypeError):
        return None


def _same(outputs: list[Tensor] | None, others: list[Tensor] | None) -> bool:
    if outputs is None or others is None or len(outputs) != len(others):
        return True
    return all(
        value.shape != other.shape or torch.allclose(value, other, rtol=1e-3, atol=1e-5, equal_nan=True)
        for value, other in zip(outputs, others, strict=True)
    )
