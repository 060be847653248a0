"""Whether the graphs of a bundle are what its manifest says: each is read, and compared with its plan and weights.

Engines read the files again when they load them. What is refused here is refused before anything runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import fx

from runtime.base.errors import BundleError
from runtime.base.guard import admits, guard
from runtime.bundle import archive
from runtime.bundle.graph_reader import Given
from runtime.bundle.onnx_reader import read_onnx
from runtime.bundle.program import Program
from runtime.bundle.spec import Form, Glue, Plan, plan_file

Named = Sequence[tuple[str, Given]]
"""What a graph takes or gives, in order, each with what it is called in a message."""


def check_graphs(program: Program) -> None:
    """BundleError, naming the file, for a graph that may not be run, or is not what the manifest says."""
    plans = {plan.id: plan for plan in program.manifest.plans}
    forms: dict[str, list[Form]] = {plan: [] for plan in plans}
    for block in program.manifest.blocks:
        for form in block.forms:
            forms[form.plan].append(form)
    for plan in plans.values():
        for suffix in _suffixes(plan, program.files):
            for variant in range(len(plan.variants)):
                _check_plan(plan, variant, suffix, forms[plan.id], program)
    for glue in program.manifest.glues:
        if glue.file is not None:
            _check_glue(glue, plans, program)


def _suffixes(plan: Plan, files: Mapping[str, bytes]) -> list[str]:
    """The formats that `plan` is there in, at every width; BundleError where there is none."""
    found = []
    for suffix in ("pt2", "onnx"):
        names = [plan_file(plan, variant, suffix) for variant in range(len(plan.variants))]
        missing = [name for name in names if name not in files]
        if len(missing) < len(names):
            _need(not missing, missing[0] if missing else "", "is missing, and other widths of its plan are there")
            found.append(suffix)
    _need(bool(found), plan_file(plan, 0, "pt2"), "is missing, and there is no other form of its plan")
    return found


def _check_plan(plan: Plan, variant: int, suffix: str, forms: Iterable[Form], program: Program) -> None:
    name = plan_file(plan, variant, suffix)
    read = _read_pt2 if suffix == "pt2" else _read_onnx
    inputs, outputs = read(name, program.files[name], plan)
    given = [(f"input {one.name}", Given(one.dtype, one.shape)) for one in plan.inputs]
    for form in forms:
        _compare(name, inputs, [*_heads(form, plan, variant, program), *given])
    states = [(f"state {number}", given[index][1]) for number, index in enumerate(plan.states)]
    _compare(name, outputs, states)


def _heads(form: Form, plan: Plan, variant: int, program: Program) -> Iterator[tuple[str, Given]]:
    """What a variant reads of a block's weights."""
    for key, rows in zip(form.weights, plan.variants[variant].rows, strict=True):
        weight = program.weights[key]
        shape = (rows, *weight.shape[1:]) if weight.dim() else ()
        yield f"weight {key}", Given(str(weight.dtype)[6:], shape)


def _read_pt2(name: str, data: bytes, plan: Plan) -> tuple[Sequence[Given | None], Sequence[Given | None]]:
    graph = archive.read(data, name)
    _need(not any(_guards(graph.module)), name, "calls a block inside a block")
    return graph.inputs, graph.outputs


def _read_onnx(name: str, data: bytes, plan: Plan) -> tuple[Sequence[Given | None], Sequence[Given | None]]:
    """In the order of `plan`; None for an input that the graph does not use."""
    graph = read_onnx(data, name)
    names = [*plan.weights, *(one.name for one in plan.inputs)]
    strange = graph.inputs.keys() - set(names)
    _need(not strange, name, f"takes {min(strange, default='')!r}, which its plan does not have")
    states = [f"state_{number}" for number in range(len(plan.states))]
    _need(graph.outputs.keys() == set(states), name, f"gives {', '.join(graph.outputs)}, not {', '.join(states)}")
    return [graph.inputs.get(one) for one in names], [graph.outputs[one] for one in states]


def _check_glue(glue: Glue, plans: Mapping[str, Plan], program: Program) -> None:
    assert glue.file is not None
    graph = archive.read(program.files[glue.file], glue.file)
    weights = [(key, program.weights[key]) for key in glue.weights]
    own = [(f"weight {key}", Given(str(weight.dtype)[6:], tuple(weight.shape))) for key, weight in weights]
    inputs = [(f"input {one.name}", Given(one.dtype.removeprefix("torch."), one.shape)) for one in glue.inputs]
    _compare(glue.file, graph.inputs, [*own, *inputs])
    count = len(glue.outputs) or 1
    _need(len(graph.outputs) == count, glue.file, f"gives {len(graph.outputs)} tensors, not {count}")
    for node in _guards(graph.module):
        _check_guard(glue.file, node, plans, program)


def _check_guard(name: str, node: fx.Node, plans: Mapping[str, Plan], program: Program) -> None:
    given: dict[str, Any] = dict(zip(("inputs", "states", "block", "form"), node.args, strict=False))
    given |= node.kwargs
    block, form = given.get("block"), given.get("form", 0)
    blocks = program.manifest.blocks
    known = type(block) is int and type(form) is int and 0 <= block < len(blocks)
    _need(known, name, f"calls block {block!r} in the form {form!r}, which is not there")
    forms = blocks[block].forms  # type: ignore[index]
    numbers = [number for number in range(len(forms)) if number == form or (form < 0 and admits(form, number))]
    called = [plans[forms[number].plan] for number in numbers]
    where = f"block {blocks[block].name}"  # type: ignore[index]
    _need(bool(called), name, f"calls {where} in the form {form}, which is not there")
    tensors, states = given.get("inputs", ()), tuple(given.get("states", ()))
    _need(
        any(len(tensors) == len(plan.inputs) and states == plan.states for plan in called),
        name,
        f"calls {where} with {len(tensors)} tensors and the states {states}, which its plan does not take",
    )


def _guards(module: fx.GraphModule) -> Iterator[fx.Node]:
    return (node for node in module.graph.nodes if node.target is guard)


def _compare(name: str, has: Sequence[Given | None], wants: Named) -> None:
    """BundleError where what a graph `has` is not what its place `wants`; None is an input that it does not use."""
    _need(len(has) == len(wants), name, f"has {len(has)} inputs or outputs, not {len(wants)}")
    for one, (what, other) in zip(has, wants, strict=True):
        if one is not None and not _fits(one, other):
            _need(False, name, f"has {one.dtype} {_told(one)} in the place of {what}, {other.dtype} {_told(other)}")


def _fits(has: Given, wants: Given) -> bool:
    return (
        has.dtype == wants.dtype
        and len(has.shape) == len(wants.shape)
        and all(a in (None, b) for a, b in zip(has.shape, wants.shape, strict=True))
    )


def _told(given: Given) -> str:
    return "x".join("any" if size is None else str(size) for size in given.shape) or "scalar"


def _need(holds: bool, name: str, told: str) -> None:
    if not holds:
        raise BundleError(f"{name} does not fit manifest.json: it {told}; copy or compile the bundle again")
