"""A block seen per sample, where its tensors hold the batch in another way than one row per sample.

Along one dimension, a tensor of a batch of B samples may have

    B rows              one per sample                                       plain
    k B rows, k > 1     k per sample, those of one sample together           seen as (B, k)
    k B + r rows        those of the samples, and r rows that all share      seen as a pair (rows, shared)

A given run and its doubled run tell which: k = (size(2B) - size(B)) / B and r = 2 size(B) - size(2B). Numbers
decide: the samples' rows of the given run lead those of the doubled run, the shared rows are the same in both.
k may differ between shape buckets, r may not. Where nothing can be doubled (passes.doubling), the model takes one
sample whose tokens are rows (L, D): B = 1, and k = L for whatever a block returns in the shape that it came in.

An *adapted* block is a shallow copy (parameters and names stay the same objects) whose forward packs what it gets
per sample, calls the block's own forward, and unpacks what that returns. What is adapted must not depend on where
in the batch a sample stands: the last sample of a doubled run, alone, gives what it gave there.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from passes.graph import Call, Discovery, Run
from passes.packing import Adapter, Packing
from passes.record import record, undisturbed
from passes.weightless import hollow

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""How far the rows of a sample may be off, relative to their largest element, when other samples come or go."""


def leads(small: Tensor, large: Tensor) -> bool:
    """Whether `small` equals the leading part of `large`, to TOLERANCE."""
    if small.ndim != large.ndim or small.dtype != large.dtype:
        return False
    lead = large[tuple(slice(size) for size in small.shape)]
    if lead.shape != small.shape:
        return False
    if hollow(lead, small):
        return True
    if small.dtype not in TOLERANCE or not small.numel():
        return torch.equal(lead, small)
    scale = small.nan_to_num(0, 0, 0).abs().max()
    return torch.allclose(lead, small, rtol=0, atol=float(TOLERANCE[small.dtype] * scale), equal_nan=True)


def find_adapter(calls: Sequence[Call], runs: Sequence[Run]) -> Adapter | str:
    """How the arguments and results of a block hold the batch, or why that cannot be told.

    `calls` are those of the given runs, then those of the doubled ones; so are `runs`.
    """
    half = len(calls) // 2
    batches = [run.batch for run in runs[:half]]
    if lone(runs):
        return _one_sample(calls)
    for at, leaves in enumerate(zip(*(call.leaves for call in calls), strict=True)):
        if len({isinstance(leaf, Tensor) for leaf in leaves}) > 1:
            return (
                f"leaf {at} of its arguments is a tensor for some of the given inputs only: give all a tensor (a mask "
                "that hides nothing, say), or none"
            )
    inputs = _packings([call.leaves for call in calls], batches)
    if isinstance(inputs, int):
        return f"leaf {inputs} of its arguments does not hold one row per sample in one dimension"
    outputs = _packings([call.outputs for call in calls], batches, strict=False)
    assert not isinstance(outputs, int)
    if any(packing is not None and packing.shared for packing in outputs):
        return "returns rows that all samples share: no sample could skip it alone"
    return Adapter(inputs, outputs, calls[0].spec)


def lone(runs: Sequence[Run]) -> bool:
    """Whether the runs are of a model that takes one sample without a batch dimension."""
    return runs[len(runs) // 2].batch == runs[0].batch


def packings_within(discovery: Discovery, modules: Sequence[str]) -> dict[str, Packing]:
    """How what each of `modules` is called with first holds the batch; those where it cannot be told are left out.

    Repeats the runs of `discovery`.
    """
    model, runs = discovery.model, discovery.runs
    if lone(runs):
        return dict.fromkeys(modules, Packing(folded=True))
    if not modules:
        return {}
    watched = {name: model.get_submodule(name) for name in modules}
    with undisturbed(model):
        calls = [record(model, run.kwargs, watched)[0] for run in runs]
    called = [name for name in modules if all(name in call for call in calls)]
    leaves = [[call[name].leaves[0] for name in called] for call in calls]
    found = _packings(leaves, [run.batch for run in runs[: len(runs) // 2]], strict=False)
    assert not isinstance(found, int)
    return {name: packing for name, packing in zip(called, found, strict=True) if packing is not None}


def unpacked(adapter: Adapter, call: Call, samples: int) -> Call:
    """A recorded call of `samples` samples as the adapted block would have seen it."""
    leaves, spec = pytree.tree_flatten(_split(adapter, call.leaves, samples))
    outputs = (
        leaf if packing is None else packing.per_sample(leaf, samples)[0]  # type: ignore[arg-type]
        for leaf, packing in zip(call.outputs, adapter.outputs, strict=True)
    )
    return Call(tuple(leaves), spec, tuple(outputs), call.output_spec)


def split_leaves(adapter: Adapter, leaves: Sequence[object], samples: int) -> list[object]:
    """The leaves of a block's call as those of the adapted block's."""
    return pytree.tree_leaves(_split(adapter, leaves, samples))


def joined_leaves(adapter: Adapter, leaves: Sequence[object]) -> Iterator[Any]:
    """The leaves of an adapted block's call as those of the block's own."""
    rest = iter(leaves)
    for packing in adapter.inputs:
        if packing is None:
            yield next(rest)
        else:
            parts: list[Any] = [next(rest) for _ in range(packing.parts)]
            yield packing.packed(*parts)


def adapted(block: nn.Module, adapter: Adapter) -> nn.Module:
    """A copy of `block` that takes and gives tensors per sample; it shares every parameter, buffer and child."""
    twin = copy.copy(block)
    twin.forward = _PerSample(adapter, types.MethodType(type(block).forward, twin))
    return twin


def check_alone(block: nn.Module, adapter: Adapter, call: Call, samples: int) -> str | None:
    """Why `block` (adapted) does not give the last of `samples` samples of `call` (unpacked) alone what it gave it."""
    leaves = [
        leaf.narrow(dim, samples - 1, 1) if dim is not None else leaf  # type: ignore[attr-defined]
        for leaf, dim in zip(call.leaves, adapter.dims, strict=True)
    ]
    args, kwargs = pytree.tree_unflatten(leaves, call.spec)
    try:
        with undisturbed(block):
            alone = pytree.tree_leaves(block(*args, **kwargs))
    except (RuntimeError, ValueError, IndexError) as error:
        return f"does not run on one sample of a batch: {type(error).__name__}: {error}"
    for value, whole, packing in zip(alone, call.outputs, adapter.outputs, strict=True):
        if packing is not None and not leads(value, whole.narrow(packing.dim, samples - 1, 1)):  # type: ignore[attr-defined]
            return "does not give a sample alone what it gives it in a batch"
    return None


def _split(adapter: Adapter, leaves: Sequence[object], samples: int) -> Any:
    """The tree of a block's arguments with every packed tensor in its parts."""
    parts = []
    for leaf, packing in zip(leaves, adapter.inputs, strict=True):
        split = (leaf,) if packing is None else packing.per_sample(leaf, samples)  # type: ignore[arg-type]
        parts.append(split[0] if len(split) == 1 else split)
    return pytree.tree_unflatten(parts, adapter.spec)


class _PerSample:
    """The forward of an adapted block around the block's own."""

    def __init__(self, adapter: Adapter, forward: Callable[..., Any]) -> None:
        self.adapter, self.inner = adapter, forward

    def __call__(self, *args: object, **kwargs: object) -> Any:
        leaves = pytree.tree_leaves((args, kwargs))
        at, dim = next((at, dim) for at, dim in enumerate(self.adapter.dims) if dim is not None)
        samples = leaves[at].shape[dim]
        own, keywords = pytree.tree_unflatten(list(joined_leaves(self.adapter, leaves)), self.adapter.spec)
        outputs, spec = pytree.tree_flatten(self.inner(*own, **keywords))
        return pytree.tree_unflatten(
            [
                output if packing is None else packing.per_sample(output, samples)[0]
                for output, packing in zip(outputs, self.adapter.outputs, strict=True)
            ],
            spec,
        )


def _one_sample(calls: Sequence[Call]) -> Adapter | str:
    """The adapter of a block whose calls hold the rows (L, D) of one sample."""
    found: set[tuple[tuple[Packing | None, ...], ...]] = set()
    for call in calls:
        streams = _rows(call.leaves) & _rows(call.outputs)
        found.add(tuple(tuple(_whole(leaf, streams) for leaf in side) for side in (call.leaves, call.outputs)))
    if len(found) > 1:
        return "which of its arguments are tokens differs between the given inputs"
    ((inputs, outputs),) = found
    return Adapter(inputs, outputs, calls[0].spec)


def _rows(leaves: Sequence[object]) -> set[torch.Size]:
    tensors = (leaf for leaf in leaves if isinstance(leaf, Tensor))
    return {leaf.shape for leaf in tensors if leaf.ndim == 2 and leaf.shape[0] > 1 and leaf.is_floating_point()}


def _whole(leaf: object, streams: set[torch.Size]) -> Packing | None:
    return Packing(folded=True) if isinstance(leaf, Tensor) and leaf.shape in streams else None


def _packings(
    runs: Sequence[Sequence[object]], batches: Sequence[int], strict: bool = True
) -> tuple[Packing | None, ...] | int:
    """Packing of each leaf of `runs` (None where it holds no batch); the position of the first that has none.

    Not `strict`, leaves that cannot be told hold no batch.
    """
    half = len(batches)
    found: list[Packing | None] = []
    for at, leaf in enumerate(runs[0]):
        told: set[Packing | str | None] = {None}
        if isinstance(leaf, Tensor):
            pairs = zip(runs[:half], runs[half:], batches, strict=True)
            told = {_packing(given[at], doubled[at], batch) for given, doubled, batch in pairs}
        if Packing in map(type, told):  # k may be 1 in some bucket
            folded = any(isinstance(packing, Packing) and packing.folded for packing in told)
            told = {replace(packing, folded=folded) if isinstance(packing, Packing) else packing for packing in told}
        (packing, *others) = told
        if others or isinstance(packing, str):
            if strict:
                return at
            packing = None
        found.append(packing)
    return tuple(found)


def _packing(given: object, doubled: object, batch: int) -> Packing | str | None:
    """How one tensor holds a batch of `batch` samples; a word where it cannot be told."""
    if not isinstance(given, Tensor) or not isinstance(doubled, Tensor) or given.ndim != doubled.ndim:
        return "odd"
    changed = [dim for dim in range(given.ndim) if given.shape[dim] != doubled.shape[dim]]
    if not changed:
        return None
    (dim, *others) = changed
    size, more = given.shape[dim], doubled.shape[dim] - given.shape[dim]
    shared = size - more
    if others or more <= 0 or more % batch or shared < 0:
        return "odd"
    packing = Packing(dim, folded=more > batch, shared=shared)
    if packing.plain:
        return packing
    orders = [packing] if not shared else [packing, replace(packing, leading=True)]
    proven = [order for order in orders if _same_rows(order, given, doubled, batch)]
    return proven[0] if proven else "odd"


def _same_rows(packing: Packing, given: Tensor, doubled: Tensor, batch: int) -> bool:
    (rows, *shared), (more, *kept) = packing.per_sample(given, batch), packing.per_sample(doubled, 2 * batch)
    return leads(rows, more) and all(leads(one, other) for one, other in zip(shared, kept, strict=True))
