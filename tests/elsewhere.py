"""Compiles a toy on a device that this machine does not have: python -m tests.elsewhere

Torch is told of a device without kernels, and the model's tensors are fake ones there: they have shapes and no numbers,
and an operation whose tensors are on two devices is an error, as it is on a GPU. So a tensor that a pass makes on the
host by mistake shows. (Complex tables, as Qwen-Image's, cannot be followed this way.) What passes decide by numbers is
decided by those of the same model on the CPU (its states), or by shapes, as in a dry run without weights.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from benchmarks.configurations import SMALL, Configuration, Place
from edit_compile.compiling.compiler import WIDTHS, Tracer
from passes import block_passes, pipeline
from passes.lowering import lower
from runtime.bundle.program import Program

NAME = "elsewhere"
CPU = Place(torch.device("cpu"), torch.float32)


def compiled(shape: Configuration) -> Program:
    """The program of `shape` on the device that is not there."""
    _setup_privateuseone_for_python_backend(NAME)
    inputs = shape.inputs(CPU)
    states = _states_on_the_cpu(shape, inputs)
    _answer_by_shapes()
    block_passes.find_states = lambda site, others=(): states[site.name]
    mode = FakeTensorMode(shape_env=ShapeEnv())
    model = _moved(shape.model(CPU), mode)
    with mode:
        return Tracer(model, WIDTHS, None).trace(pytree.tree_map_only(Tensor, lambda t: _fake(t, mode), inputs))


def _states_on_the_cpu(shape: Configuration, inputs: dict[str, Any]) -> dict[str, Any]:
    found, find = {}, block_passes.find_states

    def noting(site: Any, others: Any = ()) -> Any:
        found[site.name] = find(site, others)
        return found[site.name]

    block_passes.find_states = noting
    pipeline.analyse(shape.model(CPU), inputs)
    return found


def _answer_by_shapes() -> None:
    """Fake tensors have no numbers either, in whatever pass asks."""

    def hollow(*tensors: Tensor) -> bool:
        return any(tensor.is_meta or isinstance(tensor, FakeTensor) for tensor in tensors)

    answers = {"hollow": hollow, "weightless": lambda module: hollow(*module.parameters())}
    for name, module in list(sys.modules.items()):
        if name.startswith(("passes.", "edit_compile.")):
            for question, answer in answers.items():
                if hasattr(module, question):
                    setattr(module, question, answer)
    lower.weight_stand_ins = _fake_weights


def _fake_weights(graph: Any, variant: int) -> list[Tensor]:
    values = [node.meta["val"] for node in graph.variants[variant].graph.find_nodes(op="placeholder")]
    return [_fake(value, value.fake_mode) for value in values[: len(graph.pieces)]]


def _moved(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """`model` with its parameters and buffers there."""
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = nn.Parameter(_fake(value, mode), requires_grad=False)
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = _fake(value, mode)
    return model


def _fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    with mode:
        return torch.empty(tuple(tensor.shape), dtype=tensor.dtype, device=f"{NAME}:0")


def main() -> None:
    program = compiled(SMALL["flux"])
    sizes = {name: len(data) for name, data in program.files.items()}
    places = sorted({tensor.device.type for tensor in program.weights.values()})
    flops = [cost.flops for glue in program.manifest.glues for cost in glue.costs]
    glues = [[glue.file, glue.flops] for glue in program.manifest.glues]
    print(json.dumps({"places": places, "files": sizes, "flops": flops, "glues": glues}))


if __name__ == "__main__":
    main()
