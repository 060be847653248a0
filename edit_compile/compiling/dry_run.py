"""The report of a dry run: what would be compiled, what it would save, and what was refused and why."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from edit_compile.elastic.layout import Layout
from edit_compile.elastic.transformer import ElasticTransformer
from passes.graphs.cost import count_flops, variant_cost
from passes.graphs.graph import Refusal, Report
from passes.mlp.weights import site_rows
from passes.pipeline import Pass
from passes.program.compilation import Compilation, Planned
from passes.program.coverage import Coverage
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
    what was not compared by numbers, since the model has no weights. `coverage` tells the lists and their work, and
    `passes` the passes of the list, in order.
    """

    model: str
    blocks: int
    plans: tuple[PlanRow, ...]
    router_parameters: int
    router_flops: int
    reports: tuple[Report, ...]
    unchecked: tuple[str, ...] = ()
    coverage: Coverage | None = None
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
            coverage=Coverage.of(made),
            passes=tuple(one.name for one in passes),
        )

    def __str__(self) -> str:
        console = Console(width=120, force_terminal=False)
        with console.capture() as captured:
            share = self.coverage.share if self.coverage else 0.0
            console.print(f"{self.model}: {self.blocks} blocks are guarded, {share:.0%} of the FLOPs", highlight=False)
            if self.coverage is not None and (self.coverage.guarded or self.coverage.left):
                console.print(self._coverage_table(self.coverage))
            if self.plans:
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
        yield from self._gains()
        unnarrowed = sorted({row.kind for row in self.plans if not row.sites})
        for kind in unnarrowed:
            yield f"{kind}: no MLP can be narrowed, so it is skipped, reused or computed in full"
        quiet = [refusal for name, refusal in self.refused if name == "mlp"] if self.plans and not unnarrowed else []
        if quiet:
            yield f"{len(quiet)} weights belong to no MLP that can be narrowed, each with its reason in .refused"
        for name, where, reason in _together(pair for pair in self.refused if pair[1] not in quiet):
            yield f"left alone by {name}: {where}: {reason}"
        for what in self.unchecked:
            yield f"not checked, for want of weights: {what}"

    def _gains(self) -> Iterator[str]:
        """What is left of the FLOPs where all blocks are skipped, and at the smallest width."""
        if self.coverage is None or not self.plans or not self.coverage.share:
            return
        full = {row.plan: row for row in self.plans}  # the last width of a plan is 1
        small = {row.plan: row for row in reversed(self.plans)}
        whole = sum(row.blocks * row.flops for row in full.values())
        narrowed = sum(row.blocks * row.flops for row in small.values()) / max(whole, 1)
        rest = 1 - self.coverage.share
        yield f"FLOPs left where every block is skipped or reused: {max(rest, 0):.0%}"
        width = min(row.width for row in self.plans)
        yield f"FLOPs left at width {width:g} everywhere: {max(rest + self.coverage.share * narrowed, 0):.0%}"

    def _coverage_table(self, coverage: Coverage) -> Table:
        table = Table("list", "blocks", "share of the FLOPs", "")
        for part in (*coverage.guarded, *coverage.left):
            what = "guarded" if part.reason is None else "always computed"
            table.add_row(part.name, str(part.count), f"{part.share:.1%}", what)
        return table

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


def _together(refused: Iterable[tuple[str, Refusal]]) -> Iterator[tuple[str, str, str]]:
    """(pass, where, reason) of refusals; more than three with one reason in one line."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, refusal in refused:
        reason = next(iter(_bare(refusal).splitlines()), "")
        found.setdefault((name, reason), []).append(refusal.where)
    for (name, reason), places in found.items():
        told = places if len(places) <= 3 else places[:1]
        more = "" if len(places) <= 3 else f" (and {len(places) - 1} more, the last is {places[-1]})"
        yield from ((name, place, reason + more) for place in told)


def _bare(refusal: Refusal) -> str:
    """The reason without the name of the block in front, its own or that of one like it."""
    reason = refusal.reason.strip()
    first, _, rest = reason.partition(": ")
    alike = "." in first and first.rpartition(".")[0] == refusal.where.rpartition(".")[0]
    return rest if rest and (alike or first == refusal.where) else reason


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
