"""The passes from a model to its blocks' graphs and MLPs, as the list of passes.pipeline holds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial

from passes.blocks.complex_to_real import complex_to_real
from passes.blocks.export import ExportError, check_held, export_block
from passes.blocks.headless_attention import one_head
from passes.graphs.graph import BlockGraph, BlockSite, Refusal, Report
from passes.graphs.progress import tell
from passes.graphs.weightless import weightless
from passes.mlp.sites import find_sites
from passes.mlp.written_states import check_names, choose_sites
from passes.observe.dedupe import group_blocks
from passes.observe.discover import discover
from passes.observe.residuals import find_states
from passes.observe.settled import Settled, settled_in_every_run
from passes.observe.statement import stated_continues
from passes.program.compilation import Changed, Compilation, Group, Refused
from passes.program.memory import computes
from runtime.bundle.operators import refused_in


class GroupPass:
    """A pass that calls ``change(compilation, group)`` for every group without a known plan (see `Compilation.each`).

    Its docstring is that of `change`. `needed` says that no program can be made without it.
    """

    def __init__(self, name: str, change: Callable[[Compilation, Group], Changed], needed: bool = False) -> None:
        self.name, self.change, self.needed, self.__doc__ = name, change, needed, change.__doc__

    def run(self, compilation: Compilation) -> Compilation:
        """With the groups as `change` gives them."""
        return compilation.each(self.name, partial(self.change, compilation))


class Discover:
    """Run the model and find its blocks; in a program that grows, those that it has."""

    name, needed = "discover", True

    def run(self, compilation: Compilation) -> Compilation:
        """With `found` and `blocks`, unless these are given; DiscoveryError where the model cannot be observed."""
        if compilation.found is not None:
            return compilation
        memory, only = compilation.memory, compilation.memory.firsts if compilation.growing else None
        found, report = discover(compilation.model, compilation.inputs, compilation.timestep, only, compilation.stated)
        compilation = compilation.reported(report)
        if compilation.growing:
            found, left = memory.continued(found)
            compilation = compilation.reported(left)
        return replace(compilation, found=found, blocks=found.blocks)


class Dedupe:
    """Group the blocks that look alike; in a program that grows, first those that its plans serve."""

    name, needed = "dedupe", True

    def run(self, compilation: Compilation) -> Compilation:
        """With `groups`."""
        groups: list[Group] = []
        for sites in (part for alike in group_blocks(compilation.blocks) for part in _as_stated(compilation, alike)):
            served: set[str] = set()
            for known, members in compilation.memory.serving(sites) if compilation.serving else ():
                served |= {site.name for site in members}
                groups.append(Group(tuple(members), known.states, known.graph.block, known.sites, known, known.graph))
            rest = tuple(site for site in sites if site.name not in served)
            groups += (Group(rest),) if rest else ()
        return compilation.with_groups(groups)


class Export:
    """Export the graph of each kind of block, and set apart the blocks that it is wrong for."""

    name, needed = "export", True

    def run(self, compilation: Compilation) -> Compilation:
        """With a graph for every group. Blocks whose numbers the first one's graph does not give are a group of their
        own, until there is a graph for all."""
        # it runs the model, where code reads numbers
        settled = cache(partial(settled_in_every_run, compilation.discovery))
        while any(group.exported is None for group in compilation.groups):
            tell(
                "exporting blocks", sum(one.exported is not None for one in compilation.groups), len(compilation.groups)
            )
            compilation = STATES.run(compilation.each(self.name, partial(_export, compilation, settled)))
        return compilation


class Streams:
    """Keep the MLPs that write to no state but those whose MLPs are to be narrowed."""

    name, needed = "streams", True

    def run(self, compilation: Compilation) -> Compilation:
        """With those `sites` alone; raises StreamError where no block has a state of a name that was given."""
        if not compilation.growing:
            check_names((group.graph for group in compilation.groups), compilation.narrow)
        return compilation.each(self.name, partial(_choose, compilation))


def _as_stated(compilation: Compilation, sites: Sequence[BlockSite]) -> Iterator[tuple[BlockSite, ...]]:
    """`sites` by what is stated of them."""
    found: dict[tuple[tuple[str, str], ...], list[BlockSite]] = {}
    for site in sites:
        key = tuple(sorted(stated_continues(compilation.stated, site.name).items()))
        found.setdefault(key, []).append(site)
    yield from map(tuple, found.values())


def _pair(compilation: Compilation, group: Group) -> Changed:
    """Find which outputs of each kind of block continue which of its inputs."""
    if group.paired is not None:
        return group, None
    states, report = find_states(group.first, compilation.candidates, compilation.stated)
    if not states.pairs:
        reason = report.refused[0].reason
        raise Refused(*report.refused, *(Refusal(site.name, reason) for site in group.blocks[1:]))
    return replace(group, paired=states), report


def _export(compilation: Compilation, settled: Callable[[], Mapping[str, Settled]], group: Group) -> Changed:
    if group.exported is not None:
        return group, None
    free = compilation.memory.free(group.first)
    try:
        known = partial(_settled, settled, group.first)
        graph, report = export_block(group.first, group.states, compilation.discovery.runs, free, known)
    except ExportError as error:
        raise group.refused(str(error)) from error
    strangers = tuple(site for site in group.blocks[1:] if not _computes(graph, site))
    own = tuple(site for site in group.blocks if not any(site is one for one in strangers))
    made = replace(group, blocks=own, exported=graph)
    return ((made, Group(strangers)) if strangers else made), report


def _settled(settled: Callable[[], Mapping[str, Settled]], site: BlockSite) -> Settled:
    """What none of the model's arguments sets of `site`, as its own call holds it."""
    own = settled().get(site.name, Settled())
    if site.adapter is None:
        return own
    packings = site.adapter.inputs
    plain = {at for at in own if (packing := packings[at]) is None or packing.plain}
    return frozenset(at for at, origin in enumerate(site.adapter.origins) if origin in plain)


def _computes(graph: BlockGraph, site: BlockSite) -> bool:
    """Whether the graph gives what the block of `site` gives; without numbers, shapes and attributes are all."""
    if not weightless(site.module):
        return computes(graph, site)
    with suppress(ExportError):
        check_held(graph, site)
        return True
    return False


def _make_real(compilation: Compilation, group: Group) -> Changed:
    """Rewrite complex arithmetic as arithmetic of real pairs; what no bundle may hold after that is refused."""
    module, report = complex_to_real(group.graph.module)
    if report.refused:
        raise Refused(*report.refused)
    refused = refused_in(module.graph)
    if refused is not None:
        raise group.refused(f"{refused}, which no bundle may hold")
    return group.with_graph(module), report


def _give_heads(compilation: Compilation, group: Group) -> Changed:
    """Give attention without heads a dimension for one, which engines need."""
    module, report = one_head(group.graph.module)
    return group.with_graph(module), report


def _go_on(compilation: Compilation, group: Group) -> Changed:
    """In a program that grows, refuse new graphs that do not go on from the blocks' first ones."""
    objection = compilation.memory.objection(group.first, group.graph) if compilation.growing else None
    if objection is not None:
        raise group.refused(objection)
    return group, None


def _find_mlps(compilation: Compilation, group: Group) -> Changed:
    """Find the MLPs of each graph whose hidden channels may be narrowed."""
    sites, report = find_sites(group.graph)
    return replace(group, sites=sites), _within(group.first, report)


def _choose(compilation: Compilation, group: Group) -> Changed:
    sites, report = choose_sites(group.graph, group.sites, compilation.narrow)
    return replace(group, sites=sites), _within(group.first, report)


def _within(site: BlockSite, report: Report) -> Report:
    """The report with what it left alone named in the model instead of in the block."""
    refused = (Refusal(f"{site.name}.{refusal.where}", refusal.reason) for refusal in report.refused)
    return replace(report, refused=tuple(refused))


STATES = GroupPass("states", _pair, needed=True)
REAL = GroupPass("real", _make_real, needed=True)
HEADS = GroupPass("heads", _give_heads)
GROWTH = GroupPass("growth", _go_on, needed=True)
MLPS = GroupPass("mlp", _find_mlps)
