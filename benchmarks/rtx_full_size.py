"""Engines of one double and one single block of FLUX.1-dev's size, built for RTX GPUs without one.

python -m benchmarks.rtx_full_size    minutes, most of them for tracing in bfloat16; needs edit-compile[tensorrt-rtx]

Random weights. Blocks are traced at a few tokens, since nothing of theirs depends on the number, and built for FLUX's
4,096 image and 512 text tokens. Writes benchmarks/results/rtx_full_size.json.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from rich.console import Console
from rich.table import Table

from edit_compile.compiling.compiler import Tracer
from edit_compile.measuring.machine import describe_machine, summary
from runtime.bundle.program import Program
from runtime.bundle.spec import Plan
from runtime.engines.tensorrt.jobs import jobs, make
from runtime.engines.tensorrt.library import open_library, targets

RESULTS = Path(__file__).parent / "results" / "rtx_full_size.json"
SHAPES = {(4, 6): (64, 512), (6, 10): (64, 512)}
"""Sides of the image and numbers of words: those traced, and those built for."""


@dataclass(frozen=True)
class Row:
    """One engine."""

    kind: str
    weights: str
    width: float
    target: str
    seconds: float
    bytes: int


def model() -> FluxTransformer2DModel:
    """One block of each kind, in bfloat16."""
    with torch.device("meta"):
        empty = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    made = empty.to(torch.bfloat16).to_empty(device="cpu").eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.02)
    return made


def inputs(side: int, text: int) -> dict[str, torch.Tensor]:
    """Keyword arguments of one call."""
    rows, columns = torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)
    return {
        "hidden_states": torch.randn(1, side * side, 64).bfloat16(),
        "encoder_hidden_states": torch.randn(1, text, 4096).bfloat16(),
        "pooled_projections": torch.randn(1, 768).bfloat16(),
        "timestep": torch.tensor([0.7]),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], -1).float(),
        "txt_ids": torch.zeros(text, 3),
    }


def at_full_size(program: Program) -> Program:
    """`program` as if it had been traced at FLUX's tokens."""
    sizes: dict[int | None, int] = {}
    for (side, text), (full_side, full_text) in SHAPES.items():
        sizes |= {side**2: full_side**2, text: full_text, side**2 + text: full_side**2 + full_text}
    plans = tuple(replace(plan, buckets=(_resized(plan, sizes),)) for plan in program.manifest.plans)
    return replace(program, manifest=replace(program.manifest, plans=plans))


def _resized(plan: Plan, sizes: dict[int | None, int]) -> tuple[tuple[int | None, ...], ...]:
    return tuple(
        tuple(sizes.get(size, size) if given.shape[dim] is None else size for dim, size in enumerate(shape))
        for given, shape in zip(plan.inputs, plan.buckets[0], strict=True)
    )


def build_all(program: Program) -> list[Row]:
    """Every width with weights as inputs for two GPUs, and the full width with weights inside for one."""
    library = open_library("tensorrt-rtx")
    every = [*jobs(program, library, targets(library, ["sm_89", "sm_120"]))]
    every += [job for job in jobs(program, library, targets(library, ["sm_120"]), "packed") if job.key.width == 1]
    rows = []
    for job in every:
        started = time.perf_counter()
        engine, _ = make(job, program, library)
        seconds = time.perf_counter() - started
        rows.append(Row(job.plan.kind, job.key.weights, job.key.width, job.target.name, seconds, len(engine)))
    return rows


def main() -> None:
    started = time.perf_counter()
    program = at_full_size(Tracer(model(), (0.25, 0.5, 0.75, 1.0), None).trace([inputs(*shape) for shape in SHAPES]))
    traced = time.perf_counter() - started
    rows = build_all(program)
    machine = describe_machine()
    found: dict[str, Any] = {"machine": machine, "trace_seconds": traced, "rows": [asdict(row) for row in rows]}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    table = Table("block", "weights", "width", "target", "seconds", "bytes", title=f"traced in {traced:.0f} s")
    for row in rows:
        table.add_row(row.kind, row.weights, f"{row.width:g}", row.target, f"{row.seconds:.2f}", f"{row.bytes}")
    table.caption = summary(machine)
    Console().print(table)


if __name__ == "__main__":
    main()
