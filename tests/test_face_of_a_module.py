"""What others do to a module: pipelines that cast and copy it, hooks that move it, autocast around it."""

from __future__ import annotations

import copy

import accelerate
import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxPipeline
from torch import Tensor, nn

import edit_compile
from edit_compile import CompiledTransformer, EditError, RoutingPolicy
from tests.models import tiny_flux
from tests.pipelines import flux_pipeline, flux_transformer

OPEN = RoutingPolicy(margin=0.0)


def image(pipeline: FluxPipeline) -> Tensor:
    settings = {"height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 16}
    generator = torch.Generator().manual_seed(0)
    return pipeline("a red cat", **settings, generator=generator, output_type="latent").images


def off(value: Tensor, reference: Tensor) -> float:
    return float((value.float() - reference.float()).abs().max() / reference.float().abs().max())


@pytest.fixture(scope="module")
def half() -> FluxPipeline:
    """A pipeline in bfloat16 whose transformer is compiled."""
    pipeline = flux_pipeline(flux_transformer()).to(torch.bfloat16)
    pipeline.transformer = edit_compile.compile(
        edit_compile.elasticize(pipeline.transformer), engine="torch", policy=OPEN
    )
    image(pipeline)
    return pipeline


def test_a_pipeline_made_of_another_is_whole(half: FluxPipeline) -> None:
    before = image(half)
    with pytest.warns(RuntimeWarning, match="keeps computing in bfloat16"):
        other = FluxImg2ImgPipeline.from_pipe(half)  # casts to float32 unless told
    assert {other.vae.dtype, other.text_encoder.dtype, other.transformer.dtype} == {torch.float32}
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    made = other("a red cat", image=picture, height=32, width=32, num_inference_steps=2, max_sequence_length=16)
    assert made.images
    half.to(torch.bfloat16)
    assert half.transformer.dtype == torch.bfloat16
    assert off(image(half), before) < 0.05


def test_offloading_moves_it_whole(half: FluxPipeline) -> None:
    expected = image(half)
    twin = copy.copy(half.transformer)
    hooked, hook = accelerate.cpu_offload_with_hook(twin, "cpu")
    half.transformer, before = hooked, half.transformer
    assert torch.equal(image(half), expected)
    hook.offload()
    assert torch.equal(image(half), expected)
    half.transformer = before


def test_what_offloads_part_by_part_is_told_how(half: FluxPipeline) -> None:
    with pytest.raises(AttributeError, match="offload the whole"):
        accelerate.cpu_offload(copy.copy(half.transformer), torch.device("cpu"))


def test_methods_of_the_model_are_not_its_own(half: FluxPipeline) -> None:
    with pytest.raises(AttributeError, match=r"runs the model's own weights.*docs/your_model\.md"):
        half.transformer.fuse_qkv_projections()
    with pytest.raises(AttributeError, match=r"no attribute 'no_such'$"):
        _ = half.transformer.no_such


@pytest.mark.parametrize("engine", [pytest.param("torch", marks=pytest.mark.slow), "onnxruntime"])
def test_autocast_changes_nothing_and_refuses_nothing(engine: str) -> None:
    model, inputs = tiny_flux(double=1, single=1)
    compiled = edit_compile.compile(edit_compile.elasticize(model, inputs), engine=engine, policy=OPEN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = compiled(**inputs, return_dict=False)[0]  # traced here
        narrow = {name: t.bfloat16() if name == "hidden_states" else t for name, t in inputs.items()}
        rounded = compiled(**narrow, return_dict=False)[0]
        with torch.no_grad():
            eager = model(**inputs, return_dict=False)[0]
    compiled.reset()
    plain = compiled(**inputs, return_dict=False)[0]
    assert torch.equal(first, plain)
    assert first.dtype == torch.float32
    assert off(rounded, plain) < 0.05 and off(eager, plain) < 0.05
    assert len(compiled.program.manifest.glues) == 1


def test_a_dtype_of_timestep_is_a_form_of_its_own_or_a_cast(tmp_path) -> None:
    model, inputs = tiny_flux(double=1, single=1)
    whole = {**inputs, "timestep": torch.ones_like(inputs["timestep"])}
    compiled = edit_compile.compile(
        edit_compile.elasticize(model, whole), inputs=whole, engine="torch", policy=OPEN, output=tmp_path / "it.edit"
    )
    loaded = edit_compile.load(tmp_path / "it.edit", engine="torch")
    expected = compiled(**whole, return_dict=False)[0]
    for dtype in (torch.float64, torch.int64):
        for one in (compiled, loaded):
            one.reset()
            got = one(**{**whole, "timestep": whole["timestep"].to(dtype)}, return_dict=False)[0]
            torch.testing.assert_close(got.to(expected.dtype), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(edit_compile.InputError, match=r"timestep.*float64.*compiled for float32"):
        loaded(**{**whole, "timestep": torch.full((1,), 0.1, dtype=torch.float64).expand_as(whole["timestep"])})


def test_before_its_first_call_it_is_the_models_face() -> None:
    model, inputs = tiny_flux(double=1, single=1)
    elastic = edit_compile.elasticize(model, inputs)
    compiled = edit_compile.compile(elastic, engine="torch", policy=OPEN)
    assert {id(p) for p in compiled.parameters()} == {id(p) for p in model.parameters()}
    compiled.to(torch.float64)
    assert compiled.dtype == model.dtype == next(elastic.routers.parameters()).dtype == torch.float64
    wide = {name: t.double() if isinstance(t, Tensor) else t for name, t in inputs.items()}
    with torch.no_grad():
        expected = model(**wide, return_dict=False)[0]
    torch.testing.assert_close(compiled(**wide, return_dict=False)[0], expected)


def test_inside_another_module_it_is_counted_and_left_alone() -> None:
    model, inputs = tiny_flux(double=1, single=1)
    compiled = edit_compile.compile(edit_compile.elasticize(model, inputs), inputs=inputs, engine="torch", policy=OPEN)
    outer = nn.Sequential(compiled)
    assert len(outer.state_dict()) == len(list(outer.parameters())) > 0
    assert not any(p.requires_grad for p in outer.parameters())
    assert outer.to("cpu")[0] is compiled
    with pytest.raises(EditError, match=r"compiled\.save"):
        compiled.save_pretrained("nowhere")
    assert isinstance(copy.deepcopy(outer)[0], CompiledTransformer)
