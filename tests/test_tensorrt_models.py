"""Real models' plans, in the precisions that run on GPUs, built for three of them, with weights shared and packed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from edit_compile.compiling.compiler import Tracer
from edit_compile.elastic.transformer import ElasticTransformer
from examples.fashion_mnist.model import WEIGHTS, load_model
from examples.fashion_mnist.model import inputs as example_inputs
from runtime.bundle.program import Program
from runtime.engines.tensorrt.jobs import jobs, make
from runtime.engines.tensorrt.library import Library, open_library, targets
from tests.conftest import WIDTHS
from tests.models import noise, tiny_flux, tiny_sd3
from tests.test_hunyuan3d import tiny as tiny_hunyuan3d
from tests.zoo import CASES

SMS = ("sm_80", "sm_89", "sm_120")
KEPT = ("ids", "timestep", "t")
"""Arguments that stay in float32 or integers, as pipelines give them."""

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.* has no routers:UserWarning")]


@dataclass(frozen=True)
class BuiltOne:
    """One engine of the sweep."""

    kind: str
    width: float
    weights: str
    target: str
    seconds: float
    bytes: int


def from_zoo(name: str) -> tuple[nn.Module, Mapping[str, Any]]:
    case = CASES[name]()
    return case.model, case.inputs


def hunyuan3d() -> tuple[nn.Module, Mapping[str, Any]]:
    case = tiny_hunyuan3d()
    return case.model, case.inputs


def fashion_mnist() -> tuple[nn.Module, Mapping[str, Any]]:
    if not (WEIGHTS / "elastic").is_dir():
        pytest.skip("needs the trained weights")
    model = load_model("elastic")
    labels = torch.tensor([3, 7])
    return model, example_inputs(noise(2, 49, 16), torch.tensor([0.9, 0.4]), labels)


MODELS: dict[str, Callable[[], tuple[nn.Module, Mapping[str, Any]]]] = {
    "flux": tiny_flux,
    "fashion_mnist": fashion_mnist,
    "sd3": tiny_sd3,
    "qwen_image": lambda: from_zoo("QwenImageTransformer2DModel"),
    "wan": lambda: from_zoo("WanTransformer3DModel"),
    "hunyuan3d": hunyuan3d,
}


def in_precision(name: str, precision: str) -> Program:
    """The program of a model, converted and then compiled."""
    model, given = MODELS[name]()
    dtype = getattr(torch, precision)
    base = model.model if isinstance(model, ElasticTransformer) else model
    base.to(dtype)
    converted = {
        key: value
        if key.endswith(KEPT)
        else pytree.tree_map_only(torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, value)
        for key, value in given.items()
    }
    return Tracer(model, WIDTHS, None).trace(converted)


def sweep(library: Library, program: Program) -> Iterator[BuiltOne]:
    """Every engine of `program`, one after another."""
    for weights in ("shared", "packed"):
        for job in jobs(program, library, targets(library, SMS), weights):
            started = time.perf_counter()
            engine, _ = make(job, program, library)
            seconds = time.perf_counter() - started
            yield BuiltOne(job.plan.kind, job.key.width, weights, job.target.name, seconds, len(engine))


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_every_engine_of_a_model_builds(name: str, precision: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx_cu13 is not installed (see the Makefile)")
    program = in_precision(name, precision)
    built = list(sweep(open_library("tensorrt-rtx"), program))
    manifest = program.manifest
    shared = sum(len(plan.variants) for plan in manifest.plans)
    packed = sum(len(plan.variants) for block in manifest.blocks for plan in manifest.plans if plan.id == block.plan)
    assert len(built) == len(SMS) * (shared + packed)
    assert all(one.bytes > 100_000 for one in built)
