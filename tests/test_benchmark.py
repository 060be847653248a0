"""`benchmark`, `verify` and `inspect` on a program made by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from edit_compile.bundles.building import build
from edit_compile.bundles.inspection import dense_flops, describe
from edit_compile.bundles.verify import random_inputs, verify
from edit_compile.measuring.benchmarking import benchmark, resident_bytes, trajectory_of, weight_bytes
from runtime.bundle import files as bundle
from runtime.face.transformer import CompiledTransformer
from runtime.routing.policy import REUSE, SKIP, RoutingPolicy
from runtime.routing.schedule import ScheduledPolicy
from tests import programs

TABLE = [[1.0, SKIP, 0.5], [REUSE, 0.25, 0.5]]


class Dense(nn.Module):
    """The hand-made program with every block computed, as the model it could have come from."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self._inner = (CompiledTransformer(programs.make(seed=seed), "torch", ScheduledPolicy(np.ones((9, 3)))),)

    def forward(self, **kwargs: Any) -> Any:
        self._inner[0]._reset_stateful_cache()
        return self._inner[0](**kwargs)


def compiled(table: Any = TABLE) -> CompiledTransformer:
    return CompiledTransformer(programs.make(), "torch", ScheduledPolicy(np.array(table)))


def test_timesteps_fall_over_the_steps_and_nothing_else_changes() -> None:
    inputs = {"timestep": torch.tensor([1000, 1000]), "x": torch.ones(2)}
    steps = trajectory_of(inputs, 4, "timestep")
    assert [kwargs["timestep"].tolist() for kwargs in steps] == [[1000] * 2, [750] * 2, [500] * 2, [250] * 2]
    assert all(kwargs["x"] is inputs["x"] for kwargs in steps)
    assert trajectory_of([inputs, inputs], 9, "timestep") == [inputs, inputs]


@pytest.mark.parametrize(("inputs", "steps"), [({"x": 1}, 3), ({"timestep": torch.ones(1)}, 0)])
def test_inputs_that_make_no_trajectory_are_refused(inputs: Mapping[str, Any], steps: int) -> None:
    with pytest.raises(ValueError, match="step"):
        trajectory_of(inputs, steps, "timestep")


def test_benchmark_counts_the_work_of_one_request() -> None:
    found = benchmark(Dense(), compiled(), programs.inputs(2), steps=2, repeats=2)
    rows, glue = 2, 10
    assert found.dense_flops == rows * 2 * (glue + 3 * 1000)
    assert found.flops == rows * (2 * glue + (1000 + 500) + (250 + 500))
    assert (found.steps, found.repeats, found.engine, found.eager_ms.count, found.ratio.count) == (2, 2, "torch", 4, 2)
    double, single = found.blocks
    assert (double.kind, double.blocks, double.rows, double.reused, double.widths) == (
        "Double",
        2,
        8,
        2,
        {0.5: 4, 1.0: 2},
    )
    assert (single.skipped, single.computed, single.flops, single.dense_flops) == (2, 2, 500, 4000)


def test_benchmark_leaves_the_policy_alone() -> None:
    model = compiled()
    policy = model.policy
    benchmark(Dense(), model, programs.inputs(), steps=2, repeats=1)
    assert model.policy is policy


def test_weights_shared_between_tensors_are_counted_once() -> None:
    linear = nn.Linear(4, 4, bias=False)
    linear.tied = linear.weight
    assert weight_bytes(linear) == 64
    program = programs.make()
    tensors = [*program.weights.values(), *program.routers.values()]
    assert resident_bytes(CompiledTransformer(program, "torch")) == sum(tensor.nbytes for tensor in tensors)


def test_verify_passes_for_the_model_and_fails_for_another() -> None:
    model = compiled()
    inputs = random_inputs(model.program.manifest)
    assert {name: tuple(t.shape) for name, t in inputs.items()} == {
        name: tuple(t.shape) for name, t in programs.inputs(2).items()
    }
    (good,) = verify(model, Dense(), inputs)
    (bad,) = verify(model, Dense(seed=1), inputs)
    assert good.passed
    assert good.scale > 0
    assert not bad.passed
    assert isinstance(model.policy, ScheduledPolicy)


def test_nan_never_passes() -> None:
    class Nan(nn.Module):
        def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
            return (torch.full_like(hidden_states, float("nan")),)

    assert not verify(compiled(), Nan(), programs.inputs())[0].passed


def test_inspect_tells_kind_plans_widths_and_policy(tmp_path: Path) -> None:
    model = compiled()
    model.policy = RoutingPolicy(margin=0.2)
    model.save(tmp_path / "a.edit")
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(describe(bundle.load(tmp_path / "a.edit").manifest, tmp_path / "a.edit"))
    text = console.export_text()
    for part in (
        "standalone",
        "Synthetic",
        "3 blocks of 2 plans",
        "margin 0.2",
        "0.25, 0.5, 0.75, 1",
        "Double",
        "anyx5x4",
    ):
        assert part in text, part


def test_dense_flops_are_glue_and_every_block_in_full() -> None:
    manifest = programs.make().manifest
    assert dense_flops(manifest, manifest.glues[0]) == 10 + 3 * 1000


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_build_loads_every_plan_at_every_width(tmp_path: Path, engine: str) -> None:
    compiled().save(tmp_path / "a.edit")
    built = build(tmp_path / "a.edit", engine)
    assert [(item.plan, item.width) for item in built] == [
        (p, w) for p in ("double", "single") for w in programs.WIDTHS
    ]
    assert all(item.bytes > 0 for item in built)
