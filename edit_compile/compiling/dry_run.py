"""The report of a dry run: what would be compiled, what it would save, and what was refused and why."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from edit_compile.elastic.layout import Layout
from edit_compile.elastic.transformer import ElasticTransformer
from passes.compilation import Compilation, Planned
from passes.cost import count_flops, variant_cost
from passes.graph import Refusal, Report
from passes.pipeline import Pass
from passes.widths import site_rows
from runtime.routing.router import Router


@dataclass(frozen=True)
class PlanRow:
    """One plan at one width: work and bytes moved of one row of the batch (first shape bucket)."""

    plan: str
    kind: str
    blocks: int
    states: tuple[str, ...]
    sites: int
    width: float
    hidden: tuple[int, ...]
    flops: int
    bytes: int


@dataclass(frozen=True)
class DryRun:
    """What `compile(..., dry_run=True)` gives; ``print(report)`` shows it as tables.

    `router_parameters` counts one router's parameters, on average over the blocks (0 without routers). `unchecked` says
    what was not compared by numbers, since the model has no weights. `passes` are those of the list, in order.
    """

    model: str
    blocks: int
    plans: tuple[PlanRow, ...]
    router_parameters: int
    router_flops: int
    reports: tuple[Report, ...]
    unchecked: tuple[str, ...] = ()
    passes: tuple[str, ...] = ()

    @property
    def refused(self) -> tuple[tuple[str, Refusal], ...]:
        """(pass, refusal) of everything left alone."""
        return tuple((report.name, refusal) for report in self.reports for refusal in report.refused)

    @property
    def standalone(self) -> bool:
        """Whether a bundle will run without the model's own code, at all shapes given."""
        return self.blocks > 0 and not any(name == "guards" for name, _ in self.refused)

    @staticmethod
    def of(made: Compilation, passes: Sequence[Pass], elastic: ElasticTransformer | None) -> DryRun:
        """Collect the report of a compilation that `passes` took as far as its glue."""
        rows = [_row(item, index) for item in made.planned for index in range(len(item.plan.variants))]
        routers = _routers(made, elastic)
        parameters = sum(p.numel() for router in routers for p in router.parameters())
        return DryRun(
            model=type(made.model).__name__,
            blocks=len(made.blocks),
            plans=tuple(rows),
            router_parameters=parameters // max(len(routers), 1),
            router_flops=_router_flops(made, routers),
            reports=made.reports,
            passes=tuple(one.name for one in passes),
        )

    def __str__(self) -> str:
        console = Console(width=120, force_terminal=False)
        with console.capture() as captured:
            console.print(f"{self.model}: {self.blocks} blocks; passes {' -> '.join(self.passes)}")
            console.print(self._plan_table())
            if self.router_parameters:
                console.print(f"a router: {self.router_parameters:,} parameters, {self.router_flops / 1e6:.3f} MFLOP")
            for line in self._lines():
                console.print(line, markup=False, highlight=False, soft_wrap=True)
        return captured.get()

    def _lines(self) -> Iterator[str]:
        """What the tables leave out, a sentence each."""
        if not self.blocks:
            yield "no block can be guarded"
        else:
            yield "glue: standalone" if self.standalone else "glue: hosted, needs the model beside the bundle"
        for kind in sorted({row.kind for row in self.plans if not row.sites}):
            yield f"{kind}: no MLP can be narrowed, so it is skipped, reused or computed in full"
        for name, refusal in self.refused:
            reason = refusal.reason.strip().removeprefix(f"{refusal.where}: ").splitlines()[0]
            yield f"left alone by {name}: {refusal.where}: {reason}"
        for what in self.unchecked:
            yield f"not checked, for want of weights: {what}"

    def _plan_table(self) -> Table:
        table = Table("plan", "block", "blocks", "states", "MLP sites", "width", "hidden", "MFLOP/row", "MB/row")
        for row in self.plans:
            table.add_row(
                row.plan,
                row.kind,
                str(row.blocks),
                ", ".join(row.states),
                str(row.sites),
                f"{row.width:g}",
                ", ".join(map(str, row.hidden)),
                f"{row.flops / 1e6:.2f}",
                f"{row.bytes / 1e6:.2f}",
            )
        return table


def _row(item: Planned, index: int) -> PlanRow:
    plan, variant = item.plan, item.plan.variants[index]
    flops, shared, own = variant_cost(item.graph, index, plan, item.examples[0])
    return PlanRow(
        plan=plan.id,
        kind=plan.kind,
        blocks=len(item.group.blocks),
        states=tuple(plan.inputs[k].name for k in plan.states),
        sites=len(item.group.sites),
        width=variant.width,
        hidden=tuple(site_rows(site.hidden, variant.width) for site in item.group.sites),
        flops=flops,
        bytes=shared + own,
    )


def _routers(made: Compilation, elastic: ElasticTransformer | None) -> list[Router]:
    """The elastic model's routers, or such as it would have, without memory; none of another model."""
    if elastic is None or not made.groups:
        return []
    if elastic.layout is not None:
        return [router for router in elastic.routers if isinstance(router, Router)]
    layout = made.layout
    assert isinstance(layout, Layout)
    with torch.device("meta"):
        return [Router(elastic.router_config, block.dim, block.time_dim) for block in layout.blocks]


def _router_flops(made: Compilation, routers: Sequence[Router]) -> int:
    """Work of the first block's router on one row."""
    if not routers:
        return 0
    router, item = routers[0], made.planned[made.group_of[0]]
    states = [item.examples[0][k].to("meta") for k in item.plan.states]
    time = states[0].new_empty(len(states[0]), router.time_dim)
    bare = copy.deepcopy(router).to("meta", states[0].dtype)
    return count_flops(lambda *given: bare(given[:-1], given[-1]), [*states, time]) // len(states[0])
