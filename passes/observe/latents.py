"""Which inputs of a model a sampler advances by which of its outputs, told by shapes.

A sampler computes x' = a x + b f(x), so that x and f(x) have one shape; or f(x) has other channels (a learned variance;
conditions that were joined to x), or the leading part of its tokens (a reference image behind them).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from runtime.face.arguments import flatten


def find_latents(
    inputs: Mapping[str, Tensor], outputs: Sequence[Tensor], batched: Collection[str] | None, timestep: str
) -> tuple[tuple[str, int], ...]:
    """Pairs (name of an input, position of an output), equal shapes first; each is used once.

    Inputs are floats among those that carry the batch (None: a single sample has none), the timestep aside.
    """
    left = {
        name: value.shape
        for name, value in inputs.items()
        if value.is_floating_point() and name != timestep and (batched is None or name in batched)
    }
    pairs: dict[int, str] = {}
    for allowed in (0, 1):
        for position, output in enumerate(outputs):
            name = next((name for name, shape in left.items() if _apart(shape, output.shape) == allowed), None)
            if name is not None and position not in pairs:
                pairs[position] = name
                del left[name]
    return tuple((name, position) for position, name in sorted(pairs.items()))


def carrying_batch(given: Mapping[str, object], doubled: Mapping[str, object]) -> set[str]:
    """Names of the tensors in the arguments `given` that have another size in `doubled`, or more beside them there."""
    one, two = flatten(given)[0], flatten(doubled)[0]
    listed, others = (Counter(map(_argument, names)) for names in (one, two))
    grown = {name for name in listed if listed[name] != others[name]}
    return {
        name
        for name, value in one.items()
        if name not in two or value.shape != two[name].shape or _argument(name) in grown
    }


def _argument(name: str) -> str:
    return name.partition(".")[0]


def _apart(shape: Sequence[int], other: Sequence[int]) -> int | None:
    """In how many dimensions behind the first two shapes differ; None where that is no matter of degree."""
    if len(shape) != len(other) or len(shape) < 2 or shape[0] != other[0]:
        return None
    return sum(one != two for one, two in zip(shape[1:], other[1:], strict=True))
