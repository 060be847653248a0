"""One class of the zoo compiled and compared with eager: every width, a decision sequence, both engines, routers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from edit_compile.elastic.layout import layout_of
from edit_compile.elastic.transformer import ElasticTransformer
from passes.graphs.graph import Report
from passes.program.check import check_equal
from passes.program.compilation import Compilation
from runtime.bundle.spec import Manifest, RouterConfig
from runtime.face.transformer import CompiledTransformer
from runtime.routing.policy import REUSE, SKIP
from runtime.routing.schedule import ScheduledPolicy
from tests.schedule_oracle import ScheduleOracle
from tests.tracing import Watched
from tests.zoo import CASES, Case

WIDTHS = (0.25, 0.5, 0.75, 1.0)
ENGINES = ("torch", "onnxruntime")


@dataclass(frozen=True)
class Checked:
    """What came out of compiling one class; `seconds` are what the CPU worked on the compilation for both engines."""

    analysis: Compilation
    manifest: Manifest
    reports: tuple[Report, ...]
    seconds: float


def check(name: str, engines: Sequence[str] = ENGINES) -> Checked:
    """Compile the class and compare it with eager; raises where they differ."""
    case = CASES[name]()
    started = time.process_time()
    tracer = Watched(case.model, WIDTHS, case.timestep)
    program = tracer.trace(case.inputs)
    compiled = [CompiledTransformer(program, engine, host=tracer.host) for engine in engines]
    seconds = time.process_time() - started
    assert tracer.analysis is not None
    for one in compiled:
        tracer.prove(one, case.inputs)
        follow_decisions(one, tracer.analysis, case)
    train_routers(case, tracer.analysis)
    return Checked(tracer.analysis, program.manifest, tracer.reports, seconds)


def follow_decisions(compiled: CompiledTransformer, analysis: Compilation, case: Case, steps: int = 4) -> None:
    """A random sequence of skip, reuse and widths gives what the oracle gives, step by step."""
    oracle, blocks = ScheduleOracle(analysis), len(analysis.discovery.blocks)
    table = np.random.default_rng(0).choice([SKIP, REUSE, *WIDTHS], size=(steps, blocks))
    compiled.policy = ScheduledPolicy(table)
    for step, decisions in enumerate(table):
        inputs = _at_step(case, analysis.discovery.timestep, step)
        with compiled.request("one"):
            output = compiled(**inputs)
        check_equal(output, oracle(decisions, inputs), f"step {step} of {decisions.tolist()}")
    with compiled.request("one"):
        compiled.reset()


def train_routers(case: Case, analysis: Compilation) -> None:
    """Fully open routers change nothing, and every router gets a gradient."""
    elastic = ElasticTransformer(case.model, RouterConfig())
    elastic.attach(layout_of(analysis, elastic.router_config.time_dim))
    with torch.no_grad():
        expected = case.model(**_copied(case.inputs))
        check_equal(elastic(**_copied(case.inputs)), expected, "the elastic model with open routers")
    try:
        output = elastic(**_copied(case.inputs))
    except NotImplementedError as error:  # torch's flex attention trains on accelerators only
        assert "backward on CPU" in str(error)
        return
    sum(leaf.square().mean() for leaf in _floats(output)).backward()
    for block, router in zip(analysis.discovery.blocks, elastic.routers, strict=True):
        gradient = router.gate.weight.grad
        assert gradient is not None and bool(torch.isfinite(gradient).all()), f"{block.name}: no gradient"


def _at_step(case: Case, timestep: str, step: int) -> dict[str, Any]:
    """The case's inputs at a later, that is smaller, timestep, with other latents."""
    inputs = _copied(case.inputs)
    given = inputs[timestep]
    inputs[timestep] = (given * 0.8**step).to(given.dtype) if isinstance(given, Tensor) else given * 0.8**step
    return inputs


def _copied(inputs: dict[str, Any]) -> dict[str, Any]:
    return pytree.tree_map_only(Tensor, Tensor.clone, dict(inputs))


def _floats(output: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(tuple(output.values()) if isinstance(output, dict) else output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.requires_grad]
