"""Engines run plans. An engine loads a variant of a plan once and binds it to each block's weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from runtime.base.errors import EngineError
from runtime.bundle.program import Program
from runtime.bundle.spec import Plan

NAMES = ("onnxruntime", "torch", "inductor", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx")
"""`tensorrt-packed` and `tensorrt-rtx-packed` are the last two with weights inside their engines."""

MOVABLE = ("torch", "inductor")
"""Those that run on whatever device the weights are on, and follow them."""

_TENSORRT = ("tensorrt", "tensorrt-rtx")


class Bound(Protocol):
    """A variant of a plan with one block's weights; may be called from several threads."""

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """States after the block, newly allocated, from the plan's inputs (any strides)."""


class Kernel(Protocol):
    """A loaded variant of a plan."""

    def bind(self, weights: Sequence[Tensor], block: str = "") -> Bound:
        """Fix the weights of the block of that name, each already cut to its leading `Variant.rows`, without a copy."""


class Engine(Protocol):
    """One way to run plans. `recordable`: whether what it does on a GPU can be part of a CUDA graph."""

    name: str
    recordable: bool

    def load(self, plan: Plan, variant: int, files: Mapping[str, bytes]) -> Kernel:
        """Load `plan.variants[variant]`; EngineError where this engine cannot run it."""

    def hosting(self, elements: int) -> AbstractContextManager[object]:
        """Entered around all that one guard does on the host, for states of `elements` numbers in all."""


def make(name: str, program: Program | None = None) -> Engine:
    """The engine called `name`, for the plans of `program` (which those of TensorRT need).

    EngineError if there is none or its library is missing.
    """
    check_name(name)
    if name == "torch":
        from runtime.engines.pytorch import TorchEngine

        return TorchEngine()
    if name == "inductor":
        from runtime.engines.pytorch import InductorEngine

        return InductorEngine()
    if name == "onnxruntime":
        from runtime.engines.ort import OnnxRuntimeEngine

        return OnnxRuntimeEngine()
    if name == "onnxruntime-cuda":
        from runtime.engines.ort_cuda import OnnxRuntimeCudaEngine

        return OnnxRuntimeCudaEngine()
    if program is None:
        raise EngineError(f"engine {name!r} runs the engines of one bundle, which `edit-compile build` makes")
    from runtime.engines.tensorrt.run import TensorRTEngine

    library = name.removesuffix("-packed")
    return TensorRTEngine(library, "shared" if library == name else "packed", program)


def check_name(name: str) -> None:
    """EngineError where there is no engine called `name`."""
    if name not in NAMES and name.removesuffix("-packed") not in _TENSORRT:
        raise EngineError(f"no engine {name!r}; there are {', '.join(NAMES)}; with -packed also the last two")


def placed(name: str, program: Program) -> Program:
    """`program` with its tensors where the engine called `name` runs; EngineError where there is no such device.

    Weights that engines hold themselves stay where they are.
    """
    if name != "onnxruntime-cuda" and name.removesuffix("-packed") not in _TENSORRT:
        return program
    if not torch.cuda.is_available():
        raise EngineError(no_gpu(name))
    packed = name.endswith("-packed")
    inside = {key for block in program.manifest.blocks for key in block.weights} if packed else set()
    weights = {key: tensor if key in inside else tensor.cuda() for key, tensor in program.weights.items()}
    routers = {key: tensor.cuda() for key, tensor in program.routers.items()}
    return replace(program, weights=weights, routers=routers)


def no_gpu(name: str) -> str:
    """What to say where the engine called `name` is to run and there is no GPU."""
    return (
        f"engine {name!r} runs on a GPU, and torch sees none here: engines 'onnxruntime', 'torch' and 'inductor' run "
        "on a CPU"
    )


def plan_file(plan: Plan, variant: int, suffix: str) -> str:
    """Name of a variant's file in the bundle, as in ``plans/<id>-w050.onnx``."""
    return f"plans/{plan.id}-w{round(100 * plan.variants[variant].width):03d}.{suffix}"


def plan_bytes(plan: Plan, variant: int, suffix: str, files: Mapping[str, bytes], engine: str) -> bytes:
    """The variant's file; EngineError naming what the program has instead if it is not there."""
    name = plan_file(plan, variant, suffix)
    if name not in files:
        there = sorted({found.rsplit(".", 1)[-1] for found in files if found.startswith(f"plans/{plan.id}-")})
        raise EngineError(f"engine {engine!r} needs {name}; the program holds {there or 'no'} files of this plan")
    return files[name]


def head(weight: Tensor, rows: int) -> Tensor:
    """The leading `rows` of `weight`, which a variant reads, without a copy; a scalar as it is."""
    return weight if weight.dim() == 0 or weight.shape[0] == rows else weight[:rows]
