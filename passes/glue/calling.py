"""Guards in the place of a model's blocks: how each is called and answered, without the tensors of any call.

Around the guard of an adapted block (passes.observe.adapt), leaves are seen per sample and states packed again;
how many samples there are is read off the model's own arguments when it is called.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from passes.blocks.complex_to_real import as_real
from passes.graphs.batch_layout import Adapter, Samples, part_samples
from passes.graphs.graph import BlockGraph, BlockSite, States
from passes.graphs.held import Plain, holds, modules_in, plainly
from passes.graphs.uncompiled import WRAPPER
from passes.observe.adapt import joined_leaves, split_leaves
from runtime.base.errors import InnerShapeError
from runtime.base.guard import any_but, checked, guard
from runtime.face.arguments import exactly


@dataclass(frozen=True)
class _Batch:
    """How many samples the call of a guarded model holds, and its offsets as checked, by the tokens of a sample."""

    samples: int
    checked: MutableMapping[Tensor, dict[str, Tensor]] = field(default_factory=WeakTensorKeyDictionary)


_batch: ContextVar[_Batch] = ContextVar("edit_compile_batch")
"""Of the call that is under way."""


@dataclass(frozen=True)
class Calling:
    """How a block is called and answered, without the tensors of any call.

    `kinds` has (dimensions, dtype) of each leaf of the block's own call that is a tensor, and what every other
    exactly is; `spec` is their structure. `leaves` and `states` are those of the graph
    (passes.graphs.graph.BlockGraph), `targets` the positions of the states among `outputs`, which hold what the block
    returns beside them. `read` are (leaf, dimension of the batch, numbers) of leaves of the block's own call that must
    hold these numbers, in every row; `held` is what the block, and modules that it is given, must hold.
    """

    spec: pytree.TreeSpec
    kinds: tuple[tuple[object, ...], ...]
    leaves: tuple[int, ...]
    states: tuple[int, ...]
    targets: tuple[int, ...]
    outputs: tuple[object, ...]
    output_spec: pytree.TreeSpec
    adapter: Adapter | None
    read: tuple[tuple[int, int | None, tuple[float, ...]], ...] = ()
    held: Plain = ()

    @staticmethod
    def of(site: BlockSite, graph: BlockGraph, states: States) -> Calling:
        """How `site` was called when it was recorded."""
        call, adapter = site.calls[0], site.adapter
        own = call.leaves if adapter is None else tuple(joined_leaves(adapter, call.leaves))
        origins = range(len(own)) if adapter is None else adapter.origins
        return Calling(
            call.spec if adapter is None else adapter.spec,
            tuple(map(_kind, own)),
            graph.leaves,
            graph.states,
            tuple(output for output, _ in states.pairs),
            tuple(None if isinstance(output, Tensor) else output for output in call.outputs),
            call.output_spec,
            adapter,
            tuple((origins[at], site.batch_dims.get(at), _numbers(value)) for at, value in graph.read.items()),
            plainly(graph.held),
        )

    def fits(self, block: nn.Module, leaves: Sequence[object], spec: pytree.TreeSpec) -> bool:
        """Whether a call of `block` is of this structure, with what was read; its sizes do not matter."""
        return (
            spec == self.spec
            and tuple(map(_kind, leaves)) == self.kinds
            and all(_holds(leaves[at], dim, numbers) for at, dim, numbers in self.read)
            and holds(block, modules_in(leaves), self.held)
        )

    def check_constants(self, block: nn.Module, leaves: Sequence[object], name: str) -> None:
        """InnerShapeError where a call, while it is exported, holds a number in which its plan was not seen.

        Numbers of a graph that is being made are symbols where values of the model's inputs set them.
        """
        for leaf, kind in zip(leaves, self.kinds, strict=False):
            if not isinstance(leaf, torch.SymInt | torch.SymFloat | torch.SymBool):
                continue
            if _kind(getattr(leaf.node, f"maybe_as_{leaf.node.pytype.__name__}")()) != kind:
                raise InnerShapeError(f"{name} is given a number that values of the model's inputs set")
        if not holds(block, modules_in(leaves), self.held):
            raise InnerShapeError(f"{name} holds something else than it was compiled with: the model's forward sets it")

    def inputs(self, leaves: Sequence[object], name: str) -> list[Tensor]:
        """What the plan takes, of the leaves of the own call of the block `name`."""
        if self.adapter is not None:
            batch = _batch.get()
            leaves = split_leaves(self.adapter, _with_checks(self.adapter, leaves, batch, name), batch.samples)
        return [as_real(leaves[position]) for position in self.leaves]

    def result(self, states: Sequence[Tensor]) -> Any:
        """What the block would have returned."""
        outputs = list(self.outputs)
        for position, state in zip(self.targets, states, strict=True):
            packing = None if self.adapter is None else self.adapter.outputs[position]
            outputs[position] = state if packing is None else packing.packed(state)
        return pytree.tree_unflatten(outputs, self.output_spec)


def _with_checks(adapter: Adapter, leaves: Sequence[object], batch: _Batch, name: str) -> list[Any]:
    """`leaves` with offsets that are checked to part the samples where their rows end; once for all blocks."""
    found: list[Any] = list(leaves)
    for at, said, counted in adapter.counted:
        tokens, offsets = adapter.tokens(counted, leaves, batch.samples), found[at]
        known = batch.checked.setdefault(offsets, {})
        if str(tokens) not in known:
            told = (
                f"block {name}: {said} does not part the samples after every {tokens} tokens, rising from 0 to the "
                "tokens of all samples, so that none could be computed alone: pad all samples to one length"
            )
            known[str(tokens)] = checked(offsets, part_samples(offsets, batch.samples, tokens), told)
        found[at] = known[str(tokens)]
    return found


def _kind(leaf: object) -> tuple[object, ...]:
    return (leaf.dim(), leaf.dtype) if isinstance(leaf, Tensor) else (exactly(leaf),)


def _numbers(value: Tensor) -> tuple[float, ...]:
    return tuple(value.flatten().tolist())


def _holds(leaf: Any, dim: int | None, numbers: tuple[float, ...]) -> bool:
    return all(_numbers(row) == numbers for row in ([leaf] if dim is None else leaf.split(1, dim)))


@dataclass(frozen=True)
class Guard:
    """Answers the calls of block `index` through the guard operator; takes and gives what the block does.

    `ways` are the forms that it may be called in, each with how that looks. A glue that is exported holds one;
    where the model's own Python is the glue they are all that the program has, which may grow meanwhile.
    """

    index: int
    name: str
    ways: Sequence[tuple[int, Calling]]
    hosted: bool = False

    def __call__(self, block: nn.Module, /, *args: object, **kwargs: object) -> Any:
        """Called with the block, or what stands in its place, and its arguments; gives the block's output structure."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        form, calling = self._chosen(block, leaves, spec) if self.hosted else self.ways[0]
        if not self.hosted:
            calling.check_constants(block, leaves, self.name)
        return calling.result(guard(calling.inputs(leaves, self.name), calling.states, self.index, form))

    def _chosen(self, block: nn.Module, leaves: Sequence[object], spec: pytree.TreeSpec) -> tuple[int, Calling]:
        """The way of this call; where several have its structure, shapes tell which of these."""
        fitting = [(form, calling) for form, calling in self.ways if calling.fits(block, leaves, spec)]
        if not fitting:
            raise InnerShapeError(f"block {self.name} is called with other arguments than it was compiled for")
        others = {form for form, _ in self.ways} - {form for form, _ in fitting}
        return any_but(others), fitting[0][1]


def guarded_copy(model: nn.Module, guards: Sequence[Guard], samples: Samples | None = None) -> nn.Module:
    """The model with the forward of every block that has one of `guards` replaced by it.

    Shares all parameters and buffers, and modules and masks that blocks are given; leaves the model itself alone. A
    guarded block keeps its children, since a model's forward may reach into them. `samples` tells the batch, for
    adapted blocks.
    """
    known: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for one in guards:
        given = (kind[0] for _, calling in one.ways for kind in calling.kinds)
        known |= {id(value): value for value in given if isinstance(value, nn.Module | BlockMask)}
        original = model.get_submodule(one.name)
        block = copy.copy(original)
        block.forward = partial(one, block)
        known[id(original)] = block
        outer, _, last = one.name.rpartition(".")
        while last == WRAPPER:  # what torch.compile gave would call the block itself
            known[id(model.get_submodule(outer))] = block
            outer, _, last = outer.rpartition(".")
    twin = copy.deepcopy(model, known)
    if samples is not None and any(calling.adapter for one in guards for _, calling in one.ways):
        twin.register_forward_pre_hook(_Counting(samples), with_kwargs=True)
    return twin


@dataclass(frozen=True)
class _Counting:
    """Notes how many samples a guarded model is called with."""

    samples: Samples

    def __call__(self, _model: nn.Module, _args: object, kwargs: Mapping[str, object]) -> None:
        _batch.set(_Batch(self.samples.count(kwargs)))
