"""The shapes that an engine is built for.

Rows of a batch are regrouped by what they need, so that a plan is called with any number of rows up to those of the
batch. Every bucket of shapes that the plan was compiled for becomes one profile: its token counts are fixed, which
keeps them consistent with each other and lets kernels be chosen for them.
"""

from __future__ import annotations

from dataclasses import dataclass

from runtime.base.errors import EngineError
from runtime.bundle.spec import Plan

MAX_BATCH = 4
"""Rows that engines take unless told otherwise: two images with both branches of guidance."""


@dataclass(frozen=True)
class Range:
    """Shapes of one input: the smallest, the one to be fastest at, and the largest."""

    name: str
    least: tuple[int, ...]
    usual: tuple[int, ...]
    most: tuple[int, ...]


Profile = tuple[Range, ...]


def profiles_of(plan: Plan, max_batch: int = MAX_BATCH) -> tuple[Profile, ...]:
    """One profile per bucket of `plan`, for 1 to `max_batch` rows and fastest at one.

    EngineError for a plan whose bundle does not tell its buckets, or a `max_batch` below one.
    """
    if max_batch < 1:
        raise EngineError(f"engines for up to {max_batch} rows make no sense: --max-batch is at least 1")
    return tuple(
        tuple(
            Range(given.name, _sized(shape, 1), _sized(shape, 1), _sized(shape, max_batch))
            for given, shape in zip(plan.inputs, bucket, strict=True)
        )
        for bucket in _buckets(plan)
    )


def profile_for(profiles: tuple[Profile, ...], shapes: dict[str, tuple[int, ...]]) -> int:
    """Index of the profile that holds `shapes`; EngineError, naming the first input that does not fit, for none."""
    for index, profile in enumerate(profiles):
        if all(_holds(one, shapes[one.name]) for one in profile):
            return index
    known = {one.name: [p.most for profile in profiles for p in profile if p.name == one.name] for one in profiles[0]}
    wrong = next((name for name, most in known.items() if shapes[name] not in most), next(iter(known)))
    raise EngineError(
        f"{wrong} is {shapes[wrong]}, and engines were built for up to {known[wrong]}: build them with a larger "
        "--max-batch, or compile for these shapes"
    )


def _holds(one: Range, shape: tuple[int, ...]) -> bool:
    return all(low <= size <= high for low, size, high in zip(one.least, shape, one.most, strict=True))


def _buckets(plan: Plan) -> tuple[tuple[tuple[int | None, ...], ...], ...]:
    if plan.buckets:
        return plan.buckets
    for given in plan.inputs:
        if any(size is None and dim != given.batch_dim for dim, size in enumerate(given.shape)):
            raise EngineError(
                f"the bundle does not tell which sizes {given.name} of plan {plan.id} may have: compile the model again"
            )
    return (tuple(given.shape for given in plan.inputs),)


def _sized(shape: tuple[int | None, ...], rows: int) -> tuple[int, ...]:
    return tuple(rows if size is None else size for size in shape)
