"""What is remembered of a traced model, so that another form of call can be added to its program.

A program only grows: blocks, their numbers, plans and weights are those of the first trace. In another form of call

    a plan serves a block   <=>  the block's code, and the structure of its call, are those that the plan was made of,
                                 the plan takes the sizes, and its graph gives what the block gives in this form

The last is shown by numbers (passes.blocks.export.validate): a graph made for any size may still be right for some
alone. A plan that has to be made is free in the sizes that plans of the same structure have otherwise. Nothing that was
recorded is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from passes.blocks.complex_to_real import as_real
from passes.blocks.export import ExportError, validate
from passes.glue.calling import Calling
from passes.graphs.graph import BlockGraph, BlockSite, Discovery, MlpSite, PlanGraph, Refusal, Report, States
from passes.graphs.shapes import fits_any
from passes.mlp.written_states import state_names
from passes.observe.dedupe import call_key
from runtime.bundle.spec import Glue, Plan, PlanInput


@dataclass(frozen=True)
class Known:
    """A plan, its graphs, and the `key` (passes.observe.dedupe.call_key) of the calls that it serves."""

    key: tuple[object, ...]
    graph: PlanGraph
    states: States
    sites: tuple[MlpSite, ...]
    plan: Plan

    def takes(self, site: BlockSite) -> bool:
        """Whether the recorded calls of `site` are such calls, in sizes that the plan takes."""
        return call_key(site) == self.key and self.plan.takes(_shapes(site, self.graph.block.leaves))

    def free_in(self, leaf: int, dim: int) -> bool:
        """Whether the plan takes any size there."""
        return self.plan.inputs[self.graph.block.leaves.index(leaf)].shape[dim] is None

    def moved(self, site: BlockSite) -> Iterator[tuple[int, int]]:
        """(leaf, dimension) of the sizes of `site` that are other than those that the plan was made for."""
        for number, (leaf, given) in enumerate(zip(self.graph.block.leaves, self.plan.inputs, strict=True)):
            value = site.calls[0].leaves[leaf]
            assert isinstance(value, Tensor)
            for dim, size in enumerate(value.shape):
                seen = {given.shape[dim], *(bucket[number][dim] for bucket in self.plan.buckets)}
                if dim != given.batch_dim and size > 1 and seen != {size}:
                    yield leaf, dim


@dataclass
class Memory:
    """The plans of a program; by block its first plan, and the ways in which it is called (passes.glue.calling.Guard).

    `hosts` are the guarded models that serve as glue. `loose` are the sizes that values set, as (leaf, dimension) by
    block: a plan must be free in these, although they were seen once.
    """

    known: list[Known] = field(default_factory=list)
    firsts: dict[str, Known] = field(default_factory=dict)
    ways: dict[str, list[tuple[int, Calling]]] = field(default_factory=dict)
    hosts: list[tuple[Glue, nn.Module]] = field(default_factory=list)
    loose: dict[str, set[tuple[int, int]]] = field(default_factory=dict)

    @contextmanager
    def unless_raised(self) -> Iterator[None]:
        """What is remembered inside the ``with`` block is forgotten where that raises.

        The lists of `ways` stay the same objects: guards of hosted glue read them.
        """
        known, firsts, hosts = list(self.known), dict(self.firsts), list(self.hosts)
        before = {name: len(ways) for name, ways in self.ways.items()}
        try:
            yield
        except BaseException:
            self.known, self.firsts, self.hosts = known, firsts, hosts
            self.loose.clear()
            for name in list(self.ways):
                del self.ways[name][before.get(name, 0) :]
            raise

    def remember(
        self,
        site: BlockSite,
        old: Known | None,
        graph: PlanGraph,
        states: States,
        sites: tuple[MlpSite, ...],
        plan: Plan,
    ) -> None:
        """That `plan` serves `site`; it takes the place of what was known of it as `old`."""
        found = replace(old, plan=plan) if old else Known(call_key(site), graph, states, sites, plan)
        place = next((n for n, one in enumerate(self.known) if (one.plan.id, one.key) == (plan.id, found.key)), None)
        if place is None:
            self.known.append(found)
        else:
            self.known[place] = found
        self.firsts.setdefault(site.name, found)

    def continued(self, discovery: Discovery) -> tuple[Discovery, Report]:
        """`discovery` with what routers read of blocks as the first trace found it; without those where it is not."""
        blocks, refused = [], []
        for site in discovery.blocks:
            site, reason = self._with_time(site)
            if reason is None:
                blocks.append(site)
            else:
                refused.append(Refusal(site.name, reason))
        return replace(discovery, blocks=tuple(blocks)), Report("growth", refused=tuple(refused))

    def _with_time(self, site: BlockSite) -> tuple[BlockSite, str | None]:
        """The site with a time embedding just where the first plan has one, and why there is none that fits."""
        first = self.firsts[site.name].plan
        if first.time is None:
            return replace(site, time=None), None
        shape = () if site.time is None else _shapes(site, [site.time])[0]
        if shape[-1:] != first.inputs[first.time].shape[-1:]:
            return site, "has another time embedding than in the first form of call, which its router reads"
        return site, None

    def serving(self, sites: Sequence[BlockSite]) -> Iterator[tuple[Known, list[BlockSite]]]:
        """Plans that serve some of `sites`, blocks of one group, with these."""
        rest = list(sites)
        for known in self.known:
            if rest and known.takes(rest[0]):
                served = [site for site in rest if computes(known.graph.block, site)]
                rest = [site for site in rest if not any(site is one for one in served)]
                if served:
                    yield known, served

    def free(self, site: BlockSite) -> dict[int, set[int]]:
        """Dimensions of leaves that are loose, or that plans of the same structure have in other sizes.

        Where one of these takes the sizes of `site` it is not right in them, so that another is made for them alone.
        """
        alike = [known for known in self.known if known.key == call_key(site)]
        places = set(self._loose(site))
        if not any(known.takes(site) for known in alike):
            places |= {place for known in alike for place in known.moved(site)}
        found: dict[int, set[int]] = {}
        for leaf, dim in places:
            found.setdefault(leaf, set()).add(dim)
        return found

    def lacks(self, site: BlockSite) -> bool:
        """Whether there is no plan for the block that is free in the sizes that values set."""
        loose = self._loose(site)
        alike = [known for known in self.known if known.key == call_key(site)]
        return bool(loose) and not any(all(known.free_in(*place) for place in loose) for known in alike)

    def _loose(self, site: BlockSite) -> list[tuple[int, int]]:
        """(leaf, dimension) of the block's loose sizes; torch.export leaves no size of one free."""
        return [(leaf, dim) for leaf, dim in self.loose.get(site.name, ()) if _size(site, leaf, dim) > 1]

    def objection(self, site: BlockSite, graph: BlockGraph) -> str | None:
        """Why a new plan must not serve the block: its residuals and its router go by the states of the first.

        Nor may it assume anything of sizes that values set, which were seen once.
        """
        first = self.firsts[site.name]
        values = {node.target: node.meta["val"] for node in graph.module.graph.find_nodes(op="placeholder")}
        for leaf, dim in self._loose(site):
            name = graph.inputs[graph.leaves.index(leaf)]
            if not fits_any(values[name].shape[dim]):
                return f"its code fixes a size of {name}, which the model's inputs set by their values"
        old, new = ((state_names(one), _widths(one)) for one in (first.graph.block, graph))
        return None if old == new else f"has other states than in the first form of call ({old[0]}, now {new[0]})"


def computes(graph: BlockGraph, site: BlockSite) -> bool:
    """Whether the graph gives what the block of `site` gave in its recorded calls."""
    try:
        validate(graph, site)
    except ExportError:
        return False
    return True


def grown_plan(plan: Plan, buckets: Sequence[tuple[tuple[int | None, ...], ...]]) -> Plan:
    """`plan`, which serves the shapes `buckets` too."""
    return replace(plan, buckets=tuple(dict.fromkeys((*plan.buckets, *buckets))))


def shapes_of(inputs: Sequence[Tensor], plan_inputs: Sequence[PlanInput]) -> tuple[tuple[int | None, ...], ...]:
    """A set of shapes that a plan serves, without the batch where that is free."""
    return tuple(
        tuple(None if d == spec.batch_dim and spec.shape[d] is None else size for d, size in enumerate(value.shape))
        for value, spec in zip(inputs, plan_inputs, strict=True)
    )


def _shapes(site: BlockSite, leaves: Sequence[int]) -> list[tuple[int, ...]]:
    return [tuple(as_real(site.calls[0].leaves[leaf]).shape) for leaf in leaves]


def _size(site: BlockSite, leaf: int, dim: int) -> int:
    return _shapes(site, [leaf])[0][dim]


def _widths(graph: BlockGraph) -> list[int]:
    values = {node.target: node.meta["val"] for node in graph.module.graph.find_nodes(op="placeholder")}
    return [int(values[name].shape[-1]) for name in state_names(graph)]
