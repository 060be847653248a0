"""What will become of the glue, told without making a program of it: standalone, or hosted and why."""

from __future__ import annotations

from passes.graph import Refusal, Report
from passes.guards import GuardError, guard_glue, guarded_copy
from passes.pipeline import Analysis


def preview_glue(analysis: Analysis) -> tuple[Report, ...]:
    """The reports that passes.assemble will give of the glue, one per shape bucket; none where there is no block."""
    if not analysis.groups:
        return ()
    owners = [analysis.groups[owner] for owner in analysis.group_of]
    guarded = guarded_copy(analysis.discovery, [group.states for group in owners], [group.graph for group in owners])
    reports, runs = [], analysis.discovery.runs
    for given, doubled in zip(runs[: len(runs) // 2], runs[len(runs) // 2 :], strict=True):
        try:
            reports.append(guard_glue(guarded, given, doubled)[-1])
        except GuardError as error:
            reports.append(Report("guards", refused=(Refusal("glue", f"hosted by the model, since {error}"),)))
    return tuple(reports)
