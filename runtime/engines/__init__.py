"""Engines run plans. An engine loads a variant of a plan once and binds it to each block's weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from runtime.errors import EngineError
from runtime.spec import Plan

NAMES = ("onnxruntime", "torch", "tensorrt")


class Bound(Protocol):
    """A variant of a plan with one block's weights; may be called from several threads."""

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """States after the block, newly allocated, from the plan's inputs (any strides)."""


class Kernel(Protocol):
    """A loaded variant of a plan."""

    def bind(self, weights: Sequence[Tensor]) -> Bound:
        """Fix the weights, each already cut to its leading `Variant.rows`; they are not copied."""


class Engine(Protocol):
    """One way to run plans."""

    name: str

    def load(self, plan: Plan, variant: int, files: Mapping[str, bytes]) -> Kernel:
        """Load `plan.variants[variant]`; EngineError where this engine cannot run it."""

    def hosting(self, elements: int) -> AbstractContextManager[object]:
        """Entered around all that one guard does on the host, for states of `elements` numbers in all."""


def make(name: str) -> Engine:
    """The engine called `name`; EngineError if there is none or its library is missing."""
    if name == "torch":
        from runtime.engines.pytorch import TorchEngine

        return TorchEngine()
    if name == "onnxruntime":
        from runtime.engines.ort import OnnxRuntimeEngine

        return OnnxRuntimeEngine()
    if name == "tensorrt":
        try:
            from runtime.engines.tensorrt import TensorRTEngine  # type: ignore[import-not-found, unused-ignore]
        except ImportError as error:
            raise EngineError(f"the tensorrt engine is not usable here ({error}); use engine='torch'") from error
        engine: Engine = TensorRTEngine()
        return engine
    raise EngineError(f"no engine {name!r}; there are {', '.join(NAMES)}")


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
