"""The compiled transformer inside diffusers' pipelines: each makes the latents that it makes with the eager one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import edit_compile
from edit_compile import CompiledTransformer
from runtime.requests.trace import COMPUTED
from tests.pipelines_zoo import PIPELINES, STEPS, Made

QUICK = ("pixart_sigma", "wan", "z_image")
"""Positional arguments and guidance in one batch; two cache contexts; lists, and an attribute outside the config."""

WIDTHS = (1.0,)
"""Without routers nothing is narrowed."""

pytestmark = pytest.mark.filterwarnings("ignore:.* has no routers:UserWarning")


def marks_of(name: str) -> list[pytest.MarkDecorator]:
    return [] if name in QUICK else [pytest.mark.slow]


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks_of(name)) for name in PIPELINES])
def test_a_pipeline_does_not_notice(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    eager, ours = PIPELINES[name](), PIPELINES[name]()
    compiled = compile_within(ours)
    expected = eager.generate(0)
    assert_close(ours.generate(0), expected)  # traces in its course, which begins the request anew
    assert_close(ours.generate(1), eager.generate(1))
    assert_every_step_is_traced(compiled)
    assert not torch.allclose(eager.generate(1), expected, rtol=0.1)
    with monkeypatch.context() as patch, pytest.raises(ArithmeticError, match="in the middle"):
        stop_in_the_middle(ours.pipeline.scheduler, patch)
        ours.generate(1)
    assert_close(ours.generate(0), expected)
    assert_every_step_is_traced(compiled)


def compile_within(made: Made) -> list[CompiledTransformer]:
    """Put compiled transformers, traced when first called, in the place of the pipeline's own."""
    compiled = []
    for part in ("transformer", "transformer_2"):
        model = getattr(made.pipeline, part, None)
        if model is not None:
            compiled.append(edit_compile.compile(model, WIDTHS, engine="torch"))
            setattr(made.pipeline, part, compiled[-1])
    return compiled


def assert_close(value: Tensor, reference: Tensor) -> None:
    assert value.shape == reference.shape
    worst = float((value - reference).abs().max() / reference.abs().max())
    assert worst <= 1e-3, f"differs by {worst:.2g} of the largest value"


def assert_every_step_is_traced(compiled: list[CompiledTransformer]) -> None:
    """One request holds the last image, and every block of it was computed at every step."""
    steps = 0
    for one in compiled:
        last = one.trace[-1]
        grids = [last.grid(context)["done"] for context in last.contexts]
        assert all((grid == COMPUTED).all() for grid in grids)
        steps += len(grids[-1])
    assert steps == STEPS


def stop_in_the_middle(scheduler: Any, patch: pytest.MonkeyPatch) -> None:
    """Let the scheduler's second step raise."""
    step, taken = scheduler.step, []

    def stopped(*args: Any, **kwargs: Any) -> Any:
        taken.append(None)
        if len(taken) == 2:
            raise ArithmeticError("in the middle")
        return step(*args, **kwargs)

    patch.setattr(scheduler, "step", stopped)
