"""Blocks whose code pins the batch run one row per call, and no other blocks do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from passes.blocks.export import ExportError, export_block, weight_values
from passes.graphs.graph import BlockGraph
from passes.observe.discover import discover
from passes.observe.residuals import find_states
from runtime.base.errors import BundleError
from runtime.base.rows import one_row, row_by_row
from runtime.bundle.checks import check
from runtime.face.transformer import CompiledTransformer
from runtime.routing.schedule import ScheduledPolicy
from tests.catalogue import follow_decisions
from tests.models import noise, randomised
from tests.programs import make
from tests.tracing import Watched
from tests.zoo import Case

DIM, HIDDEN = 8, 24
Mix = Callable[[Tensor, Tensor], Tensor]


class Block(nn.Module):
    """An MLP around `mix` of the tokens (batch, tokens, DIM) and a table (tokens, DIM) that all rows share."""

    def __init__(self, mix: Mix) -> None:
        super().__init__()
        self.mix = mix
        self.up, self.down = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM)

    def forward(self, x: Tensor, vector: Tensor, table: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.mix(x, table) + vector[:, None])))


class Model(nn.Module):
    def __init__(self, mix: Mix) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(mix) for _ in range(2))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        table = torch.arange(x.shape[1] * DIM).reshape(-1, DIM).cos()
        for layer in self.layers:
            x = layer(x, timestep[:, None].cos().expand(-1, DIM), table)
        return x


def by_row(x: Tensor, table: Tensor) -> Tensor:
    return torch.stack([row.softmax(0) + table for row in x])


def at_once(x: Tensor, table: Tensor) -> Tensor:
    return x.softmax(1) + table


def by_token(x: Tensor, table: Tensor) -> Tensor:
    return torch.stack([x[:, at] + table[at] for at in range(x.shape[1])], 1)


def inputs(batch: int = 2, tokens: int = 5) -> dict[str, Tensor]:
    return {"x": noise(batch, tokens, DIM), "timestep": torch.linspace(0.9, 0.2, batch)}


@cache
def exported(mix: Mix) -> tuple[BlockGraph, nn.Module, tuple[str, ...]]:
    discovery, _ = discover(randomised(Model(mix)), [inputs(), inputs(tokens=7)])
    site = discovery.blocks[0]
    graph, report = export_block(site, find_states(site)[0], discovery.runs)
    return graph, site.module, report.done


@torch.no_grad()
@pytest.mark.parametrize(("batch", "tokens"), [(1, 4), (3, 6)])
def test_a_loop_over_rows_runs_one_row_per_call(batch: int, tokens: int) -> None:
    graph, block, done = exported(by_row)
    assert graph.row_dims == (0, 0, None)
    assert "one row per call" in done[0]
    given = [noise(batch, tokens, DIM), noise(batch, DIM, seed=1), noise(tokens, DIM, seed=2)]
    (found,) = graph.run(graph.module, weight_values(graph, block), given)
    torch.testing.assert_close(found, block(*given), rtol=1e-5, atol=1e-5)


def test_code_for_any_batch_takes_all_rows_at_once() -> None:
    graph, _, done = exported(at_once)
    assert graph.row_dims is None
    assert "one row per call" not in done[0]


def test_what_pins_more_than_the_batch_is_refused_with_both_reasons() -> None:
    with pytest.raises(ExportError, match=r"fails on run .*nor is there a graph of a row alone"):
        exported(by_token)


@pytest.fixture(scope="module")
def traced() -> Watched:
    tracer = Watched(randomised(Model(by_row)), (0.5, 1.0), None)
    tracer.program = tracer.trace(inputs(3))  # type: ignore[attr-defined]
    return tracer


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_both_engines_follow_decisions_row_by_row(traced: Watched, engine: str) -> None:
    program = traced.program  # type: ignore[attr-defined]
    (plan,) = program.manifest.plans
    assert plan.single_row
    assert [given.shape[0] for given in plan.inputs[:2]] == [1, 1]
    compiled = CompiledTransformer(program, engine)
    traced.prove(compiled, inputs(3))
    assert traced.analysis is not None
    follow_decisions(compiled, traced.analysis, Case(traced.model, inputs(3)))


def test_every_row_is_a_call_that_reads_the_weights(traced: Watched) -> None:
    program = traced.program  # type: ignore[attr-defined]
    compiled = CompiledTransformer(program, "torch", ScheduledPolicy([[1.0, 0.0]]))
    compiled(**inputs(3))
    full = program.manifest.glues[0].costs[-1]
    counters = compiled.counters
    assert (counters.engine_calls, counters.computed, counters.flops) == (3, 3, 3 * full.flops)
    assert counters.bytes == 3 * (full.weight_bytes + full.row_bytes)


def test_rows_are_taken_along_each_inputs_own_dimension() -> None:
    x, y, shared = noise(4, 3, 2), noise(2, 4, seed=1), noise(5, seed=2)
    taken = one_row([x, y, shared], (1, 0, None), 1)
    assert [tuple(tensor.shape) for tensor in taken] == [(4, 1, 2), (1, 4), (5,)]
    x = noise(4, 2, 2)
    sums = row_by_row(lambda row: [row[0] + row[1].sum() + row[2].sum()], [x, y, shared], (1, 0, None), (0,))
    torch.testing.assert_close(sums[0], x + y.sum(1)[None, :, None] + shared.sum())


def test_a_plan_of_one_row_has_rows_in_its_states() -> None:
    program = make()
    plan = program.manifest.plans[0]
    bare = tuple(replace(given, batch_dim=None) for given in plan.inputs)
    plans = (replace(plan, inputs=bare, single_row=True), *program.manifest.plans[1:])
    with pytest.raises(BundleError, match="one row per call"):
        check(replace(program, manifest=replace(program.manifest, plans=plans)))
