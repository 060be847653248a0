"""What will become of the glue, told without making a program of it: standalone, or hosted and why."""

from __future__ import annotations

from passes.calling import Calling, Guard, guarded_copy
from passes.graph import Report
from passes.guards import GuardError, guard_glue, hosted_report
from passes.pipeline import Analysis


def preview_glue(analysis: Analysis) -> tuple[Report, ...]:
    """The reports that passes.assemble will give of the glue, one per shape bucket; none where there is no block."""
    if not analysis.groups:
        return ()
    discovery, guards = analysis.discovery, []
    for number, (site, owner) in enumerate(zip(discovery.blocks, analysis.group_of, strict=True)):
        group = analysis.groups[owner]
        guards.append(Guard(number, site.name, ((0, Calling.of(site, group.graph, group.states)),)))
    guarded = guarded_copy(discovery.model, guards, discovery.samples)
    reports = []
    for given, doubled in discovery.buckets:
        try:
            reports.append(guard_glue(guarded, given, doubled)[-1])
        except GuardError as error:
            reports.append(hosted_report(error))
    return tuple(reports)
