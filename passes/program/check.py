"""Numeric checks of what the passes made, against the eager model; a graph that fails is never shipped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from passes.blocks.complex_to_real import as_real
from passes.blocks.export import weight_values
from passes.graphs.glue_graph import GlueGraph, tensor_arguments
from passes.graphs.graph import BlockSite, MlpSite, PlanGraph, Run
from passes.graphs.numbers import TOLERANCE, distance, largest
from passes.graphs.record import here, own, undisturbed
from passes.graphs.weightless import hollow
from passes.mlp.weights import site_rows
from passes.program.compilation import Group
from runtime.base.errors import EditError
from runtime.base.guard import Answer, answering
from runtime.face.output import tensors_of


class CheckError(EditError):
    """A compiled graph does not compute what the model computes; the message names it and the distance."""


def check_widths(group: Group, plan: PlanGraph, site: BlockSite) -> None:
    """Compare every variant with the eager block whose hidden channels are masked (equation 13)."""
    call = site.calls[-1]
    weights = dict(zip(group.graph.weights, weight_values(group.graph, site.module), strict=True))
    inputs = [as_real(call.leaves[leaf]) for leaf in group.graph.leaves]
    args, kwargs = pytree.tree_unflatten(list(call.leaves), call.spec)
    for index, width in enumerate(plan.widths):
        pieces = [piece.cut(weights[piece.source])[: piece.rows[index]] for piece in plan.pieces]
        with undisturbed(site.module), masked(site.module, group.sites, width):
            expected = pytree.tree_leaves(site.module(*args, **kwargs))
            states = plan.block.run(plan.variants[index], pieces, inputs)
        for state, (output, _) in zip(states, group.states.pairs, strict=True):
            _agree(state, expected[output], f"{site.name} at width {width}")


def check_open(
    outputs: Callable[[], Sequence[Tensor]],
    run: Run,
    model: nn.Module,
    answer: Answer,
) -> Sequence[Tensor]:
    """Compare a guarded model's `outputs`, its guards answered by `answer`, with what the model gave in the same run.

    Where that was not kept, the model runs. Gives the outputs.
    """
    with undisturbed(model), answering(answer):
        expected = tensors_of(model(**own(run.kwargs)) if run.output is None else run.output)
        found = outputs()
    for output, reference in zip(found, expected, strict=True):
        _agree(output, reference, f"the guarded {type(model).__name__} with every gate open")
    return found


def check_equal(output: Any, expected: Any, what: str) -> None:
    """CheckError where the tensors of two model outputs differ by more than their dtype's tolerance."""
    for value, reference in zip(tensors_of(output), tensors_of(expected), strict=True):
        _agree(value, reference, what)


def glue_outputs(glue: GlueGraph, run: Run) -> Callable[[], Sequence[Tensor]]:
    """The exported glue on the inputs of `run`."""
    return lambda: glue.module(*glue.weights.values(), *tensor_arguments(run.kwargs)[1])


def hosted_outputs(guarded: nn.Module, run: Run) -> Callable[[], Sequence[Tensor]]:
    """The guarded model itself on the inputs of `run`."""
    return lambda: tensors_of(guarded(**own(run.kwargs)))


class masked:
    """Inside the ``with`` block, `module`'s MLP sites see only their first channels at `width`, in this thread."""

    def __init__(self, module: nn.Module, sites: Sequence[MlpSite], width: float) -> None:
        self.module, self.sites, self.width = module, sites, width

    def __enter__(self) -> None:
        """Mask the inputs of the down-projections."""
        self.handles = []
        for site in self.sites:
            kept = site_rows(site.hidden, self.width)
            for slot in site.contractions:
                owner = self.module.get_submodule(site.weight_names[slot.weight].rpartition(".")[0])
                dim = -1 if isinstance(owner, nn.Linear) else 1
                mask = _Mask(dim, slot.start + kept, slot.size - kept)
                self.handles.append(owner.register_forward_pre_hook(here(mask)))

    def __exit__(self, *_: object) -> None:
        """Take the masks off."""
        for handle in self.handles:
            handle.remove()


class _Mask:
    def __init__(self, dim: int, start: int, length: int) -> None:
        self.dim, self.start, self.length = dim, start, length

    def __call__(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        value = args[0].clone()
        value.narrow(self.dim, self.start, self.length).zero_()
        return (value, *args[1:])


def output_distance(output: Any, expected: Any) -> float:
    """Largest distance (passes.graphs.numbers) of the tensors of two model outputs; NaN where one of them is."""
    pairs = zip(tensors_of(output), tensors_of(expected), strict=True)
    return largest(distance(value, reference) for value, reference in pairs)


def _agree(value: Tensor, reference: Tensor, what: str) -> None:
    if hollow(reference):
        if value.shape != reference.shape or value.dtype != reference.dtype:
            raise CheckError(f"{what} has another shape or dtype than the eager model's")
        return
    off = distance(value, reference)
    limit = TOLERANCE["model"].get(reference.dtype, 1e-4)
    if not off <= limit:
        raise CheckError(f"{what} differs from the eager model by {off:.2e} (allowed: {limit:.0e})")
