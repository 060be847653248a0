"""Compiled models that several test files share, made once per session."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import edit_compile
from edit_compile import ElasticTransformer
from edit_compile.compiling.compiler import Tracer
from runtime.bundle.program import Program
from runtime.device import runner
from tests.emulator import Emulator
from tests.models import tiny_dit, tiny_flux, tiny_sd3

WIDTHS = (0.25, 0.5, 0.75, 1.0)

# Which engine is the fastest matters to test_engine_choice alone. A worker keeps to one core; so do its processes.
os.environ["EDIT_COMPILE_ENGINE"] = "onnxruntime"
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


@dataclass(frozen=True)
class Compiled:
    """A model, the keyword arguments it was compiled with, and its program (files are made once, on first use)."""

    model: nn.Module
    inputs: Mapping[str, object]
    program: Program


def compiled_case(model: nn.Module, inputs: Mapping[str, object]) -> Compiled:
    return Compiled(model, inputs, Tracer(model, WIDTHS, None).trace(inputs))


@pytest.fixture(scope="session")
def flux() -> Compiled:
    """An elastic FLUX whose routers decide at random: every action and every width occurs."""
    model, inputs = tiny_flux()
    elastic = edit_compile.elasticize(model, inputs)
    unsettle(elastic)
    return compiled_case(elastic, inputs)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Emulator:
    """What records steps of device dispatch on a CPU, strict as a CUDA graph."""
    emulator = Emulator()
    monkeypatch.setattr(runner, "recorder_for", lambda device: emulator)
    monkeypatch.setattr(runner, "absent", lambda device: None)
    return emulator


@pytest.fixture(scope="session")
def dit() -> Compiled:
    return compiled_case(*tiny_dit())


@pytest.fixture(scope="session")
def sd3() -> Compiled:
    return compiled_case(*tiny_sd3())


def unsettle(elastic: ElasticTransformer, seed: int = 1) -> None:
    """Routers drawn anew, whose gates lie around one half and whose widths differ between rows and steps."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for router in elastic.routers:
            for weight in (parameter for parameter in router.parameters() if parameter.ndim > 1):
                weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[1] ** -0.5)
            for head, scale in ((router.gate, 3.0), (router.width, 6.0)):
                head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * scale)
                head.bias.zero_()
