"""Ordered hidden channels: the model computes what it did, and its leading channels are those that matter."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import edit_compile
from edit_compile import CallsError, EditError, OrderError, Recording, order_channels
from edit_compile.calls.repeated_calls import chosen_calls
from edit_compile.widths.channel_statistics import Moments
from passes.pipeline import analyse
from passes.program.check import check_equal, masked
from tests.models import noise, randomised, tiny_dit, tiny_flux, tiny_plain, tiny_sd3
from tests.test_experts import Mixture, Mlp
from tests.test_experts import Model as Experts
from tests.test_experts import case as experts
from tests.zoo import CASES

TINY = {made.__name__: made for made in (tiny_plain, tiny_flux, tiny_dit, tiny_sd3)}
ZOO = ("WanTransformer3DModel", "PriorTransformer", "Lumina2Transformer2DModel", "SanaTransformer2DModel")


def varied(inputs: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The inputs with other latents."""
    name = next(name for name in ("x", "hidden_states") if name in inputs)
    return {**inputs, name: inputs[name] + 0.3 * noise(*inputs[name].shape, seed=seed)}


@torch.no_grad()
def recorded(model: nn.Module, inputs: Mapping[str, Any], folder: Path, calls: int = 3) -> Recording:
    with edit_compile.record(model, folder):
        for seed in range(calls):
            model(**varied(inputs, seed))
    return Recording(folder)


@pytest.mark.parametrize("name", [*TINY, *ZOO])
@torch.no_grad()
def test_the_model_stays_and_its_weights_move(name: str, tmp_path: Path) -> None:
    if name in TINY:
        model, inputs = TINY[name]()
        timestep = "t" if name == "tiny_plain" else None
    else:
        case = CASES[name]()
        model, inputs, timestep = case.model, case.inputs, case.timestep
    recording = recorded(model, inputs, tmp_path)
    expected, before = model(**inputs), {key: value.clone() for key, value in model.state_dict().items()}
    ordered = order_channels(model, recording, timestep=timestep)
    assert ordered and all(mlp.reason is None for mlp in ordered)
    assert all(sorted(mlp.order.tolist()) == list(range(len(mlp.order))) for mlp in ordered)
    assert all(bool((mlp.importance.diff() <= 0).all()) for mlp in ordered)
    for mlp in ordered:
        assert not torch.equal(model.state_dict()[f"{mlp.name}.weight"], before[f"{mlp.name}.weight"])
    check_equal(model(**inputs), expected, "the ordered model")
    assert {key: value.shape for key, value in model.state_dict().items()} == {k: v.shape for k, v in before.items()}


@torch.no_grad()
def test_experts_that_no_token_reached_stay(tmp_path: Path) -> None:
    given = experts(Mixture())
    gate = given.model.layers[0].mixture.gate.scores
    gate.bias.copy_(torch.tensor([0.0, 0.0, 0.0, -1e4]))
    recording, expected = recorded(given.model, given.inputs, tmp_path), given.model(**given.inputs)
    ordered = {mlp.name: mlp for mlp in order_channels(given.model, recording)}
    assert ordered.keys() == {
        f"layers.0.mixture.{name}.down" for name in (*(f"experts.{n}" for n in range(4)), "shared")
    }
    assert [name for name, mlp in ordered.items() if mlp.reason] == ["layers.0.mixture.experts.3.down"]
    assert ordered["layers.0.mixture.experts.3.down"].order.tolist() == list(range(20))
    check_equal(given.model(**given.inputs), expected, "the ordered model")


def chain(depth: int = 2, shared: str = "") -> nn.Module:
    """Blocks of one MLP each, which all share the module, or the parameter, `shared`."""
    model = Experts(*(Mlp() for _ in range(depth)))
    for layer in model.layers[1:]:
        if shared == "mixture":
            layer.mixture = model.layers[0].mixture
        elif shared:
            layer.mixture.get_submodule(shared).weight = model.layers[0].mixture.get_submodule(shared).weight
    return randomised(model)


CHAIN = {"x": noise(2, 5, 8), "timestep": torch.tensor([0.8, 0.3])}


@torch.no_grad()
def test_importance_is_the_variance_times_the_squared_column(tmp_path: Path) -> None:
    model = chain(1)
    generation = recorded(model, CHAIN, tmp_path)[0]
    mlp = model.layers[0].mixture
    entered: list[Tensor] = []
    handle = mlp.down.register_forward_pre_hook(lambda _, args: entered.append(args[0].flatten(0, -2)))
    for call in generation.calls:
        model(**call.arguments)
    handle.remove()
    expected = torch.cat(entered).double().var(0, correction=0) * mlp.down.weight.double().square().sum(0)
    (ordered,) = order_channels(model, [generation])
    torch.testing.assert_close(ordered.importance, expected.sort(descending=True).values, rtol=1e-5, atol=0)
    assert torch.equal(ordered.order, expected.argsort(descending=True))
    before, now = ordered.kept(0.25)
    assert now == pytest.approx(float(ordered.importance[:5].sum() / ordered.importance.sum())) and now > before
    assert ordered.kept(1) == (pytest.approx(1), pytest.approx(1))


@pytest.mark.parametrize(("shared", "count"), [("mixture", 1), ("down", 0), ("", 2)])
@torch.no_grad()
def test_weights_that_blocks_share_are_ordered_once_or_not_at_all(shared: str, count: int, tmp_path: Path) -> None:
    model = chain(2, shared)
    recording, expected = recorded(model, CHAIN, tmp_path), model(**CHAIN)
    ordered = order_channels(model, recording)
    assert sum(mlp.reason is None for mlp in ordered) == count
    assert all("elsewhere" in mlp.reason for mlp in ordered if mlp.reason)
    check_equal(model(**CHAIN), expected, "the ordered model")


class Pair(nn.Module):
    """Two MLPs whose hidden channels enter one linear."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.down = nn.Linear(8, 12), nn.Linear(8, 10), nn.Linear(22, 8)

    def forward(self, x: Tensor) -> Tensor:
        silu = nn.functional.silu
        return self.down(torch.cat([silu(self.one(x)), silu(self.two(x))], -1))


@pytest.mark.parametrize("centre", [False, True])
@torch.no_grad()
def test_two_mlps_of_one_linear_are_ordered_apart(centre: bool, tmp_path: Path) -> None:
    model = randomised(Experts(Pair()))
    recording, expected = recorded(model, CHAIN, tmp_path), model(**CHAIN)
    ordered = order_channels(model, recording, centre=centre)
    assert [(mlp.name, len(mlp.order)) for mlp in ordered] == [("layers.0.mixture.down", size) for size in (12, 10)]
    assert all(bool((mlp.importance.diff() <= 0).all()) and bool(mlp.importance[0] > 0) for mlp in ordered)
    check_equal(model(**CHAIN), expected, "the ordered model")


@torch.no_grad()
def test_an_elastic_model_keeps_its_routers_and_masks(tmp_path: Path) -> None:
    model, inputs = tiny_flux()
    elastic = edit_compile.elasticize(model, inputs).eval()
    layout, expected = elastic.layout, elastic(**inputs)
    recording = recorded(elastic, inputs, tmp_path)
    ordered = order_channels(elastic, recording)
    assert elastic.layout == layout and len(ordered) == 6
    check_equal(elastic(**inputs), expected, "the ordered elastic model")
    assert elastic.routing is not None
    other, _ = tiny_flux()
    order_channels(other, recording)
    for name, value in other.state_dict().items():
        assert torch.equal(elastic.model.state_dict()[name], value), name


@pytest.mark.slow
@torch.no_grad()
def test_narrow_widths_come_nearer(tmp_path: Path) -> None:
    model, inputs = tiny_flux()
    recording, expected = recorded(model, inputs, tmp_path), model(**inputs)[0]

    def error() -> float:
        found = analyse(model, inputs)
        with ExitStack() as masks:
            for index, block in enumerate(found.discovery.blocks):
                sites = found.groups[found.group_of[index]].sites
                masks.enter_context(masked(model.get_submodule(block.name), sites, 0.5))
            return float((model(**inputs)[0] - expected).square().mean())

    before = error()
    order_channels(model, recording)
    assert error() < 0.8 * before


def test_calls_are_spread_over_each_generation(tmp_path: Path) -> None:
    model = chain(1)
    generation = recorded(model, CHAIN, tmp_path, calls=5)[0]
    taken = [said for said, _ in chosen_calls(model, [generation, generation], 3)]
    assert taken == [f"recording[{number}].calls[{place}]" for number in (0, 1) for place in (0, 2, 4)]


def test_moments_are_those_of_all_together() -> None:
    rows, moments = 100 + noise(40, 3), Moments(3)
    for part in rows.split([7, 0, 1, 32]):
        moments.add(part)
    torch.testing.assert_close(moments.variance, rows.double().var(0, correction=0), rtol=1e-4, atol=0)
    torch.testing.assert_close(moments.mean, rows.double().mean(0))


def test_calls_of_another_model_or_shape_are_refused(tmp_path: Path) -> None:
    model, inputs = tiny_flux(double=1, single=1)
    recording = recorded(model, inputs, tmp_path)
    with pytest.raises(CallsError, match="holds calls of FluxTransformer2DModel, the model is a PlainDiT"):
        order_channels(tiny_plain()[0], recording)
    with pytest.raises(CallsError, match=r"does not take the arguments of calls\[0\]"):
        order_channels(tiny_plain()[0], list(recording))
    model.x_embedder = nn.Linear(9, 128)
    with pytest.raises(CallsError, match=r"recording\[0\]\.calls\[0\]: the model fails with its arguments"):
        order_channels(model, recording)
    other, _ = tiny_flux(double=1, single=1)
    other.proj_out = nn.Linear(128, 7)
    with pytest.raises(CallsError, match=r"recording\[0\]\.calls\[0\] gives tensors of shapes \[\(2, 16, 7\)\]"):
        order_channels(other, recording)


@pytest.mark.parametrize("given", [[], 1])
def test_too_few_calls_are_refused(given: list[object] | int, tmp_path: Path) -> None:
    model = chain(1)
    few = [] if given == [] else list(recorded(model, CHAIN, tmp_path, calls=1))
    with pytest.raises(CallsError, match=r"recording: (there is no call|1 call says too little)"):
        order_channels(model, few)


def test_what_is_no_model_to_order_is_refused(tmp_path: Path) -> None:
    model = chain(1)
    recording = recorded(model, CHAIN, tmp_path)
    with pytest.raises(OrderError, match="calls=0"):
        order_channels(model, recording, calls=0)
    compiled = edit_compile.compile(edit_compile.elasticize(chain(1), CHAIN), inputs=CHAIN, engine="torch")
    with pytest.raises(OrderError, match="is compiled"):
        order_channels(compiled, recording)
    with pytest.raises(OrderError, match="no weights"):
        order_channels(chain(1).to("meta"), recording)
    with torch.no_grad():
        model.layers[0].mixture.up.weight[0, 0] = torch.nan
    with pytest.raises(EditError, match=r"the parameter layers\.0\.mixture\.up\.weight holds NaN"):
        order_channels(model, recording)


@torch.no_grad()
def test_an_order_that_changes_the_model_is_undone(tmp_path: Path) -> None:
    class Peeking(nn.Module):
        """Reads a block's hidden channels outside of the block."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = chain(1)

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            return self.inner(x, timestep) + self.inner.layers[0].mixture.up.bias[:8]

    model = randomised(Peeking())
    recording, before = recorded(model, CHAIN, tmp_path), {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(OrderError, match="something else reads its hidden channels; it is as it was"):
        order_channels(model, recording)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
