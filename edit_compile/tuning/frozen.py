"""Routers' decisions as a schedule: what they decided most often for a step, a block and a branch of guidance.

Trained routers may come to decide by the step and the branch alone, whatever the image. Then a schedule decides as they
do and none of them has to run, which is a tenth of the time where blocks are small; and all rows of a batch take the
same width.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from runtime.base.errors import PolicyError
from runtime.face.transformer import CompiledTransformer
from runtime.requests.trace import COMPUTED, MISSING, REUSED, RequestTrace
from runtime.routing.branched import BranchedPolicy
from runtime.routing.policy import REUSE, SKIP
from runtime.routing.schedule import ScheduledPolicy

AGREE = 0.95
"""Share of equal decisions below which an image's own ones matter, so that it is warned."""


@dataclass(frozen=True)
class Frozen:
    """A schedule for each branch of guidance, and how well it says what the routers decided.

    Args:
        policy: decides for the branches that were seen without routers, for others as before.
        agreement: share of the decisions that are the schedule's, 0 to 1, by branch.
        steps: sampling steps that it is for.
        generations: how many it was made of.
    """

    policy: BranchedPolicy
    agreement: Mapping[str, float]
    steps: int
    generations: int


def freeze(compiled: CompiledTransformer, last: int | None = None) -> Frozen:
    """The most frequent decisions of the generations that `compiled` has made, the `last` ones or all of its trace.

    Make images of different prompts first, as they will be made later, as many as a trace keeps: the last 16 requests.
    `compiled` stays as it is:

        frozen = edit_compile.freeze(compiled)
        compiled.add_tier("frozen", frozen.policy, steps=frozen.steps)

    Warns where less than 95% of a branch's decisions are the schedule's: then compare images before it is used. Raises
    PolicyError where there are no generations, they have different numbers of steps, or residuals were extrapolated,
    and for a `last` that is no whole number above 0.
    """
    if last is not None and (not isinstance(last, int) or last < 1):
        raise PolicyError(f"last is a whole number of at least 1, or None for all generations, not {last!r}")
    traces = [one for one in compiled.trace if len(one)]
    traces = traces if last is None else traces[-last:]
    if not traces:
        raise PolicyError("compiled.trace holds no generation: make some images with its routers, then freeze")
    if any(one.extrapolated for one in traces):
        raise PolicyError(
            "residuals were extrapolated in these generations (order=1), which a trace does not tell from reused ones: "
            "keep that policy as a tier, or freeze generations that routers decided"
        )
    steps = {1 + int(one.arrays()["step"].max()) for one in traces}
    if len(steps) > 1:
        raise PolicyError(
            f"the generations have {' and '.join(map(str, sorted(steps)))} steps, and a schedule is for one number of "
            "them: freeze(compiled, last=...) takes the last ones alone"
        )
    manifest, count = compiled.program.manifest, steps.pop()
    branches, agreement = dict[str, ScheduledPolicy](), dict[str, float]()
    for name in dict.fromkeys(chain.from_iterable(one.contexts for one in traces)):
        seen = [one for one in traces if name in one.contexts]
        decisions = np.concatenate([_decisions(one, name, (count, len(manifest.blocks))) for one in seen], 2)
        if not np.isnan(decisions).all():
            table, agreement[name] = most_frequent(decisions)
            branches[name] = ScheduledPolicy(_of_widths(table, manifest.widths), routed=False, beyond="compute")
    if min(agreement.values()) < AGREE:
        told = ", ".join(f"{name} {share:.0%}" for name, share in agreement.items())
        warnings.warn(
            f"the routers decide by the image, too, and the schedule says so many of their decisions: {told}; compare "
            "images of both",
            stacklevel=2,
        )
    policy = compiled.policy
    otherwise = policy.otherwise if isinstance(policy, BranchedPolicy) else policy
    return Frozen(BranchedPolicy(branches, otherwise), agreement, count, len(traces))


def _decisions(trace: RequestTrace, branch: str, shape: tuple[int, int]) -> np.ndarray:
    """(steps, blocks, rows) of SKIP, REUSE and widths; NaN where a block was not called."""
    grid = trace.grid(branch)
    found = np.where(grid["done"] == COMPUTED, grid["width"], np.where(grid["done"] == REUSED, REUSE, SKIP))
    whole = np.full((*shape, found.shape[2]), np.nan)
    whole[: found.shape[0], : found.shape[1]] = np.where(grid["done"] == MISSING, np.nan, found)
    return whole


def most_frequent(decisions: np.ndarray) -> tuple[np.ndarray, float]:
    """(steps, blocks) of decisions (steps, blocks, rows), and the share of those that are it.

    Full width where a block was never called.
    """
    kinds = np.unique(decisions[~np.isnan(decisions)])
    counts = np.stack([(decisions == kind).sum(2) for kind in kinds])
    table = np.where(counts.max(0) > 0, kinds[counts.argmax(0)], 1.0)
    return table, float(counts.max(0).sum() / counts.sum())


def _of_widths(table: np.ndarray, widths: Sequence[float]) -> np.ndarray:
    """`table` with the `widths` themselves in the place of what a trace keeps of them, which is less exact."""
    nearest = np.asarray(widths)[np.abs(table[..., None] - widths).argmin(-1)]
    return np.where(table > SKIP, nearest, table)
