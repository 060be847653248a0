"""Engines run plans. An engine loads a variant of a plan once and binds it to each block's weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Protocol

import torch
from torch import Tensor

from runtime.base.errors import EngineError
from runtime.bundle.program import Program
from runtime.bundle.spec import Plan, Variant, plan_file


@dataclass(frozen=True)
class Entry:
    """What is known of an engine before it is made; another engine is one entry more in `TABLE`.

    `place` is its class, "module:class", imported when it is made. `file` is the suffix of the plans' files it reads.
    `cpu`: whether it runs on one; else weights are brought to the GPU for it. `movable`: whether it runs on whatever
    device the weights are on, and follows them. `recordable`: whether its work on a GPU can be part of a CUDA graph
    (enqueued on the current stream, the host reads nothing). `built`: whether it runs what `edit-compile build` has
    made of the plans, for one bundle and one GPU; `packed`: with the weights inside.
    """

    name: str
    place: str
    file: str
    cpu: bool = False
    movable: bool = False
    recordable: bool = False
    built: bool = False
    packed: bool = False


_TENSORRT = "runtime.engines.tensorrt.run:TensorRTEngine"

TABLE = {
    entry.name: entry
    for entry in (
        Entry("onnxruntime", "runtime.engines.ort:OnnxRuntimeEngine", "onnx", cpu=True),
        Entry("torch", "runtime.engines.pytorch:TorchEngine", "pt2", cpu=True, movable=True, recordable=True),
        Entry("inductor", "runtime.engines.pytorch:InductorEngine", "pt2", cpu=True, movable=True, recordable=True),
        Entry("onnxruntime-cuda", "runtime.engines.ort:OnnxRuntimeEngine", "onnx"),
        Entry("tensorrt", _TENSORRT, "onnx", recordable=True, built=True),
        # TensorRT-RTX wants to be built for being captured; packed engines would be there once more for each recording
        Entry("tensorrt-rtx", _TENSORRT, "onnx", built=True),
        Entry("tensorrt-packed", _TENSORRT, "onnx", built=True, packed=True),
        Entry("tensorrt-rtx-packed", _TENSORRT, "onnx", built=True, packed=True),
    )
}

NAMES = tuple(name for name, entry in TABLE.items() if not entry.packed)

MOVABLE = tuple(name for name, entry in TABLE.items() if entry.movable)


class Bound(Protocol):
    """A variant of a plan with one block's weights; may be called from several threads."""

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """States after the block, newly allocated, from the plan's inputs (any strides)."""


class Kernel(Protocol):
    """A loaded variant of a plan."""

    def bind(self, weights: Sequence[Tensor], block: str = "") -> Bound:
        """Fix the weights of the block of that name, each already cut to its leading `Variant.rows`, without a copy."""


class Engine:
    """One way to run plans, by its name in `TABLE`; of `program`, where it runs what was built for one."""

    def __init__(self, name: str, program: Program | None = None) -> None:
        self.name = name

    @property
    def recordable(self) -> bool:
        """Whether what it does on a GPU can be part of a CUDA graph."""
        return TABLE[self.name].recordable

    def load(self, plan: Plan, variant: int, files: Mapping[str, bytes]) -> Kernel:
        """Load `plan.variants[variant]`; EngineError where this engine cannot run it."""
        raise NotImplementedError

    def hosting(self, elements: int) -> AbstractContextManager[object]:
        """Entered around all that one guard does on the host, for states of `elements` numbers; most do nothing."""
        return nullcontext()


def make(name: str, program: Program | None = None) -> Engine:
    """The engine called `name`, for the plans of `program` (which those that are built need).

    EngineError if there is none or its library is missing.
    """
    known = entry(name)
    if known.built and program is None:
        raise EngineError(f"engine {name!r} runs the engines of one bundle, which `edit-compile build` makes")
    module, _, kind = known.place.partition(":")
    made: Engine = getattr(import_module(module), kind)(name, program)
    return made


def entry(name: str) -> Entry:
    """What is known of the engine called `name`; EngineError where there is none."""
    if name not in TABLE:
        raise EngineError(f"no engine {name!r}; there are {', '.join(TABLE)}")
    return TABLE[name]


check_name = entry


def placed(name: str, program: Program) -> Program:
    """`program` with its tensors where the engine called `name` runs; EngineError where there is no such device.

    Weights that engines hold themselves stay where they are.
    """
    known = entry(name)
    if known.cpu:
        return program
    if not torch.cuda.is_available():
        raise EngineError(no_gpu(name))
    inside = (
        {key for block in program.manifest.blocks for form in block.forms for key in form.weights}
        if known.packed
        else set()
    )
    weights = {key: tensor if key in inside else tensor.cuda() for key, tensor in program.weights.items()}
    routers = {key: tensor.cuda() for key, tensor in program.routers.items()}
    return replace(program, weights=weights, routers=routers)


def no_gpu(name: str) -> str:
    """What to say where the engine called `name` is to run and there is no GPU."""
    return (
        f"engine {name!r} runs on a GPU, and torch sees none here: engines 'onnxruntime', 'torch' and 'inductor' run "
        "on a CPU"
    )


def plan_bytes(plan: Plan, variant: int, suffix: str, files: Mapping[str, bytes], engine: str) -> bytes:
    """The variant's file; EngineError naming what the program has instead if it is not there."""
    name = plan_file(plan, variant, suffix)
    if name not in files:
        there = sorted({found.rsplit(".", 1)[-1] for found in files if found.startswith(f"plans/{plan.id}-")})
        raise EngineError(f"engine {engine!r} needs {name}; the program holds {there or 'no'} files of this plan")
    return files[name]


def heads(weights: Sequence[Tensor], variant: Variant) -> list[Tensor]:
    """What `variant` reads of a block's `weights`, without a copy."""
    return [_head(weight, rows) for weight, rows in zip(weights, variant.rows, strict=True)]


def _head(weight: Tensor, rows: int) -> Tensor:
    """The leading `rows` of `weight`, which a variant reads, without a copy; a scalar as it is."""
    return weight if weight.dim() == 0 or weight.shape[0] == rows else weight[:rows]
