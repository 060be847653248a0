"""A block seen per sample, where its tensors hold the batch in another way than one row per sample.

Along one dimension, a tensor of a batch of B samples may have

    B rows              one per sample                                       plain
    k B rows, k > 1     k per sample, those of one sample together           seen as (B, k)
                        k per sample, B apart: the batch k times             seen as (B, k), by strides
    k B + r rows        those of the samples, and r rows that all share      seen as a pair (rows, shared)
    k B + 1 integers    that rise from 0: offsets in the tokens of all       seen as (B, k), from the sample's start

A given run and its doubled run tell which: k = (size(2B) - size(B)) / B and r = 2 size(B) - size(2B). Numbers
decide: the samples' rows of the given run lead those of the doubled run, the shared rows are the same in both. Where
they leave open whether rows are together or apart (masks that all samples share), the block's other tensors say.
k may differ between shape buckets, r may not. Where nothing can be doubled (passes.observe.batch_probe), the model
takes one sample whose tokens are rows (L, D): B = 1, and k = L for whatever a block returns in the shape that it came
in.

An *adapted* block is a shallow copy (parameters and names stay the same objects) whose forward packs what it gets
per sample, calls the block's own forward, and unpacks what that returns. What is adapted must not depend on where
in the batch a sample stands: the last sample of a doubled run, alone, gives what it gave there.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from passes.graphs.batch_layout import Adapter, Packing, part_samples
from passes.graphs.graph import Call, Discovery, Run
from passes.graphs.naming import spoken
from passes.graphs.numbers import TOLERANCE
from passes.graphs.record import record, undisturbed
from passes.graphs.weightless import hollow

_ALLOWED = TOLERANCE["rows"]
_MOST = 3
"""Arguments whose tokens one tensor of offsets may count."""


def leads(small: Tensor, large: Tensor) -> bool:
    """Whether `small` equals the leading part of `large`, as near as rows of a sample must be."""
    if small.ndim != large.ndim or small.dtype != large.dtype:
        return False
    lead = large[tuple(slice(size) for size in small.shape)]
    if lead.shape != small.shape:
        return False
    if hollow(lead, small):
        return True
    if small.dtype not in _ALLOWED or not small.numel():
        return torch.equal(lead, small)
    scale = small.nan_to_num(0, 0, 0).abs().max()
    return torch.allclose(lead, small, rtol=0, atol=float(_ALLOWED[small.dtype] * scale), equal_nan=True)


def leads_in_runs(small: Tensor, large: Tensor, batch: int) -> bool:
    """Whether `small` holds `batch` samples several times, and each of these runs leads that of twice as many."""
    dims = [dim for dim, (size, other) in enumerate(zip(small.shape, large.shape, strict=False)) if size != other]
    if small.ndim != large.ndim or len(dims) != 1:
        return False
    size, more = small.shape[dims[0]], large.shape[dims[0]]
    runs = Packing(dims[0], folded=True, strided=True)
    fits = more == 2 * size and size > batch and size % batch == 0
    return fits and leads(*(runs.per_sample(tensor, n)[0] for tensor, n in ((small, batch), (large, 2 * batch))))


def find_adapter(block: nn.Module, calls: Sequence[Call], runs: Sequence[Run], offsets: bool = False) -> Adapter | str:
    """How the arguments and results of a block hold the batch, or why that cannot be told.

    `calls` are those of the given runs, then those of the doubled ones; so are `runs`. With `offsets`, integers that
    rise from 0 are taken as such.
    """
    half = len(calls) // 2
    batches = [run.batch for run in runs[:half]]
    if lone(runs):
        return _one_sample(calls)
    for at, leaves in enumerate(zip(*(call.leaves for call in calls), strict=True)):
        if len({isinstance(leaf, Tensor) for leaf in leaves}) > 1:
            return (
                f"{spoken(block, calls[0], at)} is a tensor for some of the given inputs only: give all a tensor "
                "(a mask that hides nothing, say), or none"
            )
    inputs = _packings([call.leaves for call in calls], batches, offsets=offsets)
    if isinstance(inputs, int):
        return f"{spoken(block, calls[0], inputs)} does not hold as many rows for each sample in one dimension"
    outputs = _packings([call.outputs for call in calls], batches, strict=False)
    assert not isinstance(outputs, int)
    if any(packing is not None and packing.shared for packing in outputs):
        return "returns rows that all samples share: no sample could skip it alone"
    return _counted(Adapter(inputs, outputs, calls[0].spec), block, calls, [run.batch for run in runs])


def _counted(adapter: Adapter, block: nn.Module, calls: Sequence[Call], batches: Sequence[int]) -> Adapter | str:
    """`adapter` with what its offsets count, by the calls of all runs; or that this cannot be told."""
    places = [at for at, packing in enumerate(adapter.inputs) if packing is not None]
    found = []
    for at in (at for at, packing in enumerate(adapter.inputs) if packing is not None and packing.offsets):
        name = spoken(block, calls[0], at)
        for some in (some for count in range(1, _MOST + 1) for some in combinations(places, count)):
            tokens = (adapter.tokens(some, call.leaves, batch) for call, batch in zip(calls, batches, strict=True))
            offsets: list[Any] = [call.leaves[at] for call in calls]
            if all(map(part_samples, offsets, batches, tokens)):
                found.append((at, name, some))
                break
        else:
            return f"{name} holds offsets, but in no tokens that the block is given: where samples end cannot be told"
    return replace(adapter, counted=tuple(found))


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
            flat = [at for at, leaf in enumerate(call.leaves) if _is_flat(leaf) and adapter.dims[at] is not None]
            names = " or ".join(spoken(block, call, at) for at in flat)
            told = f": {names} may speak of the whole batch (offsets must rise from 0)" if flat else ""
            return f"does not give a sample alone what it gives it in a batch{told}"
    return None


def _is_flat(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim <= 2 and not leaf.is_floating_point()


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
    runs: Sequence[Sequence[object]], batches: Sequence[int], strict: bool = True, offsets: bool = False
) -> tuple[Packing | None, ...] | int:
    """Packing of each leaf of `runs` (None where it holds no batch); the position of the first that has none.

    Not `strict`, leaves that cannot be told hold no batch.
    """
    ways = [_ways(leaves, batches, offsets) for leaves in zip(*runs, strict=True)]
    settled = {one.strided for found in ways if len(found) == 1 for one in found if one is not None and one.folded}
    packings: list[Packing | None] = []
    for at, found in enumerate(ways):
        folded = {one.strided for one in found if one is not None and one.folded}
        if len(folded) > 1 and settled:
            found = [one for one in found if one is not None and one.strided in settled]
            found = found if len(settled) == 1 else []
        if not found and strict:
            return at
        packings.append(found[0] if found else None)
    return tuple(packings)


def _ways(leaves: Sequence[object], batches: Sequence[int], offsets: bool) -> list[Packing | None]:
    """How one leaf may hold the batch, likeliest first, by its values in the given runs, then in the doubled ones."""
    half = len(batches)
    if not isinstance(leaves[0], Tensor):
        return [None]
    told = [_packing(*pair, offsets) for pair in zip(leaves[:half], leaves[half:], batches, strict=True)]
    if any(one is not None and one.folded for found in told for one in found):  # k may be 1 in some bucket
        told = [[order for one in found for order in _orders(one)] for found in told]
    return [one for one in told[0] if all(one in found for found in told[1:])]


def _orders(packing: Packing | None) -> list[Packing | None]:
    """One row per sample, where other runs have several, is together and apart alike."""
    if packing is None or packing.folded or packing.offsets:
        return [packing]
    whole = replace(packing, folded=True)
    return [whole] if packing.shared else [whole, replace(whole, strided=True)]


def _packing(given: object, doubled: object, batch: int, offsets: bool) -> list[Packing | None]:
    """How one tensor may hold a batch of `batch` samples, likeliest first; empty where it cannot be told."""
    if not isinstance(given, Tensor) or not isinstance(doubled, Tensor) or given.ndim != doubled.ndim:
        return []
    changed = [dim for dim in range(given.ndim) if given.shape[dim] != doubled.shape[dim]]
    if not changed:
        return [None]
    (dim, *others) = changed
    size, more = given.shape[dim], doubled.shape[dim] - given.shape[dim]
    shared = size - more
    if others or more <= 0 or more % batch or shared < 0:
        return []
    packing = Packing(dim, folded=more > batch, shared=shared)
    if packing.plain:
        return [packing]
    if offsets and shared == 1 and _are_offsets(given) and _are_offsets(doubled):
        return [Packing(dim, offsets=True)]
    orders = [packing] if not shared else [packing, replace(packing, leading=True)]
    if packing.folded and not shared:
        orders.append(replace(packing, strided=True))
    return [order for order in orders if _same_rows(order, given, doubled, batch)]


def _are_offsets(tensor: Tensor) -> bool:
    """Whether `tensor` holds integers that rise from zero."""
    if tensor.ndim != 1 or tensor.is_floating_point() or tensor.dtype is torch.bool or hollow(tensor):
        return False
    return int(tensor[0]) == 0 and bool((tensor.diff() >= 0).all()) and int(tensor[-1]) > 0


def _same_rows(packing: Packing, given: Tensor, doubled: Tensor, batch: int) -> bool:
    (rows, *shared), (more, *kept) = packing.per_sample(given, batch), packing.per_sample(doubled, 2 * batch)
    return leads(rows, more) and all(leads(one, other) for one, other in zip(shared, kept, strict=True))
