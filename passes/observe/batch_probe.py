"""Doubling the batch of a model's inputs, so that two runs tell which dimensions carry it.

Rows 0..B of the doubled inputs are the given ones; rows B..2B are copies with another timestep and
with every float disturbed, so that a model that mixes rows cannot give the first B rows unchanged.

Which dimensions to double is guessed and proven by the run (passes.observe.discover). Guesses, likeliest first:

    dimension 0 wherever it is B, and lists of B entries
    the first dimension of size B of every tensor
    the same, but no list of B bare numbers
    any of these, but for one argument, which equals B by accident: it stays as it is, or takes its
        second dimension of size B, or is a list of one entry per sample
    the second guess, and dimension 0 wherever it is k B: several rows per sample, together or B apart

Where a dimension is stated (passes.observe.statement), none is guessed for that argument.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from passes.graphs.batch_layout import Samples
from runtime.face.arguments import as_plain

NOTHING: Mapping[str, int | None] = MappingProxyType({})


@dataclass(frozen=True)
class Pick:
    """What to double of an argument: `dim` tells the dimension of a tensor, given B (None for none)."""

    dim: Callable[[Tensor, int], int | None]
    numbers: bool = True  # whether a list of B bare numbers is one per sample
    runs: bool = False  # whether k B rows are the batch k times
    stated: bool = False


def batches_of(kwargs: Mapping[str, object], timestep: str) -> list[int]:
    """Sizes that may be the batch, likeliest first: dimension 0 of the timestep, then of every other float tensor."""
    floats = (value for value in kwargs.values() if isinstance(value, Tensor) and value.is_floating_point())
    sizes = [value.shape[0] for value in (kwargs[timestep], *floats) if isinstance(value, Tensor) and value.ndim > 0]
    return list(dict.fromkeys(sizes))


def doublings(
    kwargs: Mapping[str, object], timestep: str, batch: int, stated: Mapping[str, int | None] = NOTHING
) -> Iterator[dict[str, object]]:
    """Ways to double the batch, likeliest first; each other way of the same shapes is left out.

    Arguments whose batch dimension is `stated` (None: they have none) are doubled so in all of them.
    """
    seen: set[tuple[object, ...]] = set()
    given = [leaf for leaf in pytree.tree_leaves(dict(kwargs)) if isinstance(leaf, Tensor) and leaf.ndim]
    said = {name: Pick(partial(_stated, dim=dim), stated=True) for name, dim in stated.items() if dim is not None}
    for picks in _guesses([*(name for name in kwargs if name != timestep and name not in stated), timestep]):
        picks = {name: pick for name, pick in picks.items() if name not in stated} | said
        found = {name: double(value, batch, picks[name]) if name in picks else value for name, value in kwargs.items()}
        if timestep in picks:
            found[timestep] = _double_steps(kwargs[timestep], batch, picks[timestep])
        leaves, spec = pytree.tree_flatten(found)
        runs = any(pick.runs for pick in picks.values()) and any(_is_several(value, batch) for value in given)
        shapes = (str(spec), runs, *(tuple(leaf.shape) if isinstance(leaf, Tensor) else None for leaf in leaves))
        if shapes not in seen:
            seen.add(shapes)
            yield found


def double(value: object, batch: int, pick: Pick | None = None) -> object:
    """`value` with its batch doubled where `pick` says (else in dimension 0); so are lists of one entry per row."""
    pick = pick or Pick(_first)
    if isinstance(value, Tensor):
        dim = pick.dim(value, batch)
        if dim is None:
            return value
        parts = [value.unflatten(dim, (-1, batch)), disturbed(value).unflatten(dim, (-1, batch))] if pick.runs else ()
        return torch.cat(parts, dim + 1).flatten(dim, dim + 1) if parts else torch.cat([value, disturbed(value)], dim)
    if isinstance(value, Mapping):
        return {key: double(item, batch, pick) for key, item in value.items()}
    if type(value) is tuple:
        return tuple(double(item, batch, pick) for item in value)
    if not isinstance(value, list):
        return value
    inside = any(_carries(item, batch, pick) for item in value if isinstance(item, Tensor | tuple))
    bare = not pick.numbers and all(isinstance(item, int | float) for item in value)
    if len(value) == batch and not inside and not bare:
        return [*value, *(disturbed(item) if isinstance(item, Tensor) else item for item in value)]
    return [item if isinstance(item, list) else double(item, batch, pick) for item in value]


def disturbed(value: Tensor) -> Tensor:
    """A float tensor that differs from `value` wherever its last dimension is not all zero; others as they are."""
    return value + 0.25 * value.flip(-1) if value.is_floating_point() else value


def disturbed_all(kwargs: Mapping[str, object], timestep: str) -> dict[str, object]:
    """The same shapes with every float tensor disturbed, at another timestep."""
    changed = pytree.tree_map_only(Tensor, disturbed, dict(kwargs))
    return {**changed, timestep: other_steps(kwargs[timestep])}


def other_steps(steps: object) -> object:
    """Timesteps within the range of the given ones, none of them equal to its own."""
    if isinstance(steps, Tensor) and steps.is_floating_point():
        return torch.where(steps == 0, torch.full_like(steps, 0.5), steps / 2)
    if isinstance(steps, Tensor):
        return torch.where(steps == 0, torch.ones_like(steps), steps // 2)
    if isinstance(steps, float):
        return steps / 2 if steps else 0.5
    return int(steps) // 2 if steps else 1  # type: ignore[call-overload]


def told_by(given: object, doubled: object, batch: int) -> Iterator[Samples]:
    """Every place of the arguments `given` that holds `batch` samples, and twice as many in `doubled`."""
    if isinstance(given, Tensor) and isinstance(doubled, Tensor):
        for dim, (size, other) in enumerate(zip(given.shape, doubled.shape, strict=True)):
            if size == batch and other == 2 * batch:
                yield Samples((), dim)
    elif isinstance(given, Mapping | list | tuple):
        assert isinstance(doubled, Mapping | list | tuple)
        if isinstance(given, list) and len(given) == batch and len(doubled) == 2 * batch:
            yield Samples((), None)
            return
        for key in given if isinstance(given, Mapping) else range(len(given)):
            for place in told_by(given[key], doubled[key], batch):
                yield Samples((key, *place.path), place.dim)


def entries_alone(given: object, doubled: object, batch: int) -> bool:
    """Whether every tensor of `doubled` that is larger than in `given` has twice its `batch` entries."""
    pairs = zip(pytree.tree_leaves(given), pytree.tree_leaves(doubled), strict=False)
    tensors = ((a, b) for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor) and a.ndim == b.ndim)
    return all(size in (other, batch) for a, b in tensors for size, other in zip(a.shape, b.shape, strict=True))


def opaque(kwargs: Mapping[str, object]) -> Iterator[str]:
    """What no pass can double: arguments that hold an object which is neither a tensor nor plain data."""
    plain = (Tensor, complex, bytes, type(None))
    for name, value in kwargs.items():
        leaves = (leaf for leaf in pytree.tree_leaves(value) if not isinstance(leaf, plain))
        strange = [type(leaf).__name__ for leaf in leaves if as_plain(leaf) is None]
        if strange:
            yield f"{name} holds a {strange[0]}"


def _guesses(names: list[str]) -> Iterator[dict[str, Pick]]:
    """The guesses of the module's docstring: a pick for each argument that may be doubled."""
    usuals = (Pick(_first), Pick(_any), Pick(_any, numbers=False))
    for usual in usuals:
        yield dict.fromkeys(names, usual)
    for usual, name in itertools.product(usuals, names):
        others = {other: usual for other in names if other != name}
        yield others
        yield others | {name: Pick(_second)}
        yield others | {name: Pick(_no_dim)}
    yield dict.fromkeys(names, Pick(_several))
    yield dict.fromkeys(names, Pick(_several, runs=True))


def _first(value: Tensor, batch: int) -> int | None:
    return 0 if value.ndim and value.shape[0] == batch else None


def _any(value: Tensor, batch: int) -> int | None:
    return next(iter(_dims(value, batch)), None)


def _second(value: Tensor, batch: int) -> int | None:
    return dims[1] if len(dims := _dims(value, batch)) > 1 else None


def _no_dim(value: Tensor, batch: int) -> int | None:
    return None


def _stated(value: Tensor, batch: int, dim: int) -> int | None:
    return dim % value.ndim if -value.ndim <= dim < value.ndim and value.shape[dim] == batch else None


def _several(value: Tensor, batch: int) -> int | None:
    found = _any(value, batch)
    return 0 if found is None and value.ndim and value.shape[0] % batch == 0 else found


def _is_several(value: Tensor, batch: int) -> bool:
    return value.shape[0] > batch and value.shape[0] % batch == 0 and _any(value, batch) is None


def _dims(value: Tensor, batch: int) -> list[int]:
    return [dim for dim, size in enumerate(value.shape) if size == batch]


def _double_steps(steps: object, batch: int, pick: Pick) -> object:
    dim = pick.dim(steps, batch) if isinstance(steps, Tensor) else None
    if dim == 0 or (dim is not None and pick.stated):
        return torch.cat([steps, other_steps(steps)], dim)  # type: ignore[list-item]
    return steps


def _carries(value: object, batch: int, pick: Pick) -> bool:
    if isinstance(value, Tensor):
        return pick.dim(value, batch) is not None
    return isinstance(value, tuple) and any(_carries(item, batch, pick) for item in value)
