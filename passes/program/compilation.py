"""What is known of a model on its way to a program: each pass takes a `Compilation` and gives one that knows more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from torch import Tensor, fx, nn

from passes.glue.calling import Guard
from passes.graphs.glue_graph import GlueGraph
from passes.graphs.graph import BlockGraph, BlockSite, Discovery, MlpSite, PlanGraph, Refusal, Report, Run, States
from passes.observe.statement import Statements
from passes.program.memory import Known, Memory
from runtime.base.errors import EditError
from runtime.bundle.program import Program
from runtime.bundle.spec import Glue, Manifest, Plan

T = TypeVar("T")


class PassError(EditError):
    """A list of passes cannot run, or one of them left undone what another needs; the message names it."""


class Refused(EditError):
    """Raised by a pass for one group of blocks, which then stay in the glue as they are (see `Compilation.each`)."""

    def __init__(self, *refusals: Refusal) -> None:
        super().__init__("; ".join(f"{refusal.where}: {refusal.reason}" for refusal in refusals))
        self.refusals = refusals


@dataclass(frozen=True)
class Group:
    """Blocks that run the same code, in execution order, and what passes found for all of them.

    `known` is the plan that a growing program has for them already. `paired`, `exported` and `widened` are None until
    the passes "states", "export" and "widths" have run; `states`, `graph` and `plan_graph` raise PassError until then.
    """

    blocks: tuple[BlockSite, ...]
    paired: States | None = None
    exported: BlockGraph | None = None
    sites: tuple[MlpSite, ...] = ()
    known: Known | None = None
    widened: PlanGraph | None = None

    @property
    def first(self) -> BlockSite:
        """The block that the graph was made of."""
        return self.blocks[0]

    @property
    def states(self) -> States:
        """Which outputs continue which inputs."""
        return _made(self.paired, f"the states of {self.first.name}", "states")

    @property
    def graph(self) -> BlockGraph:
        """The graph of every block in the group."""
        return _made(self.exported, f"the graph of {self.first.name}", "export")

    @property
    def plan_graph(self) -> PlanGraph:
        """The graph at every width."""
        return _made(self.widened, f"the graph of {self.first.name} at every width", "widths")

    def with_graph(self, module: fx.GraphModule) -> Group:
        """The group with `module` in place of its graph's: the same placeholders, and as many outputs.

        What the old one's ``meta`` holds (see passes.blocks.export) is kept.
        """
        module.meta = {**self.graph.module.meta, **module.meta}
        return replace(self, exported=replace(self.graph, module=module))

    def refused(self, reason: str) -> Refused:
        """What a pass raises to leave every block of the group alone."""
        return Refused(*(Refusal(site.name, reason) for site in self.blocks))


Changed = tuple[Group | tuple[Group, ...], Report | None]
"""What a pass makes of a group: one or more instead, and what it did."""


@dataclass(frozen=True)
class Planned:
    """A group's plan: its graphs, what the manifest says of it, and example inputs (two rows or more, if it takes more
    than one)."""

    group: Group
    graph: PlanGraph
    plan: Plan
    examples: tuple[tuple[Tensor, ...], ...]


@dataclass(frozen=True)
class FormGlue:
    """The glue for one form of call: exported as `graph`, or the guarded model itself, `host`.

    `entry` is what the manifest says of it; weights and work are filled in as the program is assembled. It was made
    from the run `shown` of a `bucket`, whose other run is `other`.
    """

    entry: Glue
    bucket: int
    shown: Run
    other: Run
    graph: GlueGraph | None = None
    host: nn.Module | None = None


@dataclass(frozen=True)
class Compilation:
    """A model, how it is to be compiled, and what the passes that have run (`seconds`, by name) found.

    Given:
        inputs: keyword arguments of the model's forward, or a list of them, one for each set of shapes.
        timestep: name of the argument that holds the timestep, where its name does not tell.
        narrow: the states whose MLPs are narrowed (see passes.mlp.written_states); None for all.
        widths: shares of the MLPs' hidden channels, ascending to 1.
        time_dim: channels of the time embedding that routers get where a block takes none; None if no routers are made.
        memory: what is remembered of `program`; empty if this is its first trace.
        program: the program that is added to, and in the end what has become of it.
        stated: what the user says of the blocks and the batch (see passes.observe.statement).
        serving: whether plans of the program may serve blocks; if not, each gets a plan for any size.
    Found:
        found: the model as it was run, with all blocks that were seen; `blocks` are those accepted so far.
        groups: the accepted blocks by the code they run. layout: what routers need of them.
        planned, guards, glues: a plan for each group, a guard for each block, a glue for each new form of call.
        proven: digests of the graphs whose numbers were compared with the model's.
        reports: what the passes did, and what they left alone and why.
    """

    model: nn.Module
    inputs: Mapping[str, object] | Sequence[Mapping[str, object]]
    timestep: str | None = None
    narrow: Sequence[str] | None = None
    widths: tuple[float, ...] = (1.0,)
    time_dim: int | None = None
    memory: Memory = field(default_factory=Memory)
    program: Program | None = None
    stated: Statements = ()
    serving: bool = True
    found: Discovery | None = None
    blocks: tuple[BlockSite, ...] = ()
    groups: tuple[Group, ...] = ()
    layout: object = None
    planned: tuple[Planned, ...] = ()
    guards: tuple[Guard, ...] = ()
    glues: tuple[FormGlue, ...] = ()
    proven: frozenset[str] = frozenset()
    reports: tuple[Report, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def discovery(self) -> Discovery:
        """The model as it was run, with the accepted blocks alone; PassError before the pass "discover"."""
        return replace(_made(self.found, "where the blocks are", "discover"), blocks=self.blocks)

    @property
    def candidates(self) -> tuple[BlockSite, ...]:
        """All blocks that were found, also those that a pass refused since."""
        return _made(self.found, "where the blocks are", "discover").blocks

    @property
    def growing(self) -> bool:
        """Whether the program has been traced before, and gets another form of call."""
        return bool(self.memory.firsts)

    @property
    def manifest(self) -> Manifest:
        """That of the program as it is by now."""
        if self.program is None:
            raise PassError("there is no program to add to: give the compilation one (program=)")
        return self.program.manifest

    @property
    def group_of(self) -> tuple[int, ...]:
        """Index of each accepted block's group."""
        owner = {site.name: index for index, group in enumerate(self.groups) for site in group.blocks}
        return tuple(owner[site.name] for site in self.blocks)

    def reported(self, *reports: Report) -> Compilation:
        """With what a pass did, or left alone and why."""
        return replace(self, reports=(*self.reports, *reports))

    def refused(self, name: str, where: str, reason: str) -> Compilation:
        """With the report that the pass called `name` left `where` alone."""
        return self.reported(Report(name, refused=(Refusal(where, reason),)))

    def with_groups(self, groups: Iterable[Group]) -> Compilation:
        """With these groups; blocks in none of them are accepted no longer."""
        groups = tuple(groups)
        kept = {site.name for group in groups for site in group.blocks}
        return replace(self, groups=groups, blocks=tuple(site for site in self.blocks if site.name in kept))

    def each(self, name: str, change: Callable[[Group], Changed]) -> Compilation:
        """With every group as `change` gives it, which may split it; those with a known plan stay as they are.

        Here alone does a `Refused` become a report, of the pass called `name`, and its group go.
        """
        groups: list[Group] = []
        reports: list[Report] = []
        for group in self.groups:
            if group.known is not None:
                groups.append(group)
                continue
            try:
                changed = change(group)
            except Refused as error:
                reports.append(Report(name, refused=error.refusals))
                continue
            if not isinstance(changed, tuple) or len(changed) != 2:
                raise PassError(f"the pass {name!r} gave no (group, report) for {group.first.name}: return both")
            made, report = changed
            groups += made if isinstance(made, tuple) else (made,)
            reports += (report,) if report is not None else ()
        return self.with_groups(groups).reported(*reports)


def _made(value: T | None, what: str, by: str) -> T:
    if value is None:
        raise PassError(f"{what} is not known: the pass {by!r} has not run")
    return value
