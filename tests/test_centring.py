"""Centred down-projections: the model stays, and what a width leaves out keeps its mean."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import edit_compile
from edit_compile import ScheduledPolicy, order_channels
from edit_compile.elastic.centring import Centred, centred_linears, exchange
from passes.pipeline import analyse
from passes.program.check import check_equal, masked
from tests.models import noise, tiny_flux
from tests.test_experts import Mixture
from tests.test_experts import case as experts
from tests.test_order_channels import CHAIN, TINY, chain, recorded


def at_width(model: nn.Module, inputs: dict[str, Tensor], width: float) -> Tensor:
    """What the model gives with all its blocks at a width."""
    found = analyse(model, inputs)
    with ExitStack() as masks:
        for index, block in enumerate(found.discovery.blocks):
            sites = found.groups[found.group_of[index]].sites
            masks.enter_context(masked(model.get_submodule(block.name), sites, width))
        output = model(**inputs)
        return output if isinstance(output, Tensor) else output[0]


@torch.no_grad()
def test_a_centred_linear_computes_the_same() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(6, 4, bias=False))
    x, mean = noise(3, 6), noise(6, seed=3)
    expected = [linear(x) for linear in model]
    old = tuple(model)
    made = centred_linears(model, dict.fromkeys(model, mean))
    exchange(model, made)
    assert all(isinstance(module, Centred) for module in model) and model[0].weight is old[0].weight
    for linear, before in zip(model, expected, strict=True):
        torch.testing.assert_close(linear(x), before)
    assert (model[0].in_features, model[0].weight.dtype) == (6, torch.float32)
    exchange(model, {new: linear for linear, new in made.items()})
    assert tuple(model) == old
    assert not centred_linears(nn.Sequential(made[old[0]]), {made[old[0]].linear: mean})
    with pytest.raises(AttributeError, match="nothing"):
        _ = made[old[0]].nothing


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_the_model_stays(name: str, tmp_path: Path) -> None:
    model, inputs = TINY[name]()
    recording, expected = recorded(model, inputs, tmp_path), model(**inputs)
    ordered = order_channels(model, recording, centre=True, timestep="t" if name == "tiny_plain" else None)
    assert all(isinstance(model.get_submodule(mlp.name), Centred) for mlp in ordered)
    check_equal(model(**inputs), expected, "the centred model")
    again = order_channels(model, recording, centre=True, timestep="t" if name == "tiny_plain" else None)
    assert [mlp.name for mlp in again] == [f"{mlp.name}.linear" for mlp in ordered]


@torch.no_grad()
def test_experts_are_centred(tmp_path: Path) -> None:
    given = experts(Mixture())
    recording, expected = recorded(given.model, given.inputs, tmp_path), given.model(**given.inputs)
    order_channels(given.model, recording, centre=True)
    assert isinstance(given.model.layers[0].mixture.experts[0].down, Centred)
    check_equal(given.model(**given.inputs), expected, "the centred model")


@torch.no_grad()
def test_what_is_left_out_keeps_its_mean(tmp_path: Path) -> None:
    model = chain(1)
    recording = recorded(model, CHAIN, tmp_path, calls=2)
    order_channels(model, recording, centre=True)
    calls = [call.arguments for call in recording[0].calls]
    lost = torch.cat([at_width(model, call, 1.0) - at_width(model, call, 0.5) for call in calls])
    assert float(lost.abs().max()) > 1e-2
    assert float(lost.mean((0, 1)).abs().max()) < 1e-5


@torch.no_grad()
def test_compiled_widths_are_those_of_the_centred_model(tmp_path: Path) -> None:
    model, inputs = tiny_flux(double=1, single=1)
    order_channels(model, recorded(model, inputs, tmp_path), centre=True)
    expected = {width: at_width(model, inputs, width) for width in (0.25, 0.5, 1.0)}
    compiled = edit_compile.compile(edit_compile.elasticize(model, inputs), inputs=inputs, engine="torch")
    for width, value in expected.items():
        compiled.policy = ScheduledPolicy([[width, width]], beyond="compute")
        with compiled.request():
            check_equal(compiled(**inputs), (value,), f"width {width}")


@torch.no_grad()
def test_an_elastic_model_masks_behind_the_mean(tmp_path: Path) -> None:
    model, inputs = tiny_flux(double=1, single=1)
    elastic = edit_compile.elasticize(model, inputs).eval()
    expected = elastic(**inputs)
    order_channels(elastic, recorded(model, inputs, tmp_path), centre=True)
    assert elastic.layout is not None
    modules = [mask.module for block in elastic.layout.blocks for mask in block.masks]
    assert modules == ["ff.net.2.linear", "ff_context.net.2.linear", "proj_out.linear"]
    check_equal(elastic(**inputs), expected, "the centred elastic model")
    for router in elastic.routers:
        router.width.weight.zero_()
        router.width.bias.copy_(torch.tensor([9.0, 0.0, 0.0, 0.0]))
    with elastic.detached():
        narrow = at_width(model, inputs, 0.25)
    check_equal(elastic(**inputs), (narrow,), "the elastic model at width 0.25")


@torch.no_grad()
def test_a_centred_elastic_model_is_saved_and_loaded(tmp_path: Path) -> None:
    model, inputs = tiny_flux(double=1, single=1)
    order_channels(model, recorded(model, inputs, tmp_path / "calls"), centre=True)
    elastic = edit_compile.elasticize(model, inputs).eval()
    elastic.save_pretrained(tmp_path / "elastic")
    base, _ = tiny_flux(double=1, single=1, seed=1)
    for given in (None, base, base):  # the last one is centred already
        loaded = edit_compile.load_elastic(tmp_path / "elastic", given)
        assert torch.equal(loaded(**inputs)[0], elastic(**inputs)[0])


@pytest.mark.slow
@torch.no_grad()
def test_what_cannot_be_loaded_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model, inputs = tiny_flux(double=1, single=1)
    order_channels(model, recorded(model, inputs, tmp_path / "calls"), centre=True)
    edit_compile.elasticize(model, inputs).save_pretrained(tmp_path / "elastic")
    other, _ = tiny_flux(double=1, single=1)
    other.x_embedder = nn.Linear(9, 128)
    names = other.state_dict().keys()
    with pytest.raises(edit_compile.ElasticError, match="x_embedder"):
        edit_compile.load_elastic(tmp_path / "elastic", other)
    assert other.state_dict().keys() == names
    other.single_transformer_blocks[0].proj_out = nn.Identity()
    with pytest.raises(edit_compile.ElasticError, match=r"has no module single_transformer_blocks\.0\.proj_out"):
        edit_compile.load_elastic(tmp_path / "elastic", other)
