"""A tracer that keeps what it saw of the model, for tests that follow decisions by it."""

from __future__ import annotations

from typing import Any

from torch import nn

from edit_compile.compiling.compiler import Tracer
from passes.calling import Calling, Guard, guarded_copy
from passes.pipeline import Analysis


class Watched(Tracer):
    """`analysis` is that of the last trace."""

    analysis: Analysis | None = None

    def _analyse(self, *args: Any, **kwargs: Any) -> Analysis:
        self.analysis = super()._analyse(*args, **kwargs)
        return self.analysis


def guarded(analysis: Analysis) -> nn.Module:
    """The analysed model with a guard for every block."""
    groups = [analysis.groups[index] for index in analysis.group_of]
    guards = [
        Guard(number, site.name, ((0, Calling.of(site, group.graph, group.states)),))
        for number, (site, group) in enumerate(zip(analysis.discovery.blocks, groups, strict=True))
    ]
    return guarded_copy(analysis.discovery.model, guards, analysis.discovery.samples)
