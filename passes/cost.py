"""Work of graphs, counted without running them: operations by torch's FLOP counter, bytes by shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from passes.graph import PlanGraph, Run
from passes.guards import GlueGraph, tensor_arguments
from runtime.guard import answering
from runtime.spec import Plan


def variant_cost(graph: PlanGraph, variant: int, plan: Plan, inputs: Sequence[Tensor]) -> tuple[int, int, int]:
    """(floating-point operations of a row, bytes read once per call, bytes of a row) of one variant.

    Bytes are what must move at least: weights and inputs that all rows share once per call, a row's
    own inputs and states with each row.
    """
    weights = weight_stand_ins(graph, variant)
    rows = _rows(plan, inputs)
    shared, moved = sum(weight.numel() * weight.element_size() for weight in weights), 0
    for spec, value in zip(plan.inputs, inputs, strict=True):
        size = value.numel() * value.element_size()
        if spec.batch_dim is None:
            shared += size
        else:
            moved += size // rows
    for state in plan.states:
        moved += inputs[state].numel() * inputs[state].element_size() // rows
    return count_flops(graph.variants[variant], [*weights, *inputs]) // rows, shared, moved


def glue_flops(glue: GlueGraph, run: Run) -> int:
    """Floating-point operations of the glue alone for one row, its guards counted as nothing."""
    placeholders = glue.module.graph.find_nodes(op="placeholder")[: len(glue.weights)]
    weights = [torch.empty(tuple(n.meta["val"].shape), dtype=n.meta["val"].dtype) for n in placeholders]
    return count_flops(glue.module, [*weights, *tensor_arguments(run.kwargs)[1]]) // run.batch


def hosted_flops(guarded: nn.Module, run: Run) -> int:
    """Floating-point operations of a guarded model without its blocks for one row; runs it once."""
    guards = [vars(module)["forward"] for module in guarded.modules() if "forward" in vars(module)]
    states = {guard.index: guard.graph.states for guard in guards}

    def skip(block: int, inputs: Sequence[Tensor]) -> list[Tensor]:
        return [inputs[position].clone() for position in states[block]]

    with FlopCounterMode(display=False) as counter, torch.no_grad(), answering(skip):
        guarded(**run.kwargs)
    return counter.get_total_flops() // run.batch


def count_flops(function: Callable[..., object], args: Sequence[Tensor]) -> int:
    """Floating-point operations of ``function(*args)``; nothing is computed."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, FlopCounterMode(display=False) as counter, torch.no_grad():
        function(*(mode.from_tensor(value) for value in args))
    return counter.get_total_flops()


def weight_stand_ins(graph: PlanGraph, variant: int) -> list[Tensor]:
    """Untouched memory in the shapes in which the variant reads its weights."""
    nodes = graph.variants[variant].graph.find_nodes(op="placeholder")[: len(graph.pieces)]
    return [torch.empty(tuple(node.meta["val"].shape), dtype=node.meta["val"].dtype) for node in nodes]


def _rows(plan: Plan, inputs: Sequence[Tensor]) -> int:
    return next(
        value.shape[spec.batch_dim]
        for spec, value in zip(plan.inputs, inputs, strict=True)
        if spec.batch_dim is not None
    )
