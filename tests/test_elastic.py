"""The elastic model: dense at first, Algorithm 1 without its bank in eval mode, trainable, saved without pickle."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import edit_compile
from edit_compile.elastic.layout import ElasticError
from edit_compile.elastic.storage import load_elastic
from edit_compile.elastic.transformer import ElasticTransformer, elasticize
from runtime.bundle.spec import RouterConfig
from runtime.routing.policy import RoutingPolicy
from tests.models import tiny_dit, tiny_flux, tiny_plain, tiny_sd3

CONFIG = RouterConfig(hidden=16)
MODELS: list[Callable[[], tuple[nn.Module, Any]]] = [tiny_flux, tiny_sd3, tiny_dit]
DOWN_PROJECTIONS = {"ff.net.2": 0, "ff_context.net.2": 0, "proj_out": 128}  # of FLUX: module, first hidden channel


def output_of(model: nn.Module, inputs: Any) -> Tensor:
    return model(**inputs, return_dict=False)[0]


def undecided(elastic: ElasticTransformer, seed: int = 0) -> ElasticTransformer:
    """Routers whose decisions differ between rows and blocks."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for router in elastic.routers:
            for head in (router.gate, router.width):
                head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * 4)
                head.bias.zero_()
    return elastic


def flux_rows(batch: int = 6) -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = tiny_flux(batch=batch)
    return model, dict(inputs)


@pytest.fixture(scope="module")
def made() -> tuple[ElasticTransformer, nn.Module, dict[str, Any]]:
    """An elastic FLUX with undecided routers, an untouched copy of its base, and inputs."""
    model, inputs = flux_rows()
    return undecided(elasticize(copy.deepcopy(model), inputs, config=CONFIG)).eval(), model, inputs


def test_routers_are_drawn_alike_and_leave_random_numbers_alone():
    model, inputs = flux_rows()
    torch.manual_seed(5)
    expected, made = torch.rand(3), []
    for seed in (5, 6):
        torch.manual_seed(seed)
        made.append(elasticize(copy.deepcopy(model), inputs, config=CONFIG))
        if seed == 5:
            assert torch.equal(torch.rand(3), expected)
    one, other = (elastic.routers.state_dict() for elastic in made)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("make", MODELS)
def test_a_new_elastic_model_is_the_dense_one(make):
    model, inputs = make()
    with torch.no_grad():
        dense = output_of(model, inputs)
    elastic = elasticize(copy.deepcopy(model), inputs).eval()
    with torch.no_grad():
        assert torch.equal(output_of(elastic, inputs), dense)
    assert elastic.routing.gate.min() == 1
    assert elastic.routing.width.min() == 1
    elastic.train().model.eval()  # straight-through decisions, without the base model's own dropout
    torch.testing.assert_close(output_of(elastic, inputs), dense, rtol=1e-5, atol=1e-5)


def test_base_model_stays_dense_and_keeps_its_names(made):
    elastic, model, inputs = made
    with torch.no_grad():
        assert torch.equal(output_of(elastic.model, inputs), output_of(model, inputs))
        assert not torch.allclose(output_of(elastic, inputs), output_of(model, inputs))
    assert elastic.model.state_dict().keys() == model.state_dict().keys()


class Reference(nn.Module):
    """A FLUX block run for one row as Algorithm 1 says, by skipping it or by zeroing columns of its weights."""

    def __init__(self, block: nn.Module, router: nn.Module, widths: tuple[float, ...]) -> None:
        super().__init__()
        self.block, self.router, self.widths = block, router, widths
        self.done: list[tuple[bool, float]] = []

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, **kwargs: Any) -> Any:
        assert len(hidden_states) == 1
        gate_logit, width_logits = self.router([encoder_hidden_states, hidden_states], temb)
        width = self.widths[int(width_logits.argmax())]
        runs = torch.sigmoid(gate_logit).item() >= 0.5
        self.done.append((runs, width))
        if not runs:
            return encoder_hidden_states, hidden_states
        narrowed = copy.deepcopy(self.block)
        for name, module in narrowed.named_modules():
            if name in DOWN_PROJECTIONS:
                start = DOWN_PROJECTIONS[name]
                hidden = module.weight.shape[1] - start
                module.weight[:, start + int(width * hidden) :] = 0
        return narrowed(hidden_states, encoder_hidden_states, temb, **kwargs)


@torch.no_grad()
def test_hard_decisions_follow_algorithm_1_row_by_row(made):
    elastic, model, inputs = made
    output = output_of(elastic, inputs)
    gates, widths = elastic.routing.gate, elastic.routing.width
    assert 0 < gates.mean() < 1 and len(widths.unique()) > 1, "decisions should differ for this test to mean anything"
    assert (gates.std(0) > 0).any()
    reference = copy.deepcopy(model)
    blocks: list[Reference] = []
    for blocklist in (reference.transformer_blocks, reference.single_transformer_blocks):
        for index in range(len(blocklist)):
            router = elastic.routers[len(blocks)]
            blocklist[index] = Reference(blocklist[index], router, CONFIG.widths)
            blocks.append(blocklist[index])
    for row in range(len(output)):
        shared = ("img_ids", "txt_ids")
        alone = {name: v if name in shared else v[row : row + 1] for name, v in inputs.items()}
        torch.testing.assert_close(output_of(reference, alone)[0], output[row], rtol=1e-4, atol=1e-4)
        for index, block in enumerate(blocks):
            assert block.done[row] == (bool(gates[row, index]), pytest.approx(float(widths[row, index])))


def test_training_mode_takes_the_same_decisions_and_reaches_every_parameter(made):
    elastic, _, inputs = made
    trained = copy.deepcopy(elastic).train()
    with torch.no_grad():
        hard = output_of(elastic, inputs)
    soft = output_of(trained, inputs)
    torch.testing.assert_close(soft, hard, rtol=1e-4, atol=1e-4)
    (soft.square().mean() + trained.routing.width.mean()).backward()
    missing = [name for name, parameter in trained.named_parameters() if parameter.grad is None]
    assert not missing
    assert all(router.gate.weight.grad.abs().max() > 0 for router in trained.routers)


def test_gradient_of_a_gate_is_its_derivative_at_the_hard_value():
    model, inputs = flux_rows(batch=2)
    elastic = elasticize(model, inputs, config=CONFIG)
    output_of(elastic, inputs).square().sum().backward()
    bias = elastic.routers[0].gate.bias
    p = torch.sigmoid(bias.detach()).item()
    block = elastic.model.transformer_blocks[0]
    step = 1e-3

    def scaled(factor: float) -> float:
        """The loss where block 0 adds `factor` times its residual."""

        def scale(module: nn.Module, args: Any, kwargs: Any, outputs: Any) -> Any:
            before = (kwargs["encoder_hidden_states"], kwargs["hidden_states"])
            return tuple(b + factor * (after - b) for b, after in zip(before, outputs, strict=True))

        handle = block.register_forward_hook(scale, with_kwargs=True)
        with torch.no_grad():
            loss = output_of(elastic.model, inputs).double().square().sum().item()
        handle.remove()
        return loss

    slope = (scaled(1 + step) - scaled(1 - step)) / (2 * step)
    assert bias.grad.item() == pytest.approx(slope * p * (1 - p), rel=0.05)


def test_blocks_are_found_at_the_first_call_where_no_inputs_are_given():
    model, inputs = flux_rows(batch=2)
    with torch.no_grad():
        dense = output_of(model, inputs)
    elastic = elasticize(model).eval()
    assert next(elastic.parameters()) is next(model.parameters())
    for use in (list, torch.optim.SGD, lambda parameters: dict.fromkeys(parameters)):
        with pytest.raises(ElasticError, match="inputs"):
            use(elastic.parameters())
    assert not list(elastic.parameters(recurse=False))
    with torch.no_grad():
        assert torch.equal(output_of(elastic, inputs), dense)
    assert len(elastic.routers) == 4
    assert sum(1 for name, _ in elastic.named_parameters() if name.startswith("routers.3.")) == 8


@torch.no_grad()
def test_arguments_that_are_no_states_may_come_and_go(made):
    elastic, _, inputs = made
    expected = output_of(elastic, inputs)
    for others in ({"a": 1, "b": 2}, {}, None):
        assert torch.equal(output_of(elastic, inputs | {"joint_attention_kwargs": others}), expected)


@torch.no_grad()
def test_a_block_called_without_a_state_is_refused_by_name(made):
    elastic, _, inputs = made
    renamed = copy.deepcopy(elastic)
    places = (("no_such",), *renamed.layout.blocks[0].places[1:])
    first = replace(renamed.layout.blocks[0], places=places)
    renamed.layout = replace(renamed.layout, blocks=(first, *renamed.layout.blocks[1:]))
    with renamed.detached():
        pass  # hooks are made anew, from this layout
    with pytest.raises(ElasticError, match=r"transformer_blocks\.0 was called without no_such"):
        output_of(renamed, inputs)


@torch.no_grad()
def test_a_layout_stored_without_names_counts_the_leaves(made, tmp_path):
    elastic, _, inputs = made
    elastic.save_pretrained(tmp_path)
    description = json.loads((tmp_path / "elastic.json").read_text()) | {"schema": 2}
    for block in description["layout"]["blocks"]:
        del block["places"], block["time_place"]
    (tmp_path / "elastic.json").write_text(json.dumps(description))
    older = load_elastic(tmp_path)
    assert torch.equal(output_of(older, inputs), output_of(elastic, inputs))
    with pytest.raises(ElasticError, match=r"transformer_blocks\.0 was called with"):
        output_of(older, inputs | {"joint_attention_kwargs": {"a": 1, "b": 2}})


def test_a_failed_forward_leaves_nothing_behind(made):
    elastic, model, inputs = made
    broken = inputs | {"hidden_states": inputs["hidden_states"][..., :3]}
    with pytest.raises(RuntimeError):
        output_of(elastic, broken)
    with torch.no_grad():
        assert torch.equal(output_of(elastic.model, inputs), output_of(model, inputs))


@torch.no_grad()
def test_saved_and_loaded_it_is_the_same_model(made, tmp_path):
    elastic, _, inputs = made
    elastic.save_pretrained(tmp_path)
    loaded = load_elastic(tmp_path)
    assert torch.equal(output_of(loaded, inputs), output_of(elastic, inputs))
    assert loaded.router_config == elastic.router_config
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}
    names = load_file(tmp_path / "routers.safetensors").keys()
    assert "3.modulation.weight" in names
    base, _ = flux_rows()
    assert torch.equal(output_of(load_elastic(tmp_path, base), inputs), output_of(elastic, inputs))


def test_half_precision_files_load_into_float32(made, tmp_path):
    elastic, _, _ = made
    elastic.save_pretrained(tmp_path, dtype=torch.float16)
    assert load_file(tmp_path / "model.safetensors")["proj_out.weight"].dtype == torch.float16
    loaded = load_elastic(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["os.system", "FluxPipeline", "no_such_class", 3])
def test_only_diffusers_models_are_built_from_a_config(made, tmp_path, name):
    made[0].save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"_class_name": name}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ElasticError, match=r"config\.json"):
        load_elastic(tmp_path)


def test_a_folder_that_is_no_elastic_model_is_refused(tmp_path, made):
    with pytest.raises(ElasticError, match=r"elastic\.json"):
        load_elastic(tmp_path)
    made[0].save_pretrained(tmp_path)
    (tmp_path / "routers.safetensors").write_bytes(b"damaged")
    with pytest.raises(ElasticError, match=r"routers\.safetensors"):
        load_elastic(tmp_path)


@pytest.mark.parametrize("part", ["model", "routers", "layout", "a sibling's model"])
def test_a_folder_that_does_not_fit_leaves_the_model_alone(tmp_path, made, part):
    made[0].save_pretrained(tmp_path)
    base, _ = flux_rows()
    base.load_state_dict({key: value + 1 for key, value in base.state_dict().items()})
    if part == "a sibling's model":
        base = tiny_sd3()[0]
    elif part == "layout":
        description = json.loads((tmp_path / "elastic.json").read_text())
        description["layout"]["blocks"][0]["dim"] = "wide"
        (tmp_path / "elastic.json").write_text(json.dumps(description))
    else:
        tensors = load_file(tmp_path / f"{part}.safetensors")
        last = sorted(tensors)[-1]
        save_file(tensors | {last: tensors[last][..., :-1].clone()}, tmp_path / f"{part}.safetensors")
    before, shown = {key: value.clone() for key, value in base.state_dict().items()}, repr(base)
    with pytest.raises(ElasticError, match=r"elastic\.json does not hold|instead of|SD3.* has no module"):
        load_elastic(tmp_path, base)
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    assert repr(base) == shown
    assert not any(module._forward_hooks for module in base.modules())


def test_what_belongs_to_it_survives_saving(tmp_path, made):
    elastic = copy.deepcopy(made[0])
    elastic.policy, elastic.narrow = RoutingPolicy(0.25, 0.5, max_reuse=7, warmup_steps=3), ("hidden_states",)
    elastic.save_pretrained(tmp_path)
    loaded = load_elastic(tmp_path)
    assert (loaded.policy, loaded.narrow, loaded.activation) == (elastic.policy, elastic.narrow, None)
    assert loaded.layout == elastic.layout
    assert loaded.timestep == elastic.timestep == "timestep"


@pytest.mark.parametrize("more", [{}, {"dry_run": True}])
def test_the_model_inside_is_not_what_is_compiled(more: dict[str, bool]) -> None:
    model, inputs = tiny_plain()
    elastic = edit_compile.elasticize(model, inputs)
    with pytest.raises(
        edit_compile.CompileError, match=r"this PlainDiT is inside an elastic model.*give compile\(\) the"
    ):
        edit_compile.compile(elastic.model, inputs=inputs, **more)


def test_nothing_is_warned_of_that_nobody_can_mend() -> None:
    model, inputs = tiny_plain()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        edit_compile.elasticize(model, inputs)
