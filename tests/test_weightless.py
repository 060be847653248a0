"""A dry run of a model on the meta device says what it says of the model with its weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from typer.testing import CliRunner

import edit_compile
from benchmarks.full_size import measure
from edit_compile.cli import app
from edit_compile.compiling.compiler import CompileError
from edit_compile.loading import UserError, load_model, save_inputs
from passes.graphs.weightless import known_zeros, zeros_for
from passes.observe.discover import discover
from passes.observe.residuals import find_states
from tests.models import tiny_flux
from tests.zoo import CASES

DIM = 8


def bare(tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), tree)


class Block(nn.Module):
    def __init__(self, residual: bool = True) -> None:
        super().__init__()
        self.line, self.residual = nn.Linear(DIM, DIM), residual

    def forward(self, x: Tensor, text: Tensor, time: Tensor) -> Tensor:
        made = F.gelu(self.line(x)) * time[:, None] + text[:, None]
        return x + self.line(made) if self.residual else self.line(x + made)


class Model(nn.Module):
    """Its blocks take a vector that has nothing to do with time, then one that has."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block])
        self.register_buffer("scale", torch.ones(DIM), persistent=False)
        self.chosen = False

    def forward(self, x: Tensor, text: Tensor, timestep: Tensor) -> Tensor:
        if self.chosen and x.sum() > 0:
            x = -x
        vector = (timestep[:, None].cos() * self.scale).contiguous()
        for block in self.blocks:
            x = block(x, text * 2, vector)
        return x


def toy(residual: bool = True) -> tuple[Model, dict[str, Tensor]]:
    model = Model(Block(residual).to("meta"))
    inputs = {"x": torch.randn(2, 5, DIM), "text": torch.randn(2, DIM), "timestep": torch.tensor([0.3, 0.7])}
    return model, inputs


@pytest.mark.parametrize(
    "name", ["FluxTransformer2DModel", pytest.param("QwenImageTransformer2DModel", marks=pytest.mark.slow)]
)
def test_a_model_without_weights_is_reported_as_with_them(name: str) -> None:
    case = CASES[name]()
    dense = edit_compile.compile(edit_compile.elasticize(case.model), inputs=case.inputs, dry_run=True)
    without = edit_compile.elasticize(CASES[name]().model.to("meta"))
    report = edit_compile.compile(without, inputs=bare(case.inputs), dry_run=True)
    assert report.unchecked and not dense.unchecked
    assert (report.blocks, report.router_parameters, report.router_flops) == (
        (dense.blocks, dense.router_parameters, dense.router_flops)
    )
    # A plan's name tells its graph, which holds a copy more or less where attention lays out its result otherwise.
    assert [replace(row, plan="") for row in report.plans] == [replace(row, plan="") for row in dense.plans]
    assert report.refused == dense.refused
    assert all(what in str(report) for what in report.unchecked)
    assert all(parameter.is_meta for parameter in without.routers.parameters())


def test_inputs_are_moved_and_the_model_is_left_as_it_is() -> None:
    model, inputs = toy()
    report = edit_compile.compile(model, inputs=inputs, dry_run=True)
    assert report.blocks == 1
    assert torch.equal(model.scale, torch.ones(DIM))
    assert not inputs["x"].is_meta


def test_the_time_embedding_is_what_is_computed_from_the_timestep() -> None:
    model, inputs = toy()
    discovery, _ = discover(model.to("meta"), bare(inputs))
    assert discovery.blocks[0].time == 2


def test_a_block_that_is_no_residual_is_refused_without_weights_too() -> None:
    model, inputs = toy(residual=False)
    report = edit_compile.compile(model, inputs=inputs, dry_run=True)
    assert report.blocks == 0
    assert any("vanishes with the parameters" in refusal.reason for _, refusal in report.refused)


@pytest.mark.parametrize("residual", [True, False])
def test_states_are_those_that_weights_would_show(residual: bool) -> None:
    model, inputs = toy(residual)
    (site,) = discover(model.to("meta"), bare(inputs))[0].blocks
    (real,) = discover(Model(Block(residual)), inputs)[0].blocks
    assert find_states(site)[0] == find_states(real)[0]


def test_compiling_needs_weights() -> None:
    model, inputs = toy()
    with pytest.raises(CompileError, match="meta device"):
        edit_compile.compile(model, inputs=inputs)


def test_a_model_that_looks_at_its_numbers_says_so() -> None:
    model, inputs = toy()
    model.chosen = True
    with pytest.raises(CompileError, match="cannot be followed without weights"):
        edit_compile.compile(model, inputs=inputs, dry_run=True)


def test_products_of_zeros_are_known_and_others_computed() -> None:
    x, weight, bias = torch.randn(2, 3, 4), torch.zeros(()).expand(5, 4), torch.randn(5)
    q, none = torch.randn(2, 1, 3, 4), torch.zeros(2, 1, 3, 6)
    with known_zeros(Block().to("meta")):
        assert torch.equal(F.linear(x, weight, torch.zeros(5)), torch.zeros(2, 3, 5))
        assert torch.equal(F.linear(x, weight, bias), bias.expand(2, 3, 5))
        assert torch.equal(F.linear(x, torch.eye(4)), x)
        assert torch.equal(F.linear(x, weight=torch.eye(4), bias=None), x)
        assert torch.equal(torch.matmul(x, torch.zeros(4, 6)), torch.zeros(2, 3, 6))
        assert torch.equal(x @ torch.eye(4), x)
        assert torch.equal(F.scaled_dot_product_attention(query=q, key=q, value=none), torch.zeros(2, 1, 3, 6))
        assert F.scaled_dot_product_attention(q, q, value=q).any()


def test_zeros_take_no_memory_and_buffers_hold_something() -> None:
    zeros = zeros_for(nn.BatchNorm1d(1000, device="meta"))
    assert not zeros["weight"].any() and zeros["weight"].untyped_storage().nbytes() == 4
    assert zeros["running_mean"].any() and not zeros["running_mean"].is_meta


def test_the_command_line_takes_a_config_without_weights(tmp_path: Path) -> None:
    model, inputs = tiny_flux(double=1, single=1)
    model.save_config(tmp_path / "flux")
    save_inputs(inputs, tmp_path / "inputs.safetensors")
    arguments = ["compile", str(tmp_path / "flux"), "--inputs", str(tmp_path / "inputs.safetensors"), "--dry-run"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    assert "FluxTransformer2DModel: 2 blocks" in result.output
    assert "a router: " in result.output and "for want of weights" in result.output
    assert not load_model(str(_saved(model, tmp_path / "whole")), bare=True).proj_out.weight.is_meta
    with pytest.raises((UserError, OSError)):
        load_model(str(tmp_path / "flux"))


def _saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parameters", "blocks", "plans"),
    [("FLUX.1-dev", 11.9, {19, 38}, 2), ("Qwen-Image", 20.4, {60}, 1)],
)
def test_full_size_models_are_reported_in_little_memory(
    name: str, parameters: float, blocks: set[int], plans: int
) -> None:
    row = measure(name)
    assert row["parameters"] / 1e9 == pytest.approx(parameters, abs=0.05)
    assert row["blocks"] == sum(blocks)
    assert {plan["blocks"] for plan in row["plans"]} == blocks
    assert len(row["plans"]) == 4 * plans
    assert all(plan["hidden"][0] == 12288 * plan["width"] for plan in row["plans"])
    assert row["router_parameters"] > 18e6 and row["router_flops"] > 0
    assert row["peak_bytes"] < 4 * 2**30
