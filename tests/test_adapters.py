"""Adapters of peft on an elastic model: narrowed like what they adapt, whenever they come and go."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import edit_compile
from edit_compile import ElasticTransformer, RoutingPolicy, elasticize, load_elastic
from edit_compile.compiling.compiler import CompileError
from edit_compile.elastic.layout import ElasticError, Layout
from runtime.bundle.spec import RouterConfig
from tests.conftest import unsettle
from tests.models import randomised, tiny_flux

peft = pytest.importorskip("peft")

CONFIG = RouterConfig(hidden=16)
TARGETS = ["proj_out", "net.2", "net.0.proj", "proj_mlp", "to_q"]
KINDS: dict[str, Any] = {
    "LoRA": peft.LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=TARGETS),
    "DoRA": peft.LoraConfig(r=4, use_dora=True, init_lora_weights=False, target_modules=TARGETS),
    "IA3": peft.IA3Config(target_modules=TARGETS, feedforward_modules=["net.2", "proj_out"], init_ia3_weights=False),
    "OFT": peft.OFTConfig(oft_block_size=4, init_weights=False, target_modules=TARGETS),
}


def model_and_inputs() -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = tiny_flux(double=1, single=1, batch=3)
    return model, {**inputs, "return_dict": False}


def adapt(model: nn.Module, config: Any = KINDS["LoRA"], name: str = "default", seed: int = 5) -> None:
    peft.inject_adapter_in_model(config, model, adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if f".{name}" in key:
                value.add_(torch.randn(value.shape, generator=generator) * 0.1)


def layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "merge") and hasattr(module, "get_base_layer")]


def merged(model: nn.Module) -> nn.Module:
    """A model without adapters that computes the same."""
    twin = copy.deepcopy(model)
    for layer in layers(twin):
        layer.merge()
    named = {name.replace(".base_layer", ""): value for name, value in twin.state_dict().items()}
    plain, _ = model_and_inputs()
    plain.load_state_dict({name: named[name] for name in plain.state_dict()})
    return plain


@functools.cache
def layout() -> Layout:
    """Of the model without adapters."""
    model, inputs = model_and_inputs()
    found = elasticize(model, inputs, config=CONFIG).layout
    assert found is not None
    return found


def laid_out(model: nn.Module) -> ElasticTransformer:
    """`model`, without adapters, made elastic."""
    elastic = elasticize(model, config=CONFIG)
    elastic.attach(layout())
    return elastic.eval()


def elastic_of(model: nn.Module, inputs: dict[str, Any], width: int | None = None) -> ElasticTransformer:
    """Its routers decide differently for each row, or all take width number `width`."""
    torch.manual_seed(0)
    elastic = elasticize(model, inputs, config=CONFIG).eval() if layers(model) else laid_out(model)
    unsettle(elastic)
    if width is not None:
        with torch.no_grad():
            for router in elastic.routers:
                router.open_fully()
                router.width.bias.copy_(torch.eye(4)[width] * 9)
    return elastic


@torch.no_grad()
def output_of(elastic: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return elastic(**inputs)[0]


def check(elastic: ElasticTransformer, inputs: dict[str, Any], twin: nn.Module) -> None:
    """`elastic` gives what `twin`, a model without adapters, gives with the same routers."""
    other = laid_out(twin)
    other.routers.load_state_dict(elastic.routers.state_dict())
    torch.testing.assert_close(output_of(elastic, inputs), output_of(other, inputs), rtol=1e-4, atol=1e-4)
    assert torch.equal(elastic.routing.choice, other.routing.choice)


@pytest.mark.parametrize(
    ("kind", "before"),
    [("LoRA", True), *(pytest.param(kind, False, marks=[] if kind == "LoRA" else pytest.mark.slow) for kind in KINDS)],
)
def test_it_is_narrowed_like_its_merged_self(kind: str, before: bool) -> None:
    model, inputs = model_and_inputs()
    plain = copy.deepcopy(model)
    if before:
        adapt(model, KINDS[kind])
    elastic = elastic_of(model, inputs, width=0)
    if not before:
        output_of(elastic, inputs)
        adapt(model, KINDS[kind])
    assert any("base_layer" in name for name in model.state_dict())
    assert not any("base_layer" in mask.module for block in elastic.layout.blocks for mask in block.masks)
    check(elastic, inputs, merged(model))
    dense = elastic_of(plain, inputs, width=0)
    assert not torch.allclose(output_of(elastic, inputs), output_of(dense, inputs), rtol=1e-2, atol=1e-2)


def test_adapters_come_and_go_and_are_switched() -> None:
    model, inputs = model_and_inputs()
    bare = copy.deepcopy(model)
    elastic = elastic_of(model, inputs)
    alone = output_of(elastic, inputs)
    adapt(model)
    adapt(model, name="second", seed=6)
    for active in (["default"], ["second"], ["default", "second"]):
        for layer in layers(model):
            layer.set_adapter(active)
        check(elastic, inputs, merged(model))
    want = output_of(elastic, inputs)
    for layer in layers(model):
        layer.enable_adapters(False)
    torch.testing.assert_close(output_of(elastic, inputs), alone)
    for layer in layers(model):
        layer.enable_adapters(True)
        layer.merge()
    torch.testing.assert_close(output_of(elastic, inputs), want, rtol=1e-4, atol=1e-4)
    elastic.model = bare  # as it was before: other modules under the same names
    torch.testing.assert_close(output_of(elastic, inputs), alone)


def test_the_model_itself_still_runs_dense_and_keeps_its_names(tmp_path: Any) -> None:
    model, inputs = model_and_inputs()
    elastic = elastic_of(model, inputs)
    names = elastic.router_tensors().keys()
    adapt(model)
    twin = merged(model)
    torch.testing.assert_close(output_of(model, inputs), output_of(twin, inputs), rtol=1e-4, atol=1e-4)
    assert elastic.router_tensors().keys() == names
    elastic.save_pretrained(tmp_path)
    fresh, _ = model_and_inputs()
    with pytest.raises(ElasticError, match=r"lacks proj_out\.bias"):
        load_elastic(tmp_path, copy.deepcopy(fresh))
    adapt(fresh, seed=9)
    again = load_elastic(tmp_path, fresh)
    torch.testing.assert_close(output_of(again, inputs), output_of(elastic, inputs))


def test_gradients_reach_adapters_and_routers_alone() -> None:
    model, inputs = model_and_inputs()
    model.requires_grad_(False)
    adapt(model)
    elastic = elastic_of(model, inputs, width=1).train()
    elastic.enable_gradient_checkpointing()
    elastic(**inputs)[0].square().mean().backward()
    reached = {name for name, value in elastic.named_parameters() if value.grad is not None}
    assert reached == {name for name, value in elastic.named_parameters() if value.requires_grad}
    down = model.single_transformer_blocks[0].proj_out.lora_A["default"].weight.grad
    hidden = down[:, 128:]
    assert hidden[:, : hidden.shape[1] // 2].abs().min() > 0
    assert hidden[:, hidden.shape[1] // 2 :].abs().max() == 0, "channels that are masked have no gradient"


class Doubled(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).relu()


def test_what_is_neither_layer_nor_adapter_is_refused_in_its_place() -> None:
    model, inputs = model_and_inputs()
    elastic = elastic_of(model, inputs)
    block = model.transformer_blocks[0]
    block.ff.net[2] = Doubled(block.ff.net[2])
    with pytest.raises(ElasticError, match=r"transformer_blocks\.0\.ff\.net\.2 is a Doubled now"):
        output_of(elastic, inputs)


@pytest.mark.parametrize("state", ["fused", pytest.param("switched off", marks=pytest.mark.slow), "active"])
def test_what_adds_nothing_is_compiled_through(state: str) -> None:
    model, inputs = model_and_inputs()
    model = randomised(model)
    adapt(model)
    elastic = elastic_of(model, inputs)
    for layer in layers(model):
        if state == "fused":
            layer.merge()
        elif state == "switched off":
            layer.enable_adapters(False)
    settings = {"inputs": inputs, "engine": "torch", "policy": RoutingPolicy(margin=0.0)}
    if state == "active":
        with pytest.raises(CompileError, match="merge the adapter"):
            edit_compile.compile(elastic, **settings)
        return
    compiled = edit_compile.compile(elastic, **settings)
    torch.testing.assert_close(output_of(compiled, inputs), output_of(elastic, inputs), rtol=1e-3, atol=1e-3)
