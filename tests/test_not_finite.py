"""NaN and infinity are said where they arise: the block, step and rows, and whether they are the model's own."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import edit_compile
from edit_compile import CompiledTransformer, EditError, RoutingPolicy, ScheduledPolicy
from runtime.base.errors import NotFiniteError
from runtime.bundle.program import Program
from runtime.calls.finite import all_finite
from tests import programs
from tests.torture.mutations import with_graph

FULL = ScheduledPolicy(np.ones((9, 2)), routed=False)


def damaged(key: str, value: float = float("nan"), at: int | tuple[int, int] = (0, 0)) -> Program:
    program = programs.make(("double", "single"))
    weight = program.weights[key].clone()
    weight[at] = value
    return replace(program, weights={**program.weights, key: weight})


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
@pytest.mark.parametrize(("key", "block"), [("blocks.0.down", "blocks.0"), ("blocks.1.down", "blocks.1")])
def test_a_weight_that_is_not_finite_is_found(engine: str, key: str, block: str) -> None:
    compiled = CompiledTransformer(damaged(key), engine, FULL)
    with pytest.warns(
        RuntimeWarning, match=rf"step 0 gives NaN or infinity from block {block} on \(width 1; rows 0, 1\)"
    ):
        output = compiled(**programs.inputs(2)).sample
    assert output.isnan().any(), "the model itself gives NaN, and so does what stands in its place"


def test_it_is_said_once_in_a_generation_and_again_in_the_next() -> None:
    compiled = CompiledTransformer(damaged("blocks.1.down"), "torch", FULL)
    for _ in range(2):
        with warnings.catch_warnings(record=True) as said, compiled.request():
            warnings.simplefilter("always")
            for step in (1.0, 0.5, 0.25):
                compiled(**programs.inputs(2, timestep=step))
        assert [str(one.message)[:6] for one in said] == ["step 0"]


def test_a_generation_that_follows_in_the_same_thread_is_looked_at_anew() -> None:
    compiled = CompiledTransformer(damaged("blocks.1.down"), "torch", FULL)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for seed in (0, 1):
            for step in (1.0, 0.5):
                compiled(**programs.inputs(2, seed=seed, timestep=step))
            compiled.reset()
    assert sum("NaN or infinity" in str(one.message) for one in said) == 2


def test_a_batch_of_no_rows_is_refused_and_changes_nothing() -> None:
    compiled = CompiledTransformer(programs.make(("double", "single")), "torch", FULL)
    compiled(**programs.inputs(2, timestep=1.0))
    with pytest.raises(edit_compile.InputError, match=r"hidden_states, .* holds no rows: a batch has at least one"):
        compiled(**programs.inputs(0))
    assert len(compiled.trace[-1]) == 4


def test_weights_beside_the_blocks_are_told_apart() -> None:
    compiled = CompiledTransformer(damaged("glue.out"), "torch", FULL)
    with pytest.warns(RuntimeWarning, match="which comes from outside of its blocks"):
        compiled(**programs.inputs(2))


def test_a_router_that_reads_what_is_not_finite_is_not_blamed_alone() -> None:
    always = RoutingPolicy(threshold=0.0, margin=0.0, max_reuse=0)
    compiled = CompiledTransformer(damaged("blocks.0.down"), "torch", always)
    with pytest.raises(NotFiniteError, match=r"router of block blocks\.1 .* arises from block blocks\.0 on"):
        compiled(**programs.inputs(2))
    assert not compiled.trace, "the request is gone"


def narrow_alone(folder: Path) -> CompiledTransformer:
    """A bundle whose single block gives NaN at a quarter of its width."""
    from runtime.bundle import files as bundle

    bundle.save(programs.make(("double", "single")), folder)

    def logarithm(graph: dict) -> None:
        for node in graph["graph_module"]["graph"]["nodes"]:
            node["target"] = node["target"].replace("aten.relu.", "aten.log.")

    with_graph(folder, "plans/single-w025.pt2", logarithm)
    return edit_compile.load(folder, engine="torch")


def test_what_only_a_width_does_is_an_error(tmp_path: Path) -> None:
    compiled = narrow_alone(tmp_path / "model.edit")
    compiled.policy = ScheduledPolicy(np.array([[1.0, 1.0], [1.0, 0.25]]), routed=False)
    with (
        pytest.raises(
            EditError, match=r"step 1 .* from block blocks\.1 on \(width 0\.25; rows 0, 1\).*every block at full"
        ),
        compiled.request(),
    ):
        for step in (1.0, 0.5):
            output = compiled(**programs.inputs(2, timestep=step)).sample
            assert output.isfinite().all()


def test_the_rows_that_are_not_finite_are_named(tmp_path: Path) -> None:
    compiled = narrow_alone(tmp_path / "model.edit")
    compiled.policy = ScheduledPolicy(np.array([[[1.0, 1.0], [1.0, 0.25]]]), routed=False)
    with pytest.raises(NotFiniteError, match=r"\(width 0\.25; rows 1\)"):
        compiled(**programs.inputs(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_sum_that_overflows_alone_is_none(dtype: torch.dtype) -> None:
    large = torch.full((4, 4), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite([large, large])
    assert not all_finite([large, torch.tensor([1.0, float("-inf")]), torch.tensor(3)])
    assert all_finite([torch.tensor([1, 2])])
