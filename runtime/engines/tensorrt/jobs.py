"""Which engines a program needs, for which shapes, and how each is made: ahead of time as at load.

Rows of a batch are regrouped by what they need, so that a plan is called with any number of rows up to those of the
batch. Every bucket of shapes that the plan was compiled for becomes one profile: its token counts are fixed, which
keeps them consistent with each other and lets kernels be chosen for them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from runtime.base.errors import EngineError
from runtime.bundle.program import Program
from runtime.bundle.spec import Block, Plan
from runtime.engines import heads, plan_bytes
from runtime.engines.tensorrt.build import Report, build
from runtime.engines.tensorrt.library import Library, Target

FOLDER = "engines"

MAX_BATCH = 4
"""Rows that engines take unless told otherwise: two images with both branches of guidance."""


@dataclass(frozen=True)
class Range:
    """Shapes of one input: the smallest, the one to be fastest at, and the largest."""

    name: str
    least: tuple[int, ...]
    usual: tuple[int, ...]
    most: tuple[int, ...]


Profile = tuple[Range, ...]


@dataclass(frozen=True)
class Key:
    """All that decides whether an engine may run.

    `graph` is the sha256 of the plan's ONNX at this width. `weights` is "shared" or "packed"; packed, `block` names the
    block and `constants` is the sha256 of the file that its weights are from.
    """

    library: str
    version: str
    target: str
    capability: str
    precision: str
    plan: str
    width: float
    graph: str
    weights: str
    block: str = ""
    constants: str = ""

    @property
    def place(self) -> str:
        """The engine's file inside the bundle."""
        folder = f"{self.library}-{self.version}-{self.target}-{self.precision}"
        name = f"{self.plan}-w{round(100 * self.width):03d}" + (f"-{self.block}" if self.block else "")
        return f"{FOLDER}/{_as_name(folder)}/{_as_name(name)}.engine"


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
            members = [
                Block(block.name, form.plan, form.weights)
                for block in program.manifest.blocks
                for form in block.forms
                if form.plan == plan.id
            ]
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
    cut = heads([weights[key] for key in block.weights], plan.variants[variant])
    return dict(zip(plan.weights, cut, strict=True))


def profiles_of(plan: Plan, max_batch: int = MAX_BATCH) -> tuple[Profile, ...]:
    """One profile per bucket of `plan`, for 1 to `max_batch` rows and fastest at one.

    EngineError for a plan whose bundle does not tell its buckets, or a `max_batch` below one.
    """
    if max_batch < 1:
        raise EngineError(f"engines for up to {max_batch} rows make no sense: --max-batch is at least 1")
    return tuple(
        tuple(
            Range(given.name, _sized(shape, 1), _sized(shape, 1), _sized(shape, max_batch))
            for given, shape in zip(plan.inputs, bucket, strict=True)
        )
        for bucket in _buckets(plan)
    )


def profile_for(profiles: tuple[Profile, ...], shapes: dict[str, tuple[int, ...]]) -> int:
    """Index of the profile that holds `shapes`; EngineError, naming the first input that does not fit, for none."""
    for index, profile in enumerate(profiles):
        if all(_holds(one, shapes[one.name]) for one in profile):
            return index
    known = {one.name: [p.most for profile in profiles for p in profile if p.name == one.name] for one in profiles[0]}
    wrong = next((name for name, most in known.items() if shapes[name] not in most), next(iter(known)))
    raise EngineError(
        f"{wrong} is {shapes[wrong]}, and engines were built for up to {known[wrong]}: build them with a larger "
        "--max-batch, or compile for these shapes"
    )


def _holds(one: Range, shape: tuple[int, ...]) -> bool:
    return all(low <= size <= high for low, size, high in zip(one.least, shape, one.most, strict=True))


def _buckets(plan: Plan) -> tuple[tuple[tuple[int | None, ...], ...], ...]:
    if plan.buckets:
        return plan.buckets
    for given in plan.inputs:
        if any(size is None and dim != given.batch_dim for dim, size in enumerate(given.shape)):
            raise EngineError(
                f"the bundle does not tell which sizes {given.name} of plan {plan.id} may have: compile the model again"
            )
    return (tuple(given.shape for given in plan.inputs),)


def _sized(shape: tuple[int | None, ...], rows: int) -> tuple[int, ...]:
    return tuple(rows if size is None else size for size in shape)


def _as_name(text: str) -> str:
    """`text` as the name of one file, whatever a manifest or a driver says."""
    return re.sub(r"[^\w.-]", "_", text)
