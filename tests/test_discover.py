"""Discovery finds blocks in models it has never heard of, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from passes.observe.batch_probe import disturbed, double, other_steps
from passes.observe.discover import DiscoveryError, discover
from tests.models import noise, tiny_dit, tiny_flux, tiny_plain, tiny_sd3

DIM = 8


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([nn.Linear(DIM, DIM), nn.Dropout(0.5)])

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        y = x * vector[:, None]
        for step in self.inner:
            y = step(y)
        return x + y


class Host(nn.Module):
    """Calls each entry of `layers` through `call`."""

    def __init__(self, *layers: nn.Module, call: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.call = call or (lambda layer, x, vector: layer(x, vector))

    def forward(self, x: Tensor, timestep: Tensor, pooled: Tensor | None = None) -> Tensor:
        vector = timestep.reshape(-1, 1).cos().expand(len(x), DIM)
        for layer in self.layers:
            x = self.call(layer, x, vector if pooled is None else pooled)
        return x


def host_inputs(batch: int = 2) -> dict[str, object]:
    return {"x": noise(batch, 5, DIM), "timestep": torch.linspace(0.8, 0.2, batch)}


def reasons(model: nn.Module, inputs: dict[str, object] | None = None) -> dict[str, str]:
    found, report = discover(model, inputs or host_inputs())
    assert found.blocks == ()
    return {refusal.where: refusal.reason for refusal in report.refused}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("make", "names", "time", "batched"),
    [
        (
            tiny_flux,
            [f"{kind}transformer_blocks.{i}" for kind in ("", "single_") for i in (0, 1)],
            2,
            {0: 0, 1: 0, 2: 0},
        ),
        (tiny_dit, [f"transformer_blocks.{i}" for i in range(3)], None, {0: 0, 4: 0, 6: 0}),
        (tiny_sd3, [f"transformer_blocks.{i}" for i in range(3)], 2, {0: 0, 1: 0, 2: 0}),
        (tiny_plain, [f"layers.{i}" for i in range(3)], 2, {0: 0, 1: 0, 2: 0, 3: 0}),
    ],
)
def test_blocks_of_a_transformer(make: Callable, names: list, time: int | None, batched: dict, batch: int) -> None:
    model, inputs = make(batch)
    found, report = discover(model, inputs)
    assert [site.name for site in found.blocks] == names
    assert [run.batch for run in found.runs] == [batch, 2 * batch]
    assert len(report.done) == len(names)
    for site in found.blocks:
        assert site.module is model.get_submodule(site.name)
        assert site.time == time
        assert site.batch_dims == batched


def test_calls_are_what_the_block_computes() -> None:
    found, _ = discover(*tiny_flux())
    for site in found.blocks:
        for call in site.calls:
            args, kwargs = torch.utils._pytree.tree_unflatten(list(call.leaves), call.spec)
            with torch.no_grad():
                again = torch.utils._pytree.tree_leaves(site.module(*args, **kwargs))
            for value, recorded in zip(again, call.outputs, strict=True):
                torch.testing.assert_close(value, recorded, rtol=0, atol=0)


def test_buckets_come_as_given_then_doubled() -> None:
    model, small = tiny_plain(1, tokens=4)
    _, large = tiny_plain(3, tokens=9)
    found, _ = discover(model, [small, large])
    assert found.timestep == "t"
    assert [(run.batch, run.bucket) for run in found.runs] == [(1, 0), (3, 1), (2, 0), (6, 1)]
    shapes = [tuple(call.leaves[0].shape) for call in found.blocks[0].calls]
    assert shapes == [(1, 4, 32), (3, 9, 32), (2, 4, 32), (6, 9, 32)]


def test_first_rows_of_the_doubled_run_are_the_given_ones() -> None:
    found, _ = discover(*tiny_plain(2))
    given, doubled = found.runs
    for name, value in given.kwargs.items():
        torch.testing.assert_close(doubled.kwargs[name][:2], value)
    assert not torch.equal(doubled.kwargs["t"][2:], given.kwargs["t"])
    assert not torch.equal(doubled.kwargs["x"][2:], given.kwargs["x"])
    first, second = (run.outputs[0] for run in found.blocks[-1].calls)
    torch.testing.assert_close(second[:2], first, rtol=1e-5, atol=1e-5)


def test_a_pooled_vector_is_no_time_embedding() -> None:
    found, _ = discover(Host(Residual()), host_inputs() | {"pooled": noise(2, DIM)})
    assert found.blocks[0].batch_dims == {0: 0, 1: 0}
    assert found.blocks[0].time is None


def test_a_timestep_without_a_batch_is_still_time() -> None:
    found, _ = discover(Host(Residual()), host_inputs() | {"timestep": torch.tensor(0.5)})
    assert found.blocks[0].time == 1
    assert [run.batch for run in found.runs] == [2, 4]


def test_flags_and_grad_mode_return() -> None:
    model = Host(Residual(), Residual())
    model.layers[1].eval()
    discover(model, host_inputs())
    assert [module.training for module in model.layers] == [True, False]
    with pytest.raises(TypeError):
        discover(model, host_inputs() | {"unknown": 1})
    assert [module.training for module in model.layers] == [True, False]
    assert torch.is_grad_enabled()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_lists_inside_a_block_are_its_own() -> None:
    found, report = discover(Host(Residual()), host_inputs())
    assert [site.name for site in found.blocks] == ["layers.0"]
    assert report.refused == ()


def test_blocks_inside_an_entry_that_is_no_block() -> None:
    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([Residual(), Residual()])

        def forward(self, x: Tensor, vector: Tensor) -> Tensor:
            for part in self.parts:
                x = part(x, vector)
            return x.repeat(1, 2, 1)

    found, report = discover(Host(Stage(), Stage()), host_inputs())
    assert [site.name for site in found.blocks] == [f"layers.{i}.parts.{j}" for i in (0, 1) for j in (0, 1)]
    assert [refusal.where for refusal in report.refused] == ["layers.0", "layers.1"]


class Projection(Residual):
    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        return super().forward(x, vector)[..., :-1]


class Writer(Residual):
    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        return x.add_(self.inner[0](x * vector[:, None]))


class Scale(nn.Module):
    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        return x * vector[:, None]


def test_decoys_are_refused() -> None:
    assert "no tensor of tokens" in reasons(Host(Projection()))["layers.0"]
    assert "single layer" in reasons(Host(Projection()))["layers.0.inner.0"]
    assert "no parameters" in reasons(Host(Scale()))["layers.0"]
    assert "writes into" in reasons(Host(Writer()))["layers.0"]
    twice = reasons(Host(Residual(), call=lambda layer, x, vector: layer(layer(x, vector), vector)))
    assert "called 2 times" in twice["layers.0"]
    assert "not called" in reasons(Host(Residual(), call=lambda layer, x, vector: x))["layers.0"]


def test_a_list_of_vector_projections_is_refused() -> None:
    def call(layer: nn.Module, x: Tensor, vector: Tensor) -> Tensor:
        return x + layer(vector)[:, None]

    assert "single layer" in reasons(Host(nn.Linear(DIM, DIM), call=call))["layers.0"]


def test_tampered_blocks_are_refused() -> None:
    hooked = Host(Residual())
    hooked.layers[0].inner[0].register_forward_hook(lambda module, args, output: 2 * output)
    assert "inner.0 carries forward hooks" in reasons(hooked)["layers.0"]

    patched = Host(Residual())
    patched.layers[0].forward = patched.layers[0].forward
    assert "forward replaced" in reasons(patched)["layers.0"]


def test_one_refusal_leaves_the_others() -> None:
    found, report = discover(Host(Residual(), Scale(), Residual()), host_inputs())
    assert [site.name for site in found.blocks] == ["layers.0", "layers.2"]
    assert [refusal.where for refusal in report.refused] == ["layers.1"]


def test_a_module_listed_twice_is_called_twice() -> None:
    shared = Residual()
    assert "called 2 times" in reasons(Host(shared, shared))["layers.0"]


def test_rows_that_mix_are_an_error() -> None:
    def call(layer: nn.Module, x: Tensor, vector: Tensor) -> Tensor:
        return layer(x - x.mean(0, keepdim=True), vector)

    with pytest.raises(DiscoveryError, match="rows of one sample changed"):
        discover(Host(Residual(), call=call), host_inputs())


def test_glue_that_writes_into_an_output_is_recorded_as_it_was() -> None:
    def call(layer: nn.Module, x: Tensor, vector: Tensor) -> Tensor:
        return layer(x, vector).mul_(3)

    model = Host(Residual(), call=call)
    inputs = host_inputs()
    found, _ = discover(model, inputs)
    x, vector = found.blocks[0].calls[0].leaves
    with torch.no_grad():
        torch.testing.assert_close(found.blocks[0].calls[0].outputs[0], model.layers[0].eval()(x, vector))


def test_a_size_equal_to_the_batch_by_accident() -> None:
    model, inputs = tiny_flux(batch=4, text=4)
    found, _ = discover(model, inputs)
    assert found.runs[1].kwargs["txt_ids"].shape == (4, 3)
    assert found.runs[1].kwargs["hidden_states"].shape[0] == 8
    assert found.blocks[0].batch_dims == {0: 0, 1: 0, 2: 0}


def test_lists_of_one_entry_per_sample_are_doubled() -> None:
    class Listed(Host):
        def forward(self, x: list[Tensor], timestep: Tensor) -> list[Tensor]:
            return list(super().forward(torch.stack(x), timestep))

    found, _ = discover(Listed(Residual()), {"x": [noise(5, DIM)], "timestep": torch.tensor([0.5])})
    assert found.blocks[0].calls[1].leaves[0].shape == (2, 5, DIM)


def test_the_timestep_must_be_known() -> None:
    class Odd(Host):
        def forward(self, x: Tensor, moment: Tensor) -> Tensor:
            return super().forward(x, moment)

    inputs = {"x": noise(2, 5, DIM), "moment": torch.tensor([0.7, 0.2])}
    with pytest.raises(DiscoveryError, match="timestep="):
        discover(Odd(Residual()), inputs)
    found, _ = discover(Odd(Residual()), inputs, timestep="moment")
    assert found.timestep == "moment"
    assert found.blocks[0].time == 1


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(st.floats(0, 1000, width=32), min_size=1, max_size=4).map(torch.tensor)
    | st.lists(st.integers(0, 999), min_size=1, max_size=4).map(torch.tensor)
    | st.floats(0, 1000, width=32)
    | st.integers(0, 999)
)
def test_other_steps_differ_and_stay_in_range(steps: Tensor | float) -> None:
    other, given_steps = torch.as_tensor(other_steps(steps)), torch.as_tensor(steps)
    assert bool((other != given_steps).all())
    assert bool((other >= 0).all()) and bool((other <= given_steps.clamp_min(1)).all())


@settings(max_examples=40, deadline=None)
@given(batch=st.integers(1, 4), tail=st.lists(st.integers(1, 3), max_size=2))
def test_doubling_keeps_the_given_rows(batch: int, tail: list[int]) -> None:
    value = noise(batch, *tail).abs() + 1
    twice = double({"a": value, "b": [value], "c": "text"}, batch)
    for result in (twice["a"], twice["b"][0]):
        assert result.shape == (2 * batch, *tail)
        assert torch.equal(result[:batch], value)
        assert bool((result[batch:] != value).all())
    assert twice["c"] == "text"
    assert torch.equal(disturbed(torch.tensor([1, 0])), torch.tensor([1, 0]))
