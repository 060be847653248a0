"""From graphs to files: a plan's variants and the glue, without weights, in the engines' formats.

    variant --torch.export--> .pt2 (engine torch)  --torch.onnx--> .onnx (engine onnxruntime)

Weights are inputs in both, so all blocks of a plan share its files and no file holds a copy of
them. Files are made when they are first asked for: a process that runs one engine lowers for one
engine, and saving a bundle lowers what is still missing.

torch.export traces a plan at full width alone. A narrower variant has the same operators on other sizes, so
that its graph need not be traced, only told its shapes (`_narrower`).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from passes.cost import weight_stand_ins
from passes.graph import PlanGraph
from passes.guards import GlueGraph, is_free
from passes.onnx_format import LowerError, to_onnx
from runtime import pt2
from runtime.engines import plan_file
from runtime.spec import Plan

# By file name, for the life of the process: a plan's name is a hash of all that its files depend on, so that another
# model of the same make, or the same one traced for more shapes, need not be lowered again.
_lowered: dict[str, bytes] = {}


class Files(Mapping[str, bytes]):
    """Names of a bundle's files to their bytes, each made on first use and kept."""

    def __init__(self, makers: Mapping[str, Callable[[], bytes]]) -> None:
        self._makers = dict(makers)
        self._made: dict[str, bytes] = {}

    def __getitem__(self, name: str) -> bytes:
        if name not in self._made:
            self._made[name] = self._makers[name]()
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def lower_plan(graph: PlanGraph, plan: Plan, inputs: Sequence[Tensor]) -> dict[str, Callable[[], bytes]]:
    """Makers of the plan's files; `inputs` are example inputs with a batch of at least two."""
    makers: dict[str, Callable[[], bytes]] = {}
    full = _Export(graph, len(plan.variants) - 1, plan, inputs)
    narrow = [_Export(graph, index, plan, inputs, full) for index in range(len(plan.variants) - 1)]
    for index, export in enumerate([*narrow, full]):
        for suffix, maker in (("pt2", export.pt2), ("onnx", export.onnx)):
            name = plan_file(plan, index, suffix)
            makers[name] = partial(_once, name, maker)
    return makers


def _once(name: str, maker: Callable[[], bytes]) -> bytes:
    if name not in _lowered:
        _lowered[name] = maker()
    return _lowered[name]


def lower_glue(glue: GlueGraph, inputs: Sequence[Tensor]) -> bytes:
    """The glue as a .pt2 file that holds no weights."""
    free = [{glue.batch_dims[name]: Dim.AUTO} if name in glue.batch_dims else None for name in glue.inputs]
    weights = list(glue.weights.values())
    return pt2.dump(_reexport(glue.module, [*weights, *inputs], [None] * len(weights) + free))


class _Export:
    """One variant of a plan, exported once for both formats; a narrow one from its plan's `full` width."""

    def __init__(
        self, graph: PlanGraph, index: int, plan: Plan, inputs: Sequence[Tensor], full: _Export | None = None
    ) -> None:
        self.graph, self.index, self.plan, self.inputs, self.full = graph, index, plan, inputs, full
        self.program: ExportedProgram | None = None

    def exported(self) -> ExportedProgram:
        if self.program is None:
            weights = weight_stand_ins(self.graph, self.index)
            module = self.graph.variants[self.index]
            if self.full is not None:
                self.program = _narrower(self.full.exported(), module, weights)
            else:
                free = [
                    {d: Dim.AUTO for d, size in enumerate(spec.shape) if size is None} or None
                    for spec in self.plan.inputs
                ]
                self.program = _reexport(module, [*weights, *self.inputs], [None] * len(weights) + free)
        return self.program

    def pt2(self) -> bytes:
        return pt2.dump(self.exported())

    def onnx(self) -> bytes:
        names = [*self.plan.weights, *(spec.name for spec in self.plan.inputs)]
        states = [f"state_{k}" for k in range(len(self.plan.states))]
        return to_onnx(self.exported(), names, states, f"plan {self.plan.id}")


def _reexport(module: fx.GraphModule, args: Sequence[Tensor], free: Sequence[dict | None]) -> ExportedProgram:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(module, tuple(args), dynamic_shapes=tuple(free), strict=False)
    _check_free(program, free)
    return program


def _check_free(program: ExportedProgram, free: Sequence[dict | None]) -> None:
    for node, dims in zip(program.graph.find_nodes(op="placeholder"), free, strict=True):
        fixed = [d for d in dims or () if not is_free(node.meta["val"].shape[d])]
        if fixed:
            raise LowerError(f"dimension {fixed[0]} of {node.name} has to stay free, but its export fixed it")


def _narrower(full: ExportedProgram, module: fx.GraphModule, weights: Sequence[Tensor]) -> ExportedProgram:
    """`module`, a narrower variant of the exported one, as if it had been exported: `weights` tell its sizes."""
    inputs = [node.meta["val"] for node in full.graph.find_nodes(op="placeholder")][len(weights) :]
    free = [dict.fromkeys(d for d, size in enumerate(value.shape) if is_free(size)) for value in inputs]
    mode = inputs[0].fake_mode
    module = copy.deepcopy(module)
    fakes = [mode.from_tensor(weight, static_shapes=True) for weight in weights]
    with torch.no_grad():
        FakeTensorProp(module, mode).propagate_dont_convert_inputs(*fakes, *inputs)
    outputs: Any = module.graph.output_node().args[0]
    taken = [TensorArgument(node.name) for node in module.graph.find_nodes(op="placeholder")]
    signature = ExportGraphSignature(
        [InputSpec(InputKind.USER_INPUT, argument, None) for argument in taken],
        [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in outputs],
    )
    program = ExportedProgram(
        module, module.graph, signature, {}, full.range_constraints, full.module_call_graph, constants={}
    )
    _check_free(program, [None] * len(weights) + [dims or None for dims in free])
    return program
