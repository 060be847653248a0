"""Which engines a program needs, and how each is made: the same for a build ahead of time and for one at load."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from runtime.base.errors import EngineError
from runtime.bundle.program import Program
from runtime.bundle.spec import Block, Plan
from runtime.engines import head, plan_bytes
from runtime.engines.tensorrt.build import Report, build
from runtime.engines.tensorrt.cache import Key
from runtime.engines.tensorrt.library import Library, Target
from runtime.engines.tensorrt.profiles import MAX_BATCH, Profile, profiles_of

WEIGHTS = ("shared", "packed")
"""Weights as inputs: one engine per plan and width. Weights inside: one per block and width, and a copy in each."""


@dataclass(frozen=True)
class Job:
    """One engine: a plan at one width for one target; of one block where its weights are packed."""

    plan: Plan
    variant: int
    target: Target
    key: Key
    profiles: tuple[Profile, ...]
    block: Block | None = None


def jobs(
    program: Program, library: Library, targets: Sequence[Target], weights: str = "shared", max_batch: int = MAX_BATCH
) -> Iterator[Job]:
    """Every engine that `program` needs on `targets`; EngineError for an unknown kind of `weights`."""
    if weights not in WEIGHTS:
        raise EngineError(f"weights are {' or '.join(WEIGHTS)}, not {weights!r}")
    for target in targets:
        for plan in program.manifest.plans:
            profiles = profiles_of(plan, max_batch)
            members = [block for block in program.manifest.blocks if block.plan == plan.id]
            for block in members if weights == "packed" else [None]:
                for variant in range(len(plan.variants)):
                    key = key_of(program, library, target, plan, variant, block)
                    yield Job(plan, variant, target, key, profiles, block)


def key_of(
    program: Program, library: Library, target: Target, plan: Plan, variant: int, block: Block | None = None
) -> Key:
    """What an engine has to have been built from and for, to run this."""
    onnx = plan_bytes(plan, variant, "onnx", program.files, library.name)
    return Key(
        library=library.name,
        version=library.version,
        target=target.name,
        capability=target.capability,
        precision=program.manifest.dtype,
        plan=plan.id,
        width=plan.variants[variant].width,
        graph=hashlib.sha256(onnx).hexdigest(),
        weights="shared" if block is None else "packed",
        block="" if block is None else block.name,
        constants="" if block is None else program.manifest.files.get("weights.safetensors", ""),
    )


def make(
    job: Job, program: Program, library: Library, timings: bytes = b"", report: Report | None = None
) -> tuple[bytes, bytes]:
    """The engine of `job` and the timing cache after it (see `runtime.engines.tensorrt.build.build`)."""
    return build(
        library,
        job.target,
        plan_bytes(job.plan, job.variant, "onnx", program.files, library.name),
        job.profiles,
        constants=None if job.block is None else _constants(job.plan, job.variant, job.block, program.weights),
        timings=timings,
        report=report,
    )


def _constants(plan: Plan, variant: int, block: Block, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A block's weights by the plan's names, cut to the rows that the variant reads."""
    named = zip(plan.weights, block.weights, plan.variants[variant].rows, strict=True)
    return {name: head(weights[key], rows) for name, key, rows in named}
