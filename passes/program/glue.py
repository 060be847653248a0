"""From plans to glue: a guard in the place of every block, and what remains of the model for each form of call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn
from torch.fx import Interpreter

from passes.blocks.export import weight_values
from passes.glue.calling import Calling, Guard, guarded_copy
from passes.glue.export import GuardError, guard_glue, moving_dims
from passes.graphs.glue_graph import GlueGraph, tensor_arguments
from passes.graphs.graph import BlockSite, Run
from passes.graphs.progress import tell
from passes.graphs.weightless import weightless
from passes.program.check import check_open
from passes.program.compilation import Compilation, FormGlue, Planned
from passes.program.plans import dtype_name
from runtime.bundle.spec import Glue, GlueInput
from runtime.face.arguments import find_glue, flatten


class Guards:
    """Put a guard in the place of every block, and export the glue around them for each form of call."""

    name, needed = "guards", True

    def run(self, compilation: Compilation) -> Compilation:
        """With `guards`, and `glues` for the forms of call that have none; nothing where there is no block at all.

        A glue that cannot be exported is hosted: the report says why, and the guarded model itself serves as glue.
        """
        if not compilation.blocks and not compilation.manifest.blocks:
            return compilation
        guards = tuple(_guards(compilation))
        compilation = replace(compilation, guards=guards)
        for one in guards:
            _note(compilation, one)
        guarded = guarded_copy(compilation.model, guards, compilation.discovery.samples)
        for bucket, (given, doubled) in enumerate(compilation.discovery.buckets):
            tell("exporting the model around its blocks", bucket, len(compilation.discovery.buckets))
            entries = [*compilation.manifest.glues, *(glue.entry for glue in compilation.glues)]
            if find_glue(entries, *flatten(given.kwargs)) is None:
                compilation = _with_glue(compilation, guarded, bucket, given, doubled, str(len(entries)))
        return compilation


def guarded_blocks(compilation: Compilation) -> Iterator[tuple[Guard, BlockSite, Planned]]:
    """Every block with its guard and its plan."""
    items = (compilation.planned[owner] for owner in compilation.group_of)
    yield from zip(compilation.guards, compilation.blocks, items, strict=True)


def cut_weights(site: BlockSite, item: Planned) -> dict[str, tuple[Tensor, Tensor]]:
    """What a block passes for each weight of its plan, and the weight of the block that it is cut from."""
    names = dict(zip(item.group.graph.weights, weight_values(item.group.graph, site.module), strict=True))
    return {piece.name: (piece.cut(names[piece.source]), names[piece.source]) for piece in item.graph.pieces}


def _guards(compilation: Compilation) -> Iterator[Guard]:
    """A guard for each block in the form that it has, or will have, with its plan."""
    blocks = {block.name: block for block in compilation.manifest.blocks}
    names = dict.fromkeys((*blocks, *(site.name for site in compilation.blocks)))
    numbers = {name: number for number, name in enumerate(names)}
    for site, owner in zip(compilation.blocks, compilation.group_of, strict=True):
        item = compilation.planned[owner]
        forms = blocks[site.name].forms if site.name in blocks else ()
        form = next((number for number, form in enumerate(forms) if form.plan == item.plan.id), len(forms))
        calling = Calling.of(site, item.group.graph, item.group.states)
        yield Guard(numbers[site.name], site.name, ((form, calling),))


def _note(compilation: Compilation, one: Guard) -> None:
    """Remember how the block is called: guards of hosted glue answer all ways that there are."""
    ways = compilation.memory.ways.setdefault(one.name, [])
    ways += [way for way in one.ways if way not in ways]


def _with_glue(
    compilation: Compilation, guarded: nn.Module, bucket: int, given: Run, doubled: Run, name: str
) -> Compilation:
    try:
        graph, shown, report = guard_glue(guarded, given, doubled, _fits(compilation), name)
    except GuardError as error:
        made = _hosted(compilation, bucket, given, doubled, name)
        compilation = compilation.refused(Guards.name, "glue", f"hosted by the model, since {error}")
    else:
        made = FormGlue(_standalone(graph, name, shown), bucket, shown, given if shown is doubled else doubled, graph)
        compilation = compilation.reported(report)
        for number, k, dim in graph.loose:
            one, _, item = next(found for found in guarded_blocks(compilation) if found[0].index == number)
            compilation.memory.loose.setdefault(one.name, set()).add((item.graph.block.leaves[k], dim))
    return replace(compilation, glues=(*compilation.glues, made))


def _fits(compilation: Compilation) -> Callable[[GlueGraph, Run], bool]:
    """Whether an exported glue gives what the model gives on another run than it was exported with."""
    if weightless(compilation.model):
        return lambda glue, run: True
    plans = {one.index: (site, item) for one, site, item in guarded_blocks(compilation)}

    def answer(index: int, inputs: Sequence[Tensor], form: int = 0) -> list[Tensor]:
        site, item = plans[index]
        weights = [piece.to(inputs[0].device) for piece, _ in cut_weights(site, item).values()]
        return item.graph.block.run(item.graph.variants[-1], weights, inputs)

    def fits(glue: GlueGraph, run: Run) -> bool:
        inputs = [*glue.weights.values(), *tensor_arguments(run.kwargs)[1]]
        try:
            check_open(lambda: Interpreter(glue.module).run(*inputs), run, compilation.model, answer)
        except Exception:  # whatever the graph does to sizes that it was not made for
            return False
        return True

    return fits


def _standalone(graph: GlueGraph, name: str, run: Run) -> Glue:
    return Glue(
        id=name,
        file=f"glue/{name}.pt2",
        inputs=_inputs(run, graph.batch_dims),
        constants=flatten(run.kwargs)[1],
        weights=(),
        outputs=graph.outputs,
        flops=0,
        costs=(),
        sized_by=graph.sized_by,
    )


def _hosted(compilation: Compilation, bucket: int, given: Run, doubled: Run, name: str) -> FormGlue:
    guards = [replace(one, ways=compilation.memory.ways[one.name], hosted=True) for one in compilation.guards]
    host = guarded_copy(compilation.model, guards, compilation.discovery.samples)
    moving = {argument: dims[0] for argument, dims in moving_dims(given, doubled).items() if dims}
    constants = flatten(given.kwargs)[1]
    entry = Glue(name, None, _inputs(given, moving), constants, weights=(), outputs=(), flops=0, costs=())
    return FormGlue(entry, bucket, given, doubled, host=host)


def _inputs(run: Run, batch_dims: Mapping[str, int]) -> tuple[GlueInput, ...]:
    return tuple(
        GlueInput(
            name, dtype_name(value), tuple(None if d == batch_dims.get(name) else n for d, n in enumerate(value.shape))
        )
        for name, value in zip(*tensor_arguments(run.kwargs), strict=True)
    )
