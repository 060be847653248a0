"""Engines built ahead of time with TensorRT-RTX, without a GPU."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from runtime.base.errors import EngineError
from runtime.bundle.spec import Plan, PlanInput
from runtime.engines.tensorrt import library as tensorrt_library
from runtime.engines.tensorrt.build import build
from runtime.engines.tensorrt.jobs import jobs, make, profile_for, profiles_of
from runtime.engines.tensorrt.library import Library, Target, open_library, targets
from tests import programs, tensorrt_cases

SMS = ("sm_80", "sm_89", "sm_120")


@pytest.fixture(scope="module")
def rtx() -> Library:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx_cu13 is not installed (see the Makefile)")
    return open_library("tensorrt-rtx")


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize("weights", ["shared", "packed"])
def test_every_plan_builds_at_every_width_for_every_gpu(rtx: Library, precision: str, weights: str) -> None:
    program = tensorrt_cases.program(precision)
    wanted = list(jobs(program, rtx, targets(rtx, SMS), weights))
    assert len(wanted) == 2 * len(programs.WIDTHS) * len(SMS)
    built = [make(job, program, rtx) for job in wanted]
    assert all(len(engine) > 10_000 for engine, _ in built)
    assert len({engine for engine, _ in built}) == len(wanted), "two targets or widths have the same engine"
    assert not any(timings for _, timings in built), "a timing cache would make TensorRT-RTX look for a GPU"


def test_packed_engines_hold_their_weights(rtx: Library) -> None:
    (target,) = targets(rtx, ["sm_89"])
    onnx, profiles = programs.plan_files()["plans/single-w100.onnx"], profiles_of(programs.SINGLE)
    weights = {name: torch.full((programs.H, programs.D), 1.2345678) for name in ("up", "down")}
    shared, _ = build(rtx, target, onnx, profiles)
    packed, _ = build(rtx, target, onnx, profiles, constants=weights)
    pattern = weights["up"].numpy().tobytes()[:64]
    assert pattern not in shared
    assert pattern in packed


def test_a_bucket_of_shapes_is_a_profile() -> None:
    one = ((None, 5, 8), (None, 3, 8), (None, 6), (5, 8))
    plan = replace(programs.DOUBLE, buckets=(one, ((None, 9, 8), (None, 3, 8), (None, 6), (9, 8))))
    first, second = profiles_of(plan, 3)
    assert [(r.least, r.usual, r.most) for r in first[:1]] == [((1, 5, 8), (1, 5, 8), (3, 5, 8))]
    assert second[3].least == second[3].most == (9, 8)
    shapes = {"hidden": (2, 9, 8), "text": (2, 3, 8), "time": (2, 6), "table": (9, 8)}
    assert profile_for((first, second), shapes) == 1
    with pytest.raises(EngineError, match=r"hidden is \(4, 9, 8\).*--max-batch"):
        profile_for((first, second), shapes | {"hidden": (4, 9, 8)})


def test_two_buckets_build_as_two_profiles(rtx: Library) -> None:
    one = ((None, 5, 8), (None, 3, 8), (None, 6), (5, 8))
    plan = replace(programs.DOUBLE, buckets=(one, ((None, 9, 8), (None, 3, 8), (None, 6), (9, 8))))
    onnx = programs.plan_files()["plans/double-w050.onnx"]
    (target,) = targets(rtx, ["sm_89"])
    both, one_alone = (build(rtx, target, onnx, profiles_of(p))[0] for p in (plan, replace(plan, buckets=(one,))))
    assert len(both) > 1.5 * len(one_alone)


def test_a_bundle_that_does_not_tell_its_buckets_is_refused() -> None:
    free = Plan("p", "P", (PlanInput("x", "float32", (None, None, 8), 0),), (0,), None, (), ())
    with pytest.raises(EngineError, match=r"sizes x of plan p.*compile the model again"):
        profiles_of(free)
    with pytest.raises(EngineError, match="--max-batch is at least 1"):
        profiles_of(programs.SINGLE, 0)


def test_a_build_reports_its_progress(rtx: Library) -> None:
    said: list[tuple[str, int, int]] = []
    (target,) = targets(rtx, ["sm_89"])
    onnx = programs.plan_files()["plans/single-w100.onnx"]
    build(rtx, target, onnx, profiles_of(programs.SINGLE), report=lambda *told: said.append(told))
    assert len({name for name, _, _ in said}) > 1
    assert all(0 <= done <= steps for _, done, steps in said)


def test_what_the_library_refuses_is_told(rtx: Library) -> None:
    (target,) = targets(rtx, ["sm_89"])
    profiles = profiles_of(programs.SINGLE)
    onnx = programs.plan_files()["plans/single-w100.onnx"]
    with pytest.raises(EngineError, match=r"tensorrt-rtx 1\..* does not understand the plan for sm_89: Rulu"):
        build(rtx, target, onnx.replace(b"Relu", b"Rulu"), profiles)
    with pytest.raises(EngineError, match=r"cannot build the plan for sm_75.*b16"):
        old = targets(rtx, ["sm_75"])[0]
        build(rtx, old, tensorrt_cases.plan_files("bfloat16")["plans/single-w100.onnx"], profiles)


@pytest.mark.parametrize("name", ["sm_120", "SM120", "12.0", "120"])
def test_a_target_has_several_spellings(rtx: Library, name: str) -> None:
    assert targets(rtx, [name]) == (Target("sm_120", "12.0"),)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["sm_90"], "does not build for sm_90.*--engine tensorrt on that machine itself"),
        (["sm_70"], "does not build for 'sm_70'; it does for .*sm_80"),
        (["H20"], "does not build for 'H20'"),
        ([], "say which to build for: --target sm_"),
    ],
)
def test_a_target_that_cannot_be_is_refused(
    rtx: Library, asked: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match=said):
        targets(rtx, asked)


def test_tensorrt_builds_for_the_gpu_that_is_here_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library("tensorrt", "11.4.0", None)
    monkeypatch.setattr(tensorrt_library, "gpu_here", lambda: None)
    with pytest.raises(EngineError, match="torch sees none here: copy the bundle"):
        targets(library)
    here = Target("NVIDIA H20", "9.0")
    monkeypatch.setattr(tensorrt_library, "gpu_here", lambda: here)
    assert targets(library) == targets(library, ["sm_90"]) == targets(library, ["NVIDIA H20"]) == (here,)
    with pytest.raises(EngineError, match=r"NVIDIA H20 .*and not for sm_80"):
        targets(library, ["sm_80"])


@pytest.mark.parametrize(
    ("name", "module", "said"),
    [
        ("tensorrt", None, "TensorRT 11 is not installed here.*pip install 'tensorrt>=11'"),
        ("tensorrt-rtx", None, r"TensorRT-RTX is not installed here.*\.\[tensorrt-rtx\]"),
        ("tensorrt", SimpleNamespace(__version__="10.9.0"), "tensorrt 10.9.0 is installed, TensorRT 11 is needed"),
    ],
)
def test_a_library_that_is_missing_or_old_says_how_to_get_it(
    name: str, module: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, tensorrt_library.MODULES[name], module)
    with pytest.raises(EngineError, match=said):
        open_library(name)


def test_tensorrt_itself_keeps_a_timing_cache(rtx: Library) -> None:
    """The other library's branch of `build`, on a stand-in that says what it was asked for."""
    asked: dict[str, Any] = {}
    config = SimpleNamespace(
        clear_flag=lambda flag: None,
        add_optimization_profile=lambda profile: 0,
        create_timing_cache=lambda data: asked.setdefault("cache", data),
        set_timing_cache=lambda cache, ignore_mismatch: asked.update(mismatch=ignore_mismatch),
        get_timing_cache=lambda: SimpleNamespace(serialize=lambda: b"measured"),
    )
    real = rtx.api

    class Builder:
        def __init__(self, logger: Any) -> None:
            self.real = real.Builder(logger)

        def create_network(self, flags: int) -> Any:
            return self.real.create_network(flags)

        def create_builder_config(self) -> Any:
            return config

        def create_optimization_profile(self) -> Any:
            return self.real.create_optimization_profile()

        def build_serialized_network(self, network: Any, config: Any) -> bytes:
            return b"engine"

    names: Mapping[str, Any] = {name: getattr(real, name) for name in dir(real) if not name.startswith("__")}
    library = Library("tensorrt", "11.4.0", SimpleNamespace(**{**names, "Builder": Builder}))
    onnx = programs.plan_files()["plans/single-w100.onnx"]
    made = build(library, Target("GPU", "9.0"), onnx, profiles_of(programs.SINGLE), timings=b"before")
    assert made == (b"engine", b"measured")
    assert asked == {"cache": b"before", "mismatch": False}
