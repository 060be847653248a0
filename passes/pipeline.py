"""The passes in order: from a model and example inputs to one graph per kind of block.

    discover -> states -> dedupe -> export -> real -> heads -> mlp -> streams          (`analyse`)
    widths -> guards -> lower                                                          (passes.assemble)

A block that a pass refuses stays in the glue as it is; its refusal says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import nn

from passes.dedupe import group_blocks
from passes.discover import discover
from passes.export import ExportError, export_block
from passes.graph import BlockGraph, BlockSite, Discovery, MlpSite, Refusal, Report, States
from passes.heads import one_head
from passes.memory import Known, Memory, computes
from passes.mlp import find_sites
from passes.progress import tell
from passes.real import complex_to_real
from passes.settled import settled_leaves
from passes.states import find_states
from passes.streams import check_names, choose_sites
from passes.weightless import weightless


@dataclass(frozen=True)
class Group:
    """Blocks that run the same code: `members` index the discovery's blocks. `known` is the plan there is already."""

    graph: BlockGraph
    states: States
    sites: tuple[MlpSite, ...]
    members: tuple[int, ...]
    known: Known | None = None


@dataclass(frozen=True)
class Analysis:
    """What the passes found in a model; `discovery` holds the accepted blocks only."""

    discovery: Discovery
    groups: tuple[Group, ...]
    reports: tuple[Report, ...]

    @property
    def group_of(self) -> tuple[int, ...]:
        """Index of each block's group."""
        owner = {member: index for index, group in enumerate(self.groups) for member in group.members}
        return tuple(owner[block] for block in range(len(self.discovery.blocks)))


def analyse(
    model: nn.Module,
    inputs: Mapping[str, object] | Sequence[Mapping[str, object]],
    timestep: str | None = None,
    narrow: Sequence[str] | None = None,
    memory: Memory | None = None,
) -> Analysis:
    """Find the blocks of `model`, their states, graphs and MLP sites.

    `inputs` are keyword arguments of the model's forward, one mapping per shape bucket; `timestep`
    names the argument that holds the timestep where its name does not tell. `narrow` names the states
    whose MLPs are sites (see passes.streams); without it all are. With `memory`, only blocks that it knows
    are looked for, and what it has for them is used.

    Raises StreamError where `narrow` names a state that no block has.
    """
    discovery, found = discover(model, inputs, timestep, None if memory is None else memory.firsts)
    reports = [found]
    if memory is not None:
        discovery, left = memory.continued(discovery)
        reports.append(left)
    return _grouped(discovery, reports, narrow, memory)


def loosened(analysis: Analysis, narrow: Sequence[str] | None, memory: Memory) -> Analysis:
    """The blocks whose sizes values set, in plans for any such size; those that can have none are left out."""
    blocks = tuple(site for site in analysis.discovery.blocks if memory.lacks(site))
    return _grouped(replace(analysis.discovery, blocks=blocks), [], narrow, memory, serving=False)


def _grouped(
    discovery: Discovery,
    reports: list[Report],
    narrow: Sequence[str] | None,
    memory: Memory | None,
    serving: bool = True,
) -> Analysis:
    grouped: list[tuple[Group, list[BlockSite]]] = []
    kinds = group_blocks(discovery.blocks)
    for number, sites in enumerate(kinds):
        tell("exporting blocks", number, len(kinds))
        for known, members in memory.serving(sites) if memory is not None and serving else ():
            grouped.append((Group(known.graph.block, known.states, known.sites, (), known), members))
        served = {site.name for _, members in grouped for site in members}
        rest = [site for site in sites if site.name not in served]
        grouped += _export_group(rest, discovery, reports, narrow, memory) if rest else ()
    if memory is None:
        check_names((group.graph for group, _ in grouped), narrow)
    kept = {site.name for _, members in grouped for site in members}
    blocks = tuple(site for site in discovery.blocks if site.name in kept)
    position = {site.name: index for index, site in enumerate(blocks)}
    groups = tuple(
        replace(group, members=tuple(sorted(position[site.name] for site in members))) for group, members in grouped
    )
    reports.append(Report("dedupe", (f"{len(blocks)} blocks are {len(groups)} plans",)))
    return Analysis(replace(discovery, blocks=blocks), groups, tuple(reports))


def _export_group(
    sites: Sequence[BlockSite],
    discovery: Discovery,
    reports: list[Report],
    narrow: Sequence[str] | None,
    memory: Memory | None = None,
) -> list[tuple[Group, list[BlockSite]]]:
    """Graphs that together cover `sites`: one, unless a member does not compute what the first does."""
    first, *others = sites
    states, told = find_states(first, discovery.blocks)
    reports.append(told)
    if not states.pairs:
        reason = told.refused[0].reason
        reports.append(Report("states", refused=tuple(Refusal(site.name, reason) for site in others)))
        return []
    try:
        free = None if memory is None else memory.free(first)
        graph, exported = export_block(first, states, discovery.runs, free, partial(_settled, discovery, first))
    except ExportError as error:
        reports.append(Report("export", refused=tuple(Refusal(site.name, str(error)) for site in sites)))
        return []
    members, strangers = [first], list[BlockSite]()
    for site in others:
        (members if _computes(graph, site) else strangers).append(site)
    apart = _export_group(strangers, discovery, reports, narrow, memory) if strangers else []
    module, real = complex_to_real(graph.module)
    reports += [exported, real]
    if real.refused:
        return apart
    module, heads = one_head(module)
    reports.append(heads)
    graph = replace(graph, module=module)
    objection = None if memory is None else memory.objection(first, graph)
    if objection is not None:
        reports.append(Report("growth", refused=tuple(Refusal(site.name, objection) for site in members)))
        return apart
    mlps, narrowed = find_sites(graph)
    chosen, streams = choose_sites(graph, mlps, narrow)
    reports += [_within(first, narrowed), _within(first, streams)]
    return [(Group(graph, states, chosen, ()), members), *apart]


def _settled(discovery: Discovery, site: BlockSite) -> list[int]:
    """The leaves of `site` whose numbers none of the model's arguments sets, as its own call holds them."""
    own = settled_leaves(discovery).get(site.name, frozenset())
    if site.adapter is None:
        return sorted(own)
    packings = site.adapter.inputs
    plain = {at for at in own if (packing := packings[at]) is None or packing.plain}
    return [at for at, origin in enumerate(site.adapter.origins) if origin in plain]


def _within(site: BlockSite, report: Report) -> Report:
    """The report with what it left alone named in the model instead of in the block."""
    refused = (Refusal(f"{site.name}.{refusal.where}", refusal.reason) for refusal in report.refused)
    return replace(report, refused=tuple(refused))


def _computes(graph: BlockGraph, site: BlockSite) -> bool:
    """Whether the graph gives what the block of `site` gives; without numbers, what `group_blocks` compared is all."""
    return weightless(site.module) or computes(graph, site)
