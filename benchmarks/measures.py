"""The figures of a compiled model that are taken the same way on any machine: widths, guards, against torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from edit_compile.measuring.timing import Spread, interleaved
from runtime.base.guard import answering
from runtime.calls.bound import glue_graph
from runtime.face.transformer import CompiledTransformer
from runtime.routing.policy import SKIP
from runtime.routing.schedule import ScheduledPolicy

ROUNDS_PER_REPEAT = 25
"""Steps that skip everything take little and are told apart by less: they are timed that much more often."""


def width_costs(
    model: torch.nn.Module, compiled: CompiledTransformer, inputs: Mapping[str, Any], repeats: int
) -> list[dict[str, float]]:
    """Steps with all blocks at one width and no routers: ms, FLOPs / dense, and the share of what those allow."""
    blocks = len(compiled.program.manifest.blocks)
    policies = {
        width: ScheduledPolicy(np.full((1, blocks), width), routed=False) for width in compiled.program.manifest.widths
    }
    left = {}

    def step(width: float) -> None:
        compiled.policy = policies[width]
        compiled._reset_stateful_cache()
        compiled.reset_counters()
        compiled(**inputs)
        left[width] = compiled.counters.flops / compiled.counters.dense_flops

    calls: dict[Any, list[Any]] = {width: [partial(step, width)] for width in policies}
    calls["eager"] = [partial(model, **inputs)]
    with torch.no_grad():
        seconds = interleaved(calls, repeats)
    median = {name: Spread.of(values).median for name, values in seconds.items()}
    return [
        {
            "width": width,
            "ms": median[width] * 1e3,
            "flops_left": left[width],
            "efficiency": median["eager"] / median[width] * left[width],
        }
        for width in policies
    ]


@dataclass(frozen=True)
class DispatchCost:
    """P3: what a guard costs when its block is skipped, in microseconds.

    `routed_us` with the router, `unrouted_us` without (the guard alone), `glue_ms` the glue with guards that answer at
    once. Each round's glue is taken from the same round's steps, so that a machine that drifts does not show.
    """

    routed_us: float
    unrouted_us: float
    glue_ms: float


def dispatch_cost(compiled: CompiledTransformer, inputs: Mapping[str, Any], repeats: int) -> DispatchCost:
    """Times steps in which every block is skipped, with and without routers, and the glue alone, interleaved."""
    guards = len(compiled.program.manifest.blocks)
    table = np.full((1, guards), SKIP)
    policies = {"routed": ScheduledPolicy(table), "unrouted": ScheduledPolicy(table, routed=False)}

    def skipping(policy: ScheduledPolicy) -> None:
        compiled.policy = policy
        compiled._reset_stateful_cache()
        compiled(**inputs)

    calls = {name: [partial(skipping, policy)] for name, policy in policies.items()}
    calls["glue"] = [glue_alone(compiled, inputs)]
    with torch.no_grad():
        seconds = interleaved(calls, ROUNDS_PER_REPEAT * repeats, warmup=3)
    per_guard = {name: Spread.of(seconds[name] - seconds["glue"]).median / guards * 1e6 for name in policies}
    return DispatchCost(per_guard["routed"], per_guard["unrouted"], Spread.of(seconds["glue"]).median * 1e3)


def against_inductor(
    inductor: Callable[..., Any], compiled: CompiledTransformer, inputs: Mapping[str, Any], repeats: int
) -> dict[str, float]:
    """P6: milliseconds of a dense step, compiled here and by torch.compile (`inductor`)."""
    compiled.policy = ScheduledPolicy(np.ones((1, len(compiled.program.manifest.blocks))), routed=False)

    def dense() -> None:
        compiled._reset_stateful_cache()
        compiled(**inputs)

    with torch.no_grad():
        runs = {"edit_compile": [dense], "torch.compile": [partial(inductor, **inputs)]}
        seconds = interleaved(runs, 2 * repeats, warmup=2)
    median = {f"{name}_ms": Spread.of(values).median * 1e3 for name, values in seconds.items()}
    return median | {"ratio": median["edit_compile_ms"] / median["torch.compile_ms"]}


def plan_counts(compiled: CompiledTransformer) -> dict[str, int]:
    """How many blocks there are, and how many engines they share."""
    manifest = compiled.program.manifest
    return {"blocks": len(manifest.blocks), "engines": sum(len(plan.variants) for plan in manifest.plans)}


def glue_alone(compiled: CompiledTransformer, inputs: Mapping[str, Any]) -> Callable[[], None]:
    """A call of the glue whose guards hand their states back at once."""
    program = compiled.program
    (glue,) = program.manifest.glues
    plans = {plan.id: plan for plan in program.manifest.plans}
    forms = [block.forms for block in program.manifest.blocks]
    graph = glue_graph(program, glue, compiled.device)
    given = [inputs[wanted.name] for wanted in glue.inputs]

    def call() -> None:
        with answering(lambda block, passed, form: [passed[index] for index in plans[forms[block][form].plan].states]):
            graph(*given)

    return call
