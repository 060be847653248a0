"""A tracer that keeps what it saw of the model, for tests that follow decisions by it."""

from __future__ import annotations

from torch import nn

from edit_compile.compiling.compiler import Tracer
from passes.glue.calling import Calling, Guard, guarded_copy
from passes.program.compilation import Compilation


class Watched(Tracer):
    """`analysis` is that of the last trace."""

    analysis: Compilation | None = None

    def _run(self, compilation: Compilation, until: str | None = None) -> Compilation:
        made = super()._run(compilation, until)
        self.analysis = made if made.serving else self.analysis
        return made


def guarded(analysis: Compilation) -> nn.Module:
    """The analysed model with a guard for every block."""
    groups = [analysis.groups[index] for index in analysis.group_of]
    guards = [
        Guard(number, site.name, ((0, Calling.of(site, group.graph, group.states)),))
        for number, (site, group) in enumerate(zip(analysis.discovery.blocks, groups, strict=True))
    ]
    return guarded_copy(analysis.discovery.model, guards, analysis.discovery.samples)
