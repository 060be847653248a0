"""What of a block, or of a module that it is given, changes from call to call: what a trace must not bake in.

What the model's forward makes of shapes alone is the same in all calls of a form; what it makes of the numbers in an
argument shows when the model is run with other ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from passes.graphs.held import Held, Name, held_by, modules_in, same_held
from passes.graphs.record import tensors_in, version, watching
from passes.graphs.weightless import hollow
from passes.observe.batch_probe import disturbed, other_steps


class Sights:
    """What the `watched` modules held in some runs of their model, each as it was called, by name.

    `certain` tells whether the model could be run with other values of all its arguments (`see_otherwise`).
    """

    def __init__(self, watched: Mapping[str, nn.Module]) -> None:
        self.watched = watched
        self.certain = True
        self._seen: list[Mapping[str, Held]] = []
        self._given: dict[str, list[nn.Module]] = {}
        self._copies: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    @contextmanager
    def taken(self) -> Iterator[dict[str, Held]]:
        """Inside the ``with`` block, what each module held as it was called last; `keep` it if that run counts."""
        found: dict[str, Held] = {}
        names = {id(module): name for name, module in self.watched.items()}

        def before(module: nn.Module, args: object, kwargs: object) -> None:
            name = names[id(module)]
            self._given[name] = modules_in(pytree.tree_leaves((args, kwargs)))
            found[name] = self._of(name)

        with watching(self.watched, before, lambda name: lambda *_: None):
            yield found

    def keep(self, seen: Mapping[str, Held]) -> None:
        """Take `seen` for what the modules held in one of the runs."""
        self._seen.append(seen)

    def see_otherwise(self, run: Callable[[Mapping[str, object]], object], kwargs: Mapping[str, object]) -> None:
        """Run the model with other values of all arguments at once, or of each alone where it cannot."""
        if hollow(*tensors_in(dict(kwargs))):
            return
        others = {name: pytree.tree_map(_another, value) for name, value in kwargs.items()}
        if not self._tried(run, others):
            done = [self._tried(run, {**kwargs, name: value}) for name, value in others.items()]
            self.certain = all(done)

    def changing(self, name: str) -> frozenset[Name]:
        """The attributes that were not always the same; where that is not `certain`, also those written to.

        A dict may grow, since it may be a cache. Nor may they be others outside of the model's forward, where blocks
        are traced.
        """
        if name not in self._given:
            return frozenset()
        first, *others = [seen[name] for seen in self._seen if name in seen] + [self._of(name)]
        return frozenset(
            own
            for other in others
            for own in first.keys() | other.keys()
            if own not in first or own not in other or not self._goes_on(first[own], other[own])
        )

    def _goes_on(self, first: Mapping[str, object], later: Mapping[str, object]) -> bool:
        return all(
            key in later
            and same_held(leaf, later[key])
            and (self.certain or not isinstance(leaf, Tensor) or leaf is later[key])
            for key, leaf in first.items()
        )

    def _tried(self, run: Callable[[Mapping[str, object]], object], kwargs: Mapping[str, object]) -> bool:
        with self.taken() as seen:
            try:
                run(kwargs)
            except Exception:  # whatever the model does with arguments that it was not made for
                return False
            finally:
                self.keep(seen)
        return True

    def _of(self, name: str) -> Held:
        held = held_by(self.watched[name], self._given[name])
        return {
            own: {key: self._copy(leaf) if isinstance(leaf, Tensor) else leaf for key, leaf in leaves.items()}
            for own, leaves in held.items()
        }

    def _copy(self, tensor: Tensor) -> Tensor:
        """The numbers of a tensor, kept once for as long as it is not written to."""
        key = id(tensor), version(tensor)
        if tensor.is_inference() or key not in self._copies:
            self._copies[key] = tensor, tensor.detach().clone()
        return self._copies[key][1]


def _another(value: object) -> object:
    """A tensor of the same kind and shape that differs from `value`; plain values stay, as a form has its own."""
    if not isinstance(value, Tensor):
        return value
    if value.dtype is torch.bool:
        other = value.clone()
        other[..., -1:] ^= True
        return other
    if not value.is_floating_point():
        return value if value.is_complex() else other_steps(value)
    other = disturbed(value)
    return torch.where(other == value, value + 0.5, other)
