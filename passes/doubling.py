"""Doubling the batch of a model's inputs, so that two runs tell which dimensions carry it.

Rows 0..B of the doubled inputs are the given ones; rows B..2B are copies with another timestep and
with every float disturbed, so that a model that mixes rows cannot give the first B rows unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


def batch_of(kwargs: Mapping[str, object], timestep: str) -> int | None:
    """Dimension 0 of the timestep, else of the first float tensor; None where there is neither."""
    steps = kwargs[timestep]
    if isinstance(steps, Tensor) and steps.ndim > 0:
        return steps.shape[0]
    floats = (value for value in kwargs.values() if isinstance(value, Tensor) and value.is_floating_point())
    return next((value.shape[0] for value in floats if value.ndim > 0), None)


def doublings(kwargs: Mapping[str, object], timestep: str, batch: int) -> Iterator[dict[str, object]]:
    """Ways to double the batch, likeliest first: all arguments that may carry it, then all but one.

    The second kind is for a size that equals the batch by accident.
    """
    carrying = [name for name, value in kwargs.items() if name != timestep and _carries(value, batch)]
    for left_out in (None, *carrying):
        chosen = {name for name in carrying if name != left_out}
        yield {name: double(value, batch) if name in chosen else value for name, value in kwargs.items()} | {
            timestep: _double_steps(kwargs[timestep])
        }


def double(value: object, batch: int) -> object:
    """`value` with its batch doubled; lists of one entry per row (of tensors or anything) get twice the entries."""
    if isinstance(value, Tensor):
        return torch.cat([value, disturbed(value)]) if _carries(value, batch) else value
    if isinstance(value, Mapping):
        return {key: double(item, batch) for key, item in value.items()}
    if not isinstance(value, list):
        return value
    if any(_carries(item, batch) for item in value if isinstance(item, Tensor)):
        return [double(item, batch) for item in value]
    if len(value) == batch:
        return [*value, *(disturbed(item) if isinstance(item, Tensor) else item for item in value)]
    return value


def disturbed(value: Tensor) -> Tensor:
    """A float tensor that differs from `value` wherever its last dimension is not all zero; others as they are."""
    return value + 0.25 * value.flip(-1) if value.is_floating_point() else value


def other_steps(steps: object) -> object:
    """Timesteps within the range of the given ones, none of them equal to its own."""
    if isinstance(steps, Tensor) and steps.is_floating_point():
        return torch.where(steps == 0, torch.full_like(steps, 0.5), steps / 2)
    if isinstance(steps, Tensor):
        return torch.where(steps == 0, torch.ones_like(steps), steps // 2)
    if isinstance(steps, float):
        return steps / 2 if steps else 0.5
    return int(steps) // 2 if steps else 1  # type: ignore[call-overload]


def _double_steps(steps: object) -> object:
    if isinstance(steps, Tensor) and steps.ndim > 0:
        return torch.cat([steps, other_steps(steps)])  # type: ignore[list-item]
    return steps


def _carries(value: object, batch: int) -> bool:
    if isinstance(value, Tensor):
        return value.ndim > 0 and value.shape[0] == batch
    if isinstance(value, Mapping):
        return any(_carries(item, batch) for item in value.values())
    return isinstance(value, list) and (len(value) == batch or any(_carries(item, batch) for item in value))
