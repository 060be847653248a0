"""Eager against compiled, and both against what the FLOPs left would allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edit_compile.measuring.comparison import BlockWork, Comparison
from edit_compile.measuring.machine import describe_machine
from edit_compile.measuring.timing import Call, Spread, interleaved
from runtime.bundle.spec import Manifest, Plan
from runtime.face.arguments import find_glue, flatten, without_silent
from runtime.face.transformer import CompiledTransformer
from runtime.requests.trace import COMPUTED, REUSED, SKIPPED, RequestTrace


def benchmark(
    eager: nn.Module,
    compiled: CompiledTransformer,
    inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    steps: int = 28,
    repeats: int = 5,
    warmup: int = 1,
) -> Comparison:
    """Time `eager` and `compiled` on the same denoising steps, interleaved in this process.

    The first of the `warmup` rounds is where engines are built; it is not timed. Every round is a new request of
    `compiled`, so that its bank starts empty, as in production.

    Args:
        eager: the model before compilation, or any callable module that takes the same keyword arguments.
        compiled: what is compared with it; its policy stays as it is, its counters hold the last request afterwards.
        inputs: keyword arguments of one forward (then the timestep falls linearly to its `1 / steps` part over the
            steps), or one mapping per step (then `steps` is their number).
        steps: denoising steps of one request.
        repeats: timed requests.

    FLOPs are those of blocks and glue; the routers' own, which compiled runs besides, show up in its time alone.

    Raises:
        ValueError: no steps or no repeats, or `inputs` without the model's timestep.
    """
    first = inputs if isinstance(inputs, Mapping) else inputs[0]
    with torch.no_grad(), compiled.request():  # by name: the latents given need not be what its outputs make
        compiled(**first)
        program = compiled.program
        assert program is not None
        trajectory = trajectory_of(inputs, steps, program.manifest.timestep)
        runs = {"eager": _calls(eager, trajectory), "compiled": _calls(compiled, trajectory)}
        seconds = interleaved(runs, repeats, warmup, partial(_begin_request, compiled))
    manifest, work = program.manifest, compiled.counters
    return Comparison(
        model=manifest.model,
        engine=compiled.engine,
        dtype=manifest.dtype,
        steps=len(trajectory),
        repeats=repeats,
        eager_ms=Spread.of(seconds["eager"] * 1e3),
        compiled_ms=Spread.of(seconds["compiled"] * 1e3),
        ratio=Spread.of(seconds["eager"].sum(1) / seconds["compiled"].sum(1)),
        dense_flops=work.dense_flops,
        flops=work.flops,
        dense_bytes=weight_bytes(eager),
        resident_bytes=resident_bytes(compiled),
        blocks=block_work(manifest, compiled.trace[-1], row_flops(manifest, first)),
        machine=describe_machine(),
    )


def trajectory_of(
    inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]], steps: int, timestep: str
) -> list[dict[str, Any]]:
    """Keyword arguments of each step; the `timestep` falls from the one given to its `1 / steps` part."""
    if not isinstance(inputs, Mapping):
        return [dict(kwargs) for kwargs in inputs]
    if steps < 1:
        raise ValueError("a benchmark needs at least one step")
    start = inputs.get(timestep)
    if not isinstance(start, Tensor):
        raise ValueError(f"the inputs hold no tensor {timestep!r}, the model's timestep")
    return [{**inputs, timestep: (start * ((steps - step) / steps)).to(start.dtype)} for step in range(steps)]


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones counted once."""
    return _distinct_bytes([*model.parameters(), *model.buffers()])


def resident_bytes(compiled: CompiledTransformer) -> int:
    """Bytes of the weights and routers that `compiled` holds for all widths together."""
    program = compiled.program
    if program is None:
        return 0
    return _distinct_bytes([*program.weights.values(), *program.routers.values()])


def row_flops(manifest: Manifest, kwargs: Mapping[str, Any]) -> dict[tuple[str, int], int]:
    """FLOPs of one row in each (plan id, variant), at the shapes of a call with `kwargs`."""
    told = without_silent(kwargs, manifest.arguments, manifest.telling_none)
    glue = find_glue(manifest.glues, *flatten(told))
    return {} if glue is None else {(cost.plan, cost.variant): cost.flops for cost in glue.costs}


def block_work(manifest: Manifest, trace: RequestTrace, flops: Mapping[tuple[str, int], int]) -> tuple[BlockWork, ...]:
    """What `trace` did with the blocks of each plan; `flops` is the work of a row in (plan id, variant)."""
    columns, used = trace.arrays(), {plan for plan, _ in flops}
    plans = [block.plan_among(used) or block.plan for block in manifest.blocks]
    return tuple(
        _plan_work(plan, [i for i, own in enumerate(plans) if own == plan.id], columns, flops)
        for plan in manifest.plans
        if plan.id in plans
    )


def _plan_work(
    plan: Plan, blocks: Sequence[int], columns: Mapping[str, Any], flops: Mapping[tuple[str, int], int]
) -> BlockWork:
    mine = np.isin(columns["block"], blocks)
    done, width = columns["done"][mine], columns["width"][mine]
    computed = [int((np.isclose(width, v.width) & (done == COMPUTED)).sum()) for v in plan.variants]
    costs = [flops.get((plan.id, index), 0) for index in range(len(plan.variants))]
    return BlockWork(
        kind=plan.kind,
        blocks=len(blocks),
        rows=len(done),
        skipped=int((done == SKIPPED).sum()),
        reused=int((done == REUSED).sum()),
        computed=sum(computed),
        widths={v.width: count for v, count in zip(plan.variants, computed, strict=True) if count},
        flops=sum(cost * count for cost, count in zip(costs, computed, strict=True)),
        dense_flops=costs[-1] * len(done),
    )


def _calls(model: nn.Module, trajectory: Sequence[Mapping[str, Any]]) -> list[Call]:
    return [partial(model, **kwargs) for kwargs in trajectory]


def _begin_request(compiled: CompiledTransformer) -> None:
    compiled._reset_stateful_cache()
    compiled.reset_counters()


def _distinct_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of the tensors' storages, each counted once however many tensors look into it."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
