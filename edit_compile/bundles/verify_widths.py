"""Whether an engine computes, at every width of every plan, what the torch engine computes from the same bundle.

Both get the same weights and the same inputs: what guards are given when the glue runs and every block is skipped.

    difference    max (|x'_engine - x'_torch| - 2 eps |x'_torch|): the states' dtype rounds the sum x + f(x) anyway
    scale         max |x'_torch - x|, which is f(x) alone: a large state would hide a small block's mistake

No model is needed, so this is the check for the machine that serves. Where weights are inside the engines, every block
has engines of its own, and all of them are compared; else the first block of each plan stands for its others, which run
the same engines.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from edit_compile.bundles.verify import Check
from runtime.base.errors import EditError, EngineError
from runtime.base.guard import ANY, answering
from runtime.bundle.program import Program
from runtime.bundle.spec import Block, Form, Manifest, Plan
from runtime.calls.bound import BoundBlock, BoundBlocks, glue_graph
from runtime.face import arguments
from runtime.face.transformer import CompiledTransformer

REFERENCE = "torch"


def engine_beside_torch(dtype: torch.dtype) -> str:
    """An engine of a CPU for a bundle of `dtype`: the fastest may be torch, which the others are compared with."""
    return "inductor" if dtype == torch.bfloat16 else "onnxruntime"


@torch.no_grad()
def verify_widths(compiled: CompiledTransformer, inputs: Mapping[str, Any], tolerance: float = 1e-3) -> Iterator[Check]:
    """One check per plan and width, or per block and width where weights are packed; made as they are asked for.

    A plan that the engine cannot run fails its check, with the engine's own words in `Check.told`.

    Args:
        compiled: a loaded bundle.
        inputs: keyword arguments of its forward, on its device.
        tolerance: largest difference allowed, relative to `scale`.

    Raises:
        EngineError: the engine is torch itself, or the bundle lacks a file of either engine.
        EditError: the bundle is hosted, so that its glue cannot be run without the model.
        InputError: the inputs are not those that the bundle was compiled for.
    """
    if compiled.engine == REFERENCE:
        raise EngineError(
            "engine 'torch' is what the others are compared with: name another ('inductor' runs in any precision), or "
            "compare with the model (--model)"
        )
    program = compiled.program
    asked = guard_inputs(program, inputs, compiled.device)
    for block, plan, given in _compared(program.manifest, asked, compiled.engine.endswith("-packed")):
        mine = _alone(program, compiled.engine, block, plan)
        theirs = _alone(_moved(program, block, given[0].device), REFERENCE, block, plan)
        where = f" of {block.name}" if compiled.engine.endswith("-packed") else ""
        for variant, one in enumerate(plan.variants):
            name = f"{plan.kind} {plan.id[:12]}{where} at width {one.width:g}"
            yield _compare(name, mine, theirs, variant, given, tolerance)


def guard_inputs(
    program: Program, inputs: Mapping[str, Any], device: torch.device
) -> dict[int, tuple[Form, list[Tensor]]]:
    """The form and inputs that each guard calls its block with, when the glue runs on `inputs` and all are skipped."""
    manifest = program.manifest
    told = arguments.without_silent(inputs, manifest.arguments, manifest.telling_none)
    tensors, constants = arguments.flatten(told)
    glue = arguments.find_glue(program.manifest.glues, tensors, constants)
    if glue is None:
        raise arguments.explain(program.manifest.glues, tensors, constants)
    if glue.file is None:
        raise EditError("this bundle is hosted by its model: compile the model here, and compare with that")
    arguments.check_device(glue, tensors, device)
    arguments.check_finite(glue, tensors)
    plans = {plan.id: plan for plan in program.manifest.plans}
    seen: dict[int, tuple[Form, list[Tensor]]] = {}

    def answer(block: int, given: Sequence[Tensor], form: int) -> list[Tensor]:
        forms = program.manifest.blocks[block].forms
        shapes = [tensor.shape for tensor in given]
        called = forms[form] if form != ANY else next(one for one in forms if plans[one.plan].takes(shapes))
        seen[block] = called, list(given)
        return [given[at] for at in plans[called.plan].states]

    with answering(answer):
        glue_graph(program, glue, device)(*(tensors[given.name] for given in glue.inputs))
    return seen


def _compared(
    manifest: Manifest, asked: Mapping[int, tuple[Form, list[Tensor]]], packed: bool
) -> Iterator[tuple[Block, Plan, list[Tensor]]]:
    """The blocks to compare, in the form they were called in, with their plan and inputs."""
    plans = {plan.id: plan for plan in manifest.plans}
    told = set()
    for index, (form, given) in asked.items():
        if packed or form.plan not in told:
            told.add(form.plan)
            yield Block(manifest.blocks[index].name, form.plan, form.weights), plans[form.plan], given


def _alone(program: Program, engine: str, block: Block, plan: Plan) -> BoundBlock:
    """`block` on an engine, nothing else loaded."""
    manifest = replace(program.manifest, plans=(plan,), blocks=(block,), router=None)
    (ready,) = BoundBlocks(replace(program, manifest=manifest, routers={}), engine).forms[0]
    return ready


def _moved(program: Program, block: Block, device: torch.device) -> Program:
    """`program` with the weights of `block` on `device`; packed engines leave them on the host."""
    return replace(program, weights={key: program.weights[key].to(device) for key in block.weights})


def _compare(
    name: str, mine: BoundBlock, theirs: BoundBlock, variant: int, given: Sequence[Tensor], tolerance: float
) -> Check:
    expected = theirs.bound[variant](given)
    try:
        found = mine.bound[variant](given)
    except Exception as error:  # what each engine raises for a graph that is not this plan's is its own affair
        return Check(name, float("inf"), 1.0, tolerance, " ".join(str(error).split()))
    excess, scale = 0.0, 0.0
    for at, one, other in zip(mine.states, found, expected, strict=True):
        wide = other.double()
        off = (one.double() - wide).abs() - 2 * torch.finfo(other.dtype).eps * wide.abs()
        excess = float(off.clamp_min(excess).max())  # NaN stays NaN
        scale = max(scale, float((wide - given[at].double()).abs().max()))
    return Check(name, excess, scale, tolerance)
