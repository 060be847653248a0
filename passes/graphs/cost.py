"""Work of graphs, counted without running them: operations by torch's FLOP counter, bytes by shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from torch.utils.flop_counter import FlopCounterMode, _FlopCounterMode

from passes.graphs.glue_graph import GlueGraph, tensor_arguments
from passes.graphs.graph import PlanGraph, Run
from passes.graphs.record import own
from runtime.base.guard import Answer, answering, guard
from runtime.bundle.spec import Plan

_FLEX: Any = torch.ops.higher_order.flex_attention


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
    weights = [_zeros_like(node.meta["val"]) for node in placeholders]
    states = {node.args[2]: node.args[1] for node in glue.module.graph.find_nodes(op="call_function", target=guard)}
    with answering(_skipping(states)):
        return count_flops(glue.module, [*weights, *tensor_arguments(run.kwargs)[1]]) // run.batch


def hosted_flops(guarded: nn.Module, states: Mapping[int, Sequence[int]], run: Run) -> int:
    """Floating-point operations of a guarded model without its blocks for one row; runs it once.

    `states` are the positions of each block's states in its inputs.
    """
    with _frozen(guarded), counting() as counter, torch.no_grad(), answering(_skipping(states)):
        guarded(**own(run.kwargs))
    return counter.get_total_flops() // run.batch


def model_flops(model: nn.Module, run: Run) -> int:
    """Floating-point operations of the whole model for one row; runs it once."""
    with _frozen(model), counting() as counter, torch.no_grad():
        model(**own(run.kwargs))
    return counter.get_total_flops() // run.batch


@contextmanager
def tallying(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Inside the ``with`` block, a function that gives the floating-point operations so far."""
    with _frozen(model), counting() as counter, torch.no_grad():
        yield counter.get_total_flops


def count_flops(function: Callable[..., object], args: Sequence[Tensor]) -> int:
    """Floating-point operations of ``function(*args)``.

    Nothing is computed, unless the sizes within depend on the numbers.
    """
    counted = _counted_without_numbers(function, args)
    if counted is not None:
        return counted
    with counting() as counter, torch.no_grad():
        function(*args)
    return counter.get_total_flops()


def _counted_without_numbers(function: Callable[..., object], args: Sequence[Tensor]) -> int | None:
    """The count where no size depends on numbers, else None."""
    sizes = ShapeEnv(allow_dynamic_output_shape_ops=False)
    fake = FakeTensorMode(allow_non_fake_inputs=True, shape_env=sizes, static_shapes=True)
    try:
        with fake as mode, counting() as counter, torch.no_grad():
            function(*(mode.from_tensor(value) for value in args))
    except (DynamicOutputShapeException, DataDependentOutputException, GuardOnDataDependentSymNode):
        return None
    total = counter.get_total_flops()
    return total if isinstance(total, int) else None


def counting() -> FlopCounterMode:
    """A context that counts (`get_total_flops`): torch's counter, which alone does not know the attention of CPUs."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={attention: _attention_flops, _FLEX: _attention_flops})


@_FLEX.py_impl(_FlopCounterMode)
def _counted_flex(mode: Any, *args: Any, **kwargs: Any) -> Any:
    """Flex attention under the counter, which knows no rule for it; over all tokens, as it is computed eagerly."""
    return mode.counter._count_flops(_FLEX, _FLEX(*args, **kwargs), args, kwargs)


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: object, **__: object) -> int:
    """Q K and its product with V, for shapes (B, heads, L, D)."""
    batch, heads, length, dim = query
    return 2 * batch * heads * length * key[2] * (dim + value[3])


def _skipping(states: Mapping[Any, Any]) -> Answer:
    """Answers guards as if every block were skipped; `states` are the positions of a block's states in its inputs."""
    return lambda block, inputs, form: [inputs[position].clone() for position in states[block]]


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Inside the ``with`` block no parameter wants a gradient: torch's FLOP counter fails on views of those that do."""
    wanting = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in wanting:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)


def weight_stand_ins(graph: PlanGraph, variant: int) -> list[Tensor]:
    """Zeros in the shapes in which the variant reads its weights."""
    nodes = graph.variants[variant].graph.find_nodes(op="placeholder")[: len(graph.pieces)]
    return [_zeros_like(node.meta["val"]) for node in nodes]


def _zeros_like(value: Tensor) -> Tensor:
    """Zeros of the shape, dtype and device of a fake tensor: a graph's tensors meet on one device."""
    return torch.zeros(tuple(value.shape), dtype=value.dtype, device=value.device)


def _rows(plan: Plan, inputs: Sequence[Tensor]) -> int:
    return next(
        value.shape[spec.batch_dim]
        for spec, value in zip(plan.inputs, inputs, strict=True)
        if spec.batch_dim is not None
    )
