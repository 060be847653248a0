"""What will become of the glue, told without making a program of it: standalone, or hosted and why."""

from __future__ import annotations

from passes.graph import Report
from passes.guards import GuardError, guard_glue, guarded_copy, hosted_report
from passes.pipeline import Analysis


def preview_glue(analysis: Analysis) -> tuple[Report, ...]:
    """The reports that passes.assemble will give of the glue, one per shape bucket; none where there is no block."""
    if not analysis.groups:
        return ()
    owners = [analysis.groups[owner] for owner in analysis.group_of]
    guarded = guarded_copy(analysis.discovery, [group.states for group in owners], [group.graph for group in owners])
    reports = []
    for given, doubled in analysis.discovery.buckets:
        try:
            reports.append(guard_glue(guarded, given, doubled)[-1])
        except GuardError as error:
            reports.append(hosted_report(error))
    return tuple(reports)
