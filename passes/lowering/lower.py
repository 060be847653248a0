"""From graphs to files: a plan's variants and the glue, without weights, in the engines' formats.

    variant --torch.export--> .pt2 (engine torch)  --torch.onnx--> .onnx (engine onnxruntime)

Weights are inputs in both, so all blocks of a plan share its files and no file holds a copy of
them. Files are made when they are first asked for: a process that runs one engine lowers for one
engine, and saving a bundle lowers what is still missing.

A variant has the operators of the block, which was traced, on other sizes: it is told its shapes, not traced
again. So is the glue, which is as it was exported but for the order of its inputs.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, fx
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils import _pytree as pytree

from passes.graphs.cost import weight_stand_ins
from passes.graphs.glue_graph import GlueGraph
from passes.graphs.graph import PlanGraph
from passes.graphs.shapes import is_free, tell_shapes
from passes.observe.dedupe import graph_id, plan_id
from passes.program.compilation import Compilation, PassError
from runtime.base.errors import EditError
from runtime.bundle import archive as pt2
from runtime.bundle.spec import Plan, plan_file


class LowerError(EditError):
    """A graph could not be written in an engine's format; the message names graph and format."""


# The last files by name: a plan's name is a hash of all that its files depend on, so that another model of the same
# make need not be lowered again.
_lowered: dict[str, bytes] = {}
_KEPT = 64


class Lower:
    """Say how the files of plans and glue are made, without weights; each is made when it is first asked for."""

    name, needed = "lower", True

    def run(self, compilation: Compilation) -> Compilation:
        """With the `files` of the program, and a memory of it; PassError for a graph that is not as it was checked."""
        assert compilation.program is not None
        check_proven(compilation)
        memory, makers = compilation.memory, dict[str, Callable[[], bytes]]()
        there = set(compilation.program.files)
        for item in compilation.planned:
            made = lower_plan(item.graph, item.plan) if item.group.known is None else {}
            makers |= {name: maker for name, maker in made.items() if name not in there | makers.keys()}
        for site, owner in zip(compilation.blocks, compilation.group_of, strict=True):
            item, group = compilation.planned[owner], compilation.groups[owner]
            memory.remember(site, group.known, item.graph, group.states, group.sites, item.plan)
        for glue in compilation.glues:
            if glue.graph is not None and glue.entry.file is not None:
                makers[glue.entry.file] = partial(lower_glue, replace(glue.graph, weights={}))
        latest = {glue.id: glue for glue in compilation.manifest.glues}
        hosts = [(glue.entry, glue.host) for glue in compilation.glues if glue.host is not None]
        memory.hosts = [(latest[glue.id], host) for glue, host in (*memory.hosts, *hosts)]
        return replace(
            compilation, program=replace(compilation.program, files=Files.grown(compilation.program.files, makers))
        )


def check_proven(compilation: Compilation) -> None:
    """PassError where a graph of a plan or a glue is not the one whose numbers were compared with the model's."""
    graphs = {f"the plan of {item.group.first.name}": plan_id(item.graph) for item in compilation.planned}
    for glue in compilation.glues:
        if glue.graph is not None:
            graphs[f"glue {glue.entry.id}"] = graph_id(glue.graph.module.graph)
    changed = [what for what, digest in graphs.items() if digest not in compilation.proven]
    if changed:
        raise PassError(
            f"the graph of {changed[0]} was changed after its numbers were compared: a pass that changes the graphs of "
            "plans belongs before 'plans', one that changes glue before 'assemble'"
        )


class Files(Mapping[str, bytes]):
    """Names of a bundle's files to their bytes, each made on first use and kept."""

    def __init__(self, makers: Mapping[str, Callable[[], bytes]]) -> None:
        self._makers = dict(makers)
        self._made: dict[str, bytes] = {}

    @staticmethod
    def grown(files: Mapping[str, bytes], makers: Mapping[str, Callable[[], bytes]]) -> Files:
        """`files`, and those of `makers`; what is made of one is made of the other."""
        if not isinstance(files, Files):
            return Files({**makers, **{name: partial(files.__getitem__, name) for name in files}})
        grown = Files({**files._makers, **makers})
        grown._made = files._made
        return grown

    def __getitem__(self, name: str) -> bytes:
        if name not in self._made:
            self._made[name] = self._makers[name]()
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def lower_plan(graph: PlanGraph, plan: Plan) -> dict[str, Callable[[], bytes]]:
    """Makers of the plan's files."""
    makers: dict[str, Callable[[], bytes]] = {}
    for index in range(len(plan.variants)):
        lowered = _Lowered(graph, index, plan)
        for suffix, maker in (("pt2", lowered.pt2), ("onnx", lowered.onnx)):
            name = plan_file(plan, index, suffix)
            makers[name] = partial(_once, name, maker)
    return makers


def _once(name: str, maker: Callable[[], bytes]) -> bytes:
    made = _lowered.pop(name, None)
    made = _lowered[name] = maker() if made is None else made
    while len(_lowered) > _KEPT:
        del _lowered[next(iter(_lowered))]
    return made


def lower_glue(glue: GlueGraph) -> bytes:
    """The glue as a .pt2 file that holds no weights."""
    free = {name: (dim,) for name, dim in glue.batch_dims.items()}
    return pt2.dump(_program(glue.module, [free.get(name, ()) for name in glue.inputs]))


class _Lowered:
    """One variant of a plan as a program, made once for both formats."""

    def __init__(self, graph: PlanGraph, index: int, plan: Plan) -> None:
        self.graph, self.index, self.plan = graph, index, plan

    @functools.cached_property
    def program(self) -> ExportedProgram:
        weights = weight_stand_ins(self.graph, self.index)
        try:
            module = _sized(self.graph.variants[self.index], weights, self.graph.block.module.graph)
        except Exception as error:
            width = self.plan.variants[self.index].width
            raise LowerError(f"plan {self.plan.id} has no shapes at width {width:g}: {error}") from error
        free = [tuple(d for d, size in enumerate(spec.shape) if size is None) for spec in self.plan.inputs]
        return _program(module, free)

    def pt2(self) -> bytes:
        return pt2.dump(self.program)

    def onnx(self) -> bytes:
        from passes.lowering.onnx_format import to_onnx  # its libraries are not needed to run a bundle

        names = [*self.plan.weights, *(spec.name for spec in self.plan.inputs)]
        states = [f"state_{k}" for k in range(len(self.plan.states))]
        return to_onnx(self.program, names, states, f"plan {self.plan.id}")


def _sized(module: fx.GraphModule, weights: Sequence[Tensor], block: fx.Graph) -> fx.GraphModule:
    """A copy of `module`, a variant of `block`, whose nodes know what they give for `weights` as first placeholders."""
    module = copy.deepcopy(module)
    inputs = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")][len(weights) :]
    mode = inputs[0].fake_mode
    fakes = [mode.from_tensor(weight, static_shapes=True) for weight in weights]
    tell_shapes(module, [*fakes, *inputs], like=block)
    return module


def _program(module: fx.GraphModule, free: Sequence[Sequence[int]]) -> ExportedProgram:
    """`module`, whose nodes know what they give, as if it had been exported.

    `free` are the dimensions of its last placeholders, those of inputs, that must be symbols; else LowerError.
    """
    taken = module.graph.find_nodes(op="placeholder")
    for node, dims in zip(taken[len(taken) - len(free) :], free, strict=True):
        fixed = [d for d in dims if not is_free(node.meta["val"].shape[d])]
        if fixed:
            raise LowerError(f"dimension {fixed[0]} of {node.name} has to stay free, but its export fixed it")
    given: Any = module.graph.output_node().args[0]
    signature = ExportGraphSignature(
        [InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None) for node in taken],
        [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in given],
    )
    arguments, results = pytree.tree_structure(((0,) * len(taken), {})), pytree.tree_structure((0,) * len(given))
    call = ModuleCallEntry("", ModuleCallSignature([], [], arguments, results))
    return ExportedProgram(module, module.graph, signature, {}, _ranges(taken), [call], constants={})


def _ranges(taken: Sequence[fx.Node]) -> dict[Any, Any]:
    """What is known of the sizes that are symbols."""
    sizes = [size for node in taken for size in node.meta["val"].shape if is_free(size)]
    symbols = {symbol: size.node.shape_env for size in sizes for symbol in size.node.expr.free_symbols}
    return {symbol: environment.var_to_range[symbol] for symbol, environment in symbols.items()}
