"""Whether a bundle's tiers compute what its model computes, in the steps that they compute in full.

A schedule is run over a whole generation, so that its other steps reuse and skip as in production; their numbers are
the schedule's own, of which the model knows nothing, and are only looked at for NaN.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from edit_compile.bundles.verify import Check, compared
from edit_compile.elastic.transformer import ElasticTransformer
from edit_compile.measuring.benchmarking import trajectory_of
from passes.graphs.numbers import largest
from runtime.face.output import tensors_of
from runtime.face.transformer import CompiledTransformer
from runtime.routing.branched import BranchedPolicy
from runtime.routing.policy import Decider
from runtime.routing.schedule import ScheduledPolicy


def verify_tiers(
    compiled: CompiledTransformer, eager: nn.Module, inputs: Mapping[str, Any], tolerance: float = 1e-3
) -> Iterator[Check]:
    """A check for each tier, of one by branch for each branch, that is a schedule with steps that are computed in full.

    Args:
        compiled: a loaded bundle; its policy stays as it is.
        eager: the model it was made from.
        inputs: keyword arguments of one forward; the timestep falls linearly over the tier's steps.
        tolerance: largest difference allowed, relative to the largest number of the output.
    """
    dense = eager.model if isinstance(eager, ElasticTransformer) else eager
    for name, tier in compiled.tiers.items():
        for branch, policy in _branches(tier.policy).items():
            if isinstance(policy, ScheduledPolicy) and policy.table.ndim == 2:
                full = (policy.table == 1.0).all(1).tolist()
                if any(full):
                    yield _tier(name, branch, compiled, dense, inputs, full, tolerance)


def _branches(policy: Decider) -> dict[str, Decider] | dict[None, Decider]:
    """What decides in each branch of guidance; one without a name where it is the same in all."""
    if isinstance(policy, BranchedPolicy):
        return {"others": policy.otherwise} | dict(policy.branches)
    return {None: policy}


@torch.no_grad()
def _tier(
    name: str,
    branch: str | None,
    compiled: CompiledTransformer,
    dense: nn.Module,
    inputs: Mapping[str, Any],
    full: Sequence[bool],
    tolerance: float,
) -> Check:
    where = name if branch is None else f"{name} in branch {branch}"
    called, checks = f"tier {where}, its {sum(full)} full of {len(full)} steps", list[Check]()
    context = nullcontext() if branch is None else compiled.cache_context(branch)
    steps = trajectory_of(inputs, len(full), compiled.program.manifest.timestep)
    with compiled.request(tier=name), context:  # by name: the latents given need not be what its outputs make
        for step, kwargs in enumerate(steps):
            mine = tensors_of(compiled(**kwargs))
            if full[step]:
                checks.append(compared(called, mine, tensors_of(dense(**kwargs)), tolerance))
            elif not all(tensor.isfinite().all() for tensor in mine):
                return Check(called, float("nan"), 1.0, tolerance, f"step {step} gives NaN or infinity")
    return Check(called, largest(one.difference for one in checks), largest(one.scale for one in checks), tolerance)
