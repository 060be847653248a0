"""Whether a bundle still computes what its model computes; without the model see `verify_widths`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn

from edit_compile.elastic.transformer import ElasticTransformer
from passes.graphs.numbers import largest
from runtime.bundle.spec import Glue, GlueInput, Manifest
from runtime.face.arguments import unflatten
from runtime.face.output import tensors_of
from runtime.face.transformer import CompiledTransformer
from runtime.requests.trace import RequestTrace
from runtime.routing.policy import RoutingPolicy
from runtime.routing.schedule import ScheduledPolicy

EXAMPLE_ROWS = 2


@dataclass(frozen=True)
class Check:
    """One comparison: `difference` is the largest |bundle - eager|, `scale` the largest |eager|.

    `told` is why nothing could be compared.
    """

    name: str
    difference: float
    scale: float
    tolerance: float
    told: str = ""

    @property
    def relative(self) -> float:
        """`difference` / `scale`."""
        return self.difference / self.scale if self.scale else self.difference

    @property
    def passed(self) -> bool:
        """Whether the relative difference is within the tolerance (never with NaN)."""
        return self.relative <= self.tolerance


def verify(
    compiled: CompiledTransformer, eager: nn.Module, inputs: Mapping[str, Any], tolerance: float = 1e-3
) -> list[Check]:
    """Compare `compiled` with the model it was made from; its policy stays as it is.

    With every block computed at full width it equals the dense model. Where `eager` is elastic, its routers' decisions
    without reuse give what the elastic model gives.
    """
    dense = eager.model if isinstance(eager, ElasticTransformer) else eager
    full = ScheduledPolicy(np.ones((1, len(manifest_of(compiled).blocks))))
    checks = [_check("every block at full width", compiled, full, dense, inputs, tolerance)]
    if isinstance(eager, ElasticTransformer):
        routed = RoutingPolicy(margin=0.0, max_reuse=0)
        checks.append(_check("routed, without reuse", compiled, routed, eager, inputs, tolerance))
    return checks


def table_of(checks: Sequence[Check], title: str = "") -> Table:
    """The checks as a table."""
    table = Table(title=title or None)
    for heading in ("check", "largest difference", "relative", "allowed", ""):
        table.add_column(heading)
    for check in checks:
        numbers = (f"{value:.3g}" for value in (check.difference, check.relative, check.tolerance))
        table.add_row(check.name, *numbers, "passed" if check.passed else f"FAILED {check.told}".rstrip())
    return table


def numbered(checks: Sequence[Sequence[Check]]) -> list[Check]:
    """The checks of several forms of call as one list, in which, if there are several, names say which form it was."""
    if len(checks) == 1:
        return list(checks[0])
    return [
        replace(check, name=f"{check.name}, form {number}")
        for number, each in enumerate(checks, start=1)
        for check in each
    ]


def trace_of(compiled: CompiledTransformer, trajectory: Sequence[Mapping[str, Any]]) -> RequestTrace:
    """The decisions of one request, whose steps are called with the keyword arguments of `trajectory`."""
    with torch.no_grad(), compiled.request():  # by name: the latents given need not be what its outputs make
        for kwargs in trajectory:
            compiled(**kwargs)
    return compiled.trace[-1]


def manifest_of(compiled: CompiledTransformer) -> Manifest:
    """Its manifest; ValueError before the first call of a lazily compiled one."""
    if compiled.program is None:
        raise ValueError("nothing is compiled yet: call the compiled transformer once")
    return compiled.program.manifest


def random_inputs(manifest: Manifest, glue: Glue | None = None, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments with the shapes of `glue` (the first by default): noise; whole numbers are 1, the timestep
    halfway."""
    glue = glue or manifest.glues[0]
    generator = torch.Generator().manual_seed(seed)
    tensors = {given.name: _example(given, given.name == manifest.timestep, generator) for given in glue.inputs}
    return unflatten({**glue.constants, **tensors})


def _example(given: GlueInput, is_timestep: bool, generator: torch.Generator) -> Tensor:
    shape = [EXAMPLE_ROWS if size is None else size for size in given.shape]
    dtype: torch.dtype = getattr(torch, given.dtype.removeprefix("torch."))
    if is_timestep:
        return torch.full(shape, 0.5 if dtype.is_floating_point else 500, dtype=dtype)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.ones(shape, dtype=dtype)


@torch.no_grad()
def _check(
    name: str,
    compiled: CompiledTransformer,
    policy: RoutingPolicy | ScheduledPolicy,
    eager: nn.Module,
    inputs: Mapping[str, Any],
    tolerance: float,
) -> Check:
    try:
        compiled._reset_stateful_cache()
        with compiled.decided_by(policy):
            mine = tensors_of(compiled(**inputs))
    finally:
        compiled._reset_stateful_cache()
    return compared(name, mine, tensors_of(eager(**inputs)), tolerance)


def compared(name: str, mine: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float) -> Check:
    """The tensors of one output beside the model's."""
    if not theirs or [t.shape for t in mine] != [t.shape for t in theirs]:
        return Check(name, float("inf"), 1.0, tolerance)
    difference = largest(float((a.double() - b.double()).abs().max()) for a, b in zip(mine, theirs, strict=True))
    return Check(name, difference, largest(float(tensor.double().abs().max()) for tensor in theirs), tolerance)
