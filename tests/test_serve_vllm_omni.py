"""The pipeline for vLLM-Omni: its own adapter for diffusers runs it, the rest of it is read. See docs/serving.md."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import edit_compile
from tests import vllm_omni_parts
from tests.pipelines import flux_pipeline, flux_transformer
from tests.vllm_omni_parts import definition, fields, parsed

pytestmark = pytest.mark.skipif(vllm_omni_parts.folder() is None, reason="vllm-omni is not installed")

SIZE, STEPS = 32, 6
EVERY_OTHER = np.array([[1.0] * 4, [-1.0] * 4] * (STEPS // 2))


def test_the_version_is_the_one_that_was_read() -> None:
    assert metadata.version("vllm-omni").startswith("0.30.")


def test_a_pipeline_class_is_named_made_and_given_weights_as_ours_takes_them() -> None:
    loader = parsed("diffusion/model_loader/diffusers_loader.py")
    made = ast.unparse(definition(loader, "_init_from_load_format"))
    assert "model = model_cls(od_config=self.od_config)" in made
    assert "loaded_weights = model.load_weights(weights)" in ast.unparse(definition(loader, "load_weights"))
    worker = parsed("diffusion/worker/diffusion_worker.py")
    assert "custom_pipeline_args['pipeline_class']" in ast.unparse(definition(worker, "re_init_pipeline"))
    runner = ast.unparse(parsed("diffusion/worker/diffusion_model_runner.py"))
    assert "raw_outputs = self.pipeline.forward(batch)" in runner
    assert not definition(parsed("diffusion/distributed/utils.py"), "get_local_device").args.args


def test_the_names_that_requests_and_commands_use_are_there() -> None:
    assert "extra_args" in fields(parsed("inputs/data.py"), "OmniDiffusionSamplingParams")
    assert "custom_pipeline_args" in fields(parsed("diffusion/data.py"), "OmniDiffusionConfig")
    command = ast.unparse(parsed("entrypoints/cli/serve.py"))
    assert "'--custom-pipeline-args'" in command and "'--model-class-name'" in command


def test_images_of_diffusers_are_left_as_they_are_under_the_class_name_that_is_told() -> None:
    registry = parsed("diffusion/registry.py")
    tables = {
        node.targets[0].id: [key.value for key in node.value.keys if isinstance(key, ast.Constant)]
        for node in registry.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict) and isinstance(node.targets[0], ast.Name)
    }
    processed = [name for name in tables if name.endswith("PROCESS_FUNCS")]
    assert len(processed) == 2 and not any("DiffusersAdapterPipeline" in tables[name] for name in processed)
    assert "DiffusersAdapterPipeline" in {key for keys in tables.values() for key in keys}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pipeline of toys, and the bundle of its transformer, with a tier."""
    folder = tmp_path_factory.mktemp("omni")
    pipe = flux_pipeline(flux_transformer())
    pipe.save_pretrained(folder / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with edit_compile.record(pipe, folder / "calls"):
            pipe("a red cat", num_inference_steps=2, height=SIZE, width=SIZE, output_type="latent")
        recording = edit_compile.Recording(folder / "calls")
        compiled = edit_compile.compile(pipe.transformer, inputs=recording, engine="torch")
    compiled.add_tier("fast", edit_compile.ScheduledPolicy(EVERY_OTHER, routed=False))
    compiled.save(folder / "flux.edit")
    return folder / "model", folder / "flux.edit"


@pytest.fixture(scope="module")
def pipeline(model: tuple[Path, Path]) -> Iterator[Any]:
    with vllm_omni_parts.imported():
        from examples.serve.vllm_omni_pipeline import CompiledPipeline

        made = CompiledPipeline(od_config=config(*model))
        made.load_weights(iter(()))
        yield made


def config(model: Path, bundle: Path | None) -> SimpleNamespace:
    parallel = SimpleNamespace(tensor_parallel_size=1, cfg_parallel_size=1, sequence_parallel_size=1)
    own = {"pipeline_class": "examples.serve.vllm_omni_pipeline.CompiledPipeline"}
    own |= {} if bundle is None else {"bundle": str(bundle), "engine": "torch"}
    switches = ("enable_layerwise_offload", "enable_cpu_offload", "vae_use_slicing", "vae_use_tiling", "enforce_eager")
    return SimpleNamespace(
        model=str(model),
        dtype=torch.float32,
        custom_pipeline_args=own,
        parallel_config=parallel,
        diffusion_attention_config=SimpleNamespace(default=SimpleNamespace(backend="TORCH_SDPA")),
        diffusers_load_kwargs={},
        diffusers_call_kwargs={},
        diffusers_pipeline_cls=None,
        diffusion_offload_config=None,
        cache_backend="none",
        quantization_config=None,
        output_type="np",
        model_class_name="DiffusersAdapterPipeline",
        enable_diffusion_pipeline_profiler=False,
        **dict.fromkeys(switches, False),
    )


class Asked(SimpleNamespace):
    """In the place of OmniDiffusionSamplingParams: what was not asked for is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def drawn(pipeline: Any, prompt: str, seed: int, tier: str | None = None, name: str = "one") -> np.ndarray:
    from vllm_omni.diffusion.request import OmniDiffusionRequest
    from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch

    asked = Asked(
        height=SIZE,
        width=SIZE,
        num_inference_steps=STEPS,
        seed=seed,
        generator=None,
        generator_device="cpu",
        output_type=None,
        num_outputs_per_prompt=1,
        enable_frame_interpolation=False,
        extra_args={} if tier is None else {"tier": tier},
    )
    request = OmniDiffusionRequest(prompt=prompt, sampling_params=asked, request_id=name)
    return np.asarray(pipeline.forward(DiffusionRequestBatch([request])).output)


def test_their_adapter_draws_what_diffusers_draws(pipeline: Any, model: tuple[Path, Path]) -> None:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(model[0])
    told = {"num_inference_steps": STEPS, "height": SIZE, "width": SIZE, "output_type": "np"}
    expected = pipe("a red cat", generator=torch.Generator().manual_seed(3), **told).images
    np.testing.assert_allclose(drawn(pipeline, "a red cat", 3), expected, atol=1e-3)
    assert isinstance(pipeline._pipeline.transformer, edit_compile.CompiledTransformer)


def test_a_request_has_its_tier_and_leaves_nothing_to_the_next(pipeline: Any) -> None:
    compiled = pipeline._pipeline.transformer
    dense, fast = drawn(pipeline, "a red cat", 3), drawn(pipeline, "a red cat", 3, "fast")
    compiled.reset_counters()
    again = drawn(pipeline, "a red cat", 3, "fast", "another of the same name may follow")
    assert compiled.counters.reused == compiled.counters.computed > 0
    np.testing.assert_array_equal(again, fast)
    assert np.abs(fast - dense).max() > 0
    np.testing.assert_array_equal(drawn(pipeline, "a red cat", 3), dense)


def test_an_error_in_the_middle_leaves_nothing_to_the_next(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = drawn(pipeline, "a red cat", 5, "fast")
    step, taken = pipeline._pipeline.scheduler.step, []

    def breaks(*given: Any, **named: Any) -> Any:
        taken.append(1)
        if len(taken) == 3:
            raise OSError("the request was ended")
        return step(*given, **named)

    monkeypatch.setattr(pipeline._pipeline.scheduler, "step", breaks)
    with pytest.raises(OSError, match="was ended"):
        drawn(pipeline, "the blue dog", 4, "fast")
    monkeypatch.undo()
    np.testing.assert_array_equal(drawn(pipeline, "a red cat", 5, "fast"), fast)


def test_what_is_not_there_is_said(pipeline: Any, model: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match=r"'best', there are 'fast'"):
        drawn(pipeline, "a red cat", 3, "best")
    without = type(pipeline)(od_config=config(model[0], None))
    with pytest.raises(ValueError, match="has no 'bundle'"):
        without.load_weights(iter(()))
