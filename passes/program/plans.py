"""What a manifest says of the graphs of blocks: a plan for each group at every width, checked, with its work.

each width          variant_v(weights[:rows_v], x)  =  block(x) with hidden channels rows_v.. masked to zero
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from passes.blocks.complex_to_real import as_real
from passes.graphs.cost import variant_cost
from passes.graphs.graph import Report
from passes.graphs.shapes import is_free
from passes.mlp.weights import at_widths
from passes.observe.dedupe import plan_id
from passes.program.check import check_widths
from passes.program.compilation import Compilation, Group, Planned
from passes.program.memory import grown_plan, shapes_of
from runtime.base.rows import one_row
from runtime.bundle.spec import Cost, Plan, PlanInput, Variant


class Widths:
    """Make the graph of each kind of block at every width, over one copy of the weights."""

    name, needed = "widths", True

    def run(self, compilation: Compilation) -> Compilation:
        """With the `plan_graph` of every group."""
        blocks, groups = len(compilation.blocks), len(compilation.groups)
        compilation = compilation.reported(Report("dedupe", (f"{blocks} blocks are {groups} plans",)))

        def widen(group: Group) -> tuple[Group, Report]:
            graph, report = at_widths(group.graph, group.sites, compilation.widths)
            return replace(group, widened=graph), report

        return compilation.each(self.name, widen)


class Plans:
    """Compare every width with the masked block, and name each plan by its graphs."""

    name, needed = "plans", True

    def run(self, compilation: Compilation) -> Compilation:
        """With a `planned` for every group; raises CheckError where a width differs from the masked block."""
        planned = []
        for group in compilation.groups:
            graph, examples = group.plan_graph, _examples(group)
            if group.known is None:
                plan = _plan(group)
            else:
                plan = grown_plan(group.known.plan, _buckets(examples, group.known.plan.inputs))
            check_widths(group, graph, group.first)
            planned.append(Planned(group, graph, plan, examples))
        proven = compilation.proven.union(plan_id(item.graph) for item in planned)
        return replace(compilation, planned=tuple(planned), proven=proven)


def _plan(group: Group) -> Plan:
    site, graph = group.first, group.plan_graph
    leaves, single = group.graph.leaves, group.graph.row_dims is not None
    placeholders = {node.target: node.meta["val"] for node in group.graph.module.graph.find_nodes(op="placeholder")}
    inputs = []
    for name, leaf in zip(group.graph.inputs, leaves, strict=True):
        seen = [as_real(call.leaves[leaf]) for call in site.calls]
        if single:
            seen = [one_row([value], [site.batch_dims.get(leaf)])[0] for value in seen]
        free = map(is_free, placeholders[name].shape)
        same = (all(other.shape[d] == size for other in seen) for d, size in enumerate(seen[0].shape))
        shape = tuple(
            None if loose or not one else size for size, loose, one in zip(seen[0].shape, free, same, strict=True)
        )
        inputs.append(PlanInput(name, dtype_name(seen[0]), shape, site.batch_dims.get(leaf)))
    kind = type(site.module).__name__
    time = leaves.index(site.time) if site.time is not None else None
    examples = _examples(group)
    sizes = [tuple(value.shape) for example in examples for value in example]
    dtypes = [node.meta["val"].dtype for node in graph.variants[-1].graph.find_nodes(op="placeholder")]
    return Plan(
        id=plan_id(graph, (kind, inputs, time, sizes, dtypes)),
        kind=kind,
        inputs=tuple(inputs),
        states=group.graph.states,
        time=time,
        weights=tuple(piece.name for piece in graph.pieces),
        variants=tuple(
            Variant(width, tuple(piece.rows[v] for piece in graph.pieces)) for v, width in enumerate(graph.widths)
        ),
        single_row=single,
        buckets=_buckets(examples, inputs),
    )


def _buckets(
    examples: Sequence[Sequence[Tensor]], inputs: Sequence[PlanInput]
) -> tuple[tuple[tuple[int | None, ...], ...], ...]:
    """The sets of shapes of `examples`, each once."""
    return tuple(dict.fromkeys(shapes_of(example, inputs) for example in examples))


def _examples(group: Group) -> tuple[tuple[Tensor, ...], ...]:
    """The group's inputs at each bucket, from the runs with the doubled batch; one row where the graph takes one."""
    calls = group.first.calls
    graph, doubled = group.graph, calls[len(calls) // 2 :]
    examples = [[as_real(call.leaves[leaf]) for leaf in graph.leaves] for call in doubled]
    if graph.row_dims is not None:
        examples = [one_row(example, graph.row_dims) for example in examples]
    return tuple(map(tuple, examples))


def costs_of(planned: Sequence[Planned], bucket: int) -> tuple[Cost, ...]:
    """The work of every variant of every plan at the shapes of a bucket."""
    return tuple(
        Cost(item.plan.id, index, *variant_cost(item.graph, index, item.plan, item.examples[bucket]))
        for item in {item.plan.id: item for item in planned}.values()
        for index in range(len(item.plan.variants))
    )


def dtype_name(tensor: Tensor) -> str:
    """The dtype as manifests have it."""
    return str(tensor.dtype).removeprefix("torch.")
