"""The elastic model where a pipeline, accelerate or a trainer expects the model: validation images while training."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import accelerate
import pytest
import torch
from diffusers import FluxImg2ImgPipeline
from torch import nn

from edit_compile import ElasticTransformer, elasticize
from runtime.bundle.spec import RouterConfig
from tests.models import tiny_dit, tiny_flux
from tests.pipelines import flux_pipeline, flux_transformer

CONFIG = RouterConfig(hidden=16)


def generate(pipeline: Any, **changes: Any) -> torch.Tensor:
    call = {"prompt": "a red cat", "height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 16}
    generator = torch.Generator().manual_seed(0)
    return pipeline(**call | changes, generator=generator, output_type="latent").images


def flux_inputs() -> dict[str, Any]:
    """As a training loop calls it, where a pipeline also gives `joint_attention_kwargs`."""
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(1, 64, 16, generator=generator),
        "encoder_hidden_states": torch.randn(1, 16, 32, generator=generator),
        "pooled_projections": torch.randn(1, 32, generator=generator),
        "timestep": torch.tensor([0.9]),
        "img_ids": torch.zeros(64, 3),
        "txt_ids": torch.zeros(16, 3),
    }


@pytest.fixture(scope="module")
def dense() -> torch.Tensor:
    return generate(flux_pipeline(flux_transformer()))


@pytest.mark.parametrize("inputs", [None, flux_inputs()], ids=["found at the first call", "given inputs"])
def test_a_pipeline_takes_it_for_the_model(inputs: Any, dense: torch.Tensor) -> None:
    pipeline = flux_pipeline(flux_transformer())
    pipeline.transformer = elastic = elasticize(pipeline.transformer, inputs, config=CONFIG)
    pipeline.to("cpu", torch.float32)
    torch.testing.assert_close(generate(pipeline), dense)
    assert len(elastic.routers) == 4
    ours, eager = (FluxImg2ImgPipeline.from_pipe(p) for p in (pipeline, flux_pipeline(flux_transformer())))
    image = torch.zeros(1, 3, 32, 32)
    assert ours.transformer is elastic
    torch.manual_seed(0)
    result = generate(ours, image=image)
    torch.manual_seed(0)
    torch.testing.assert_close(result, generate(eager, image=image))


@pytest.mark.parametrize("inputs", [None, flux_inputs()], ids=["found at the first call", "given inputs"])
def test_accelerate_offloads_it_as_the_model(inputs: Any, dense: torch.Tensor) -> None:
    pipeline = flux_pipeline(flux_transformer())
    pipeline.transformer = elastic = elasticize(pipeline.transformer, inputs, config=CONFIG)
    _, hook = accelerate.cpu_offload_with_hook(elastic, "cpu")
    accelerate.cpu_offload_with_hook(pipeline.vae, "cpu", prev_module_hook=hook)
    assert not hasattr(elastic.model, "_hf_hook")
    torch.testing.assert_close(generate(pipeline), dense)
    hook.remove()
    torch.testing.assert_close(generate(pipeline), dense)


def test_a_hook_on_the_model_is_not_one_on_this_module() -> None:
    model, inputs = tiny_flux()
    elastic = elasticize(model, inputs, config=CONFIG).eval()
    accelerate.cpu_offload_with_hook(model, "cpu")
    assert not hasattr(elastic, "_hf_hook")
    accelerate.cpu_offload_with_hook(elastic, "cpu")
    elastic(**inputs)
    assert elastic.routing is not None, (
        "the hook should call the elastic forward, not the one that it found on the model"
    )


def test_it_moves_and_casts_with_its_routers() -> None:
    model, inputs = tiny_flux()
    elastic = elasticize(model, inputs, config=CONFIG)
    assert elastic.to(torch.bfloat16) is elastic
    assert {parameter.dtype for parameter in elastic.parameters()} == {torch.bfloat16} == {elastic.dtype}
    later = elasticize(tiny_flux()[0]).to(torch.float64)
    with torch.no_grad():
        later(**{k: v.double() if v.is_floating_point() else v for k, v in dict(inputs).items()})
    assert later.routers[0].gate.weight.dtype == torch.float64
    assert elastic.to("meta").device.type == elastic.routers[0].gate.weight.device.type == "meta"


def test_it_reads_as_the_model() -> None:
    model, _ = tiny_flux()
    elastic = elasticize(model, config=CONFIG)
    assert elastic.config is model.config
    assert (elastic.router_config, elastic.dtype, elastic.device) == (CONFIG, torch.float32, torch.device("cpu"))
    assert elastic.inner_dim == model.inner_dim
    assert elastic.transformer_blocks is model.transformer_blocks
    elastic.enable_gradient_checkpointing()
    assert model.gradient_checkpointing
    elastic._reset_stateful_cache()
    with elastic.cache_context("cond"):
        pass


def test_a_missing_attribute_names_both_classes() -> None:
    elastic = elasticize(tiny_flux()[0])
    message = "'ElasticTransformer' object has no attribute 'no_such'.*'FluxTransformer2DModel'"
    with pytest.raises(AttributeError, match=message):
        _ = elastic.no_such
    for private in ("_no_such", "__deepcopy__", "__no_such__"):
        assert not hasattr(elastic, private)


class Copying(nn.Module):
    """A model with ways of its own to be copied, which are not those of an elastic model."""

    def __deepcopy__(self, memo: object) -> None:
        raise AssertionError("this would copy the model alone")

    def _later(self) -> int:
        return 5


def test_copying_asks_the_class_and_private_methods_are_found() -> None:
    elastic = ElasticTransformer(Copying(), CONFIG)
    assert getattr(elastic, "__deepcopy__", None) is None
    assert elastic._later() == 5
    with pytest.raises(AttributeError, match="model"):
        _ = ElasticTransformer.__new__(ElasticTransformer).model


@torch.no_grad()
def test_copied_and_pickled_it_is_the_same() -> None:
    model, inputs = tiny_dit()
    elastic = elasticize(model, inputs, config=CONFIG).eval()
    expected = elastic(**inputs, return_dict=False)[0]
    for again in (copy.deepcopy(elastic), pickle.loads(pickle.dumps(elastic))):
        assert again.model is not model
        assert torch.equal(again(**inputs, return_dict=False)[0], expected)
        assert again.routing is not elastic.routing
        assert again.state_dict().keys() == elastic.state_dict().keys()


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model, inputs = tiny_flux()
    elastic = elasticize(model, inputs, config=CONFIG).train()
    gradients = []
    for step in (elastic.disable_gradient_checkpointing, elastic.enable_gradient_checkpointing):
        step()
        elastic.zero_grad()
        first, again = (elastic(**inputs, return_dict=False)[0] for _ in range(2))  # two forwards before the backward
        (first.square().mean() + again.mean() + elastic.routing.width.mean()).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in elastic.named_parameters()})
    assert model.gradient_checkpointing
    torch.testing.assert_close(*gradients)


def test_a_dense_call_is_checkpointed_without_the_routers() -> None:
    model, inputs = tiny_flux()
    elastic = elasticize(model, inputs, config=CONFIG).train()
    model.enable_gradient_checkpointing()
    model(**inputs, return_dict=False)[0].square().mean().backward()
    assert all(parameter.grad is None for parameter in elastic.routers.parameters())
