"""The compiled transformer inside diffusers' own pipelines."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import edit_compile
from edit_compile import CompiledTransformer, RoutingPolicy, ScheduledPolicy
from tests.conftest import unsettle
from tests.pipelines import flux_pipeline, flux_transformer, sd3_pipeline, sd3_transformer

CALL = {"prompt": "a red cat", "height": 32, "width": 32, "num_inference_steps": 3, "max_sequence_length": 16}


def generate(pipeline: object, seed: int = 0, **changes: object) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return pipeline(**{**CALL, **changes}, generator=generator, output_type="latent").images


def close(value: torch.Tensor, reference: torch.Tensor) -> bool:
    return bool((value - reference).abs().max() <= 2e-4 * reference.abs().max())


@pytest.fixture(scope="module")
def flux_pair() -> Iterator[tuple[object, object, CompiledTransformer]]:
    """Two pipelines with equal parts: one eager, one compiled at its first call."""
    eager, ours = flux_pipeline(flux_transformer()), flux_pipeline(flux_transformer())
    elastic = edit_compile.elasticize(ours.transformer)
    compiled = edit_compile.compile(elastic, engine="torch")
    ours.transformer = compiled
    yield eager, ours, compiled


@pytest.fixture
def opened(flux_pair: tuple[object, object, CompiledTransformer]) -> tuple[object, object, CompiledTransformer]:
    flux_pair[2].policy = RoutingPolicy(margin=0.0)  # routers are fully open
    return flux_pair


def test_flux_two_images_in_a_row(opened: tuple) -> None:
    eager, ours, _ = opened
    for seed in (0, 1):
        assert close(generate(ours, seed), generate(eager, seed))


def test_flux_true_guidance_keeps_its_branches_apart(opened: tuple) -> None:
    eager, ours, compiled = opened
    guided = {"negative_prompt": "dog", "true_cfg_scale": 3.0}
    assert close(generate(ours, **guided), generate(eager, **guided))
    assert set(compiled.trace[-1].contexts) == {"cond", "uncond"}


def test_flux_batch_rows_decide_for_themselves(opened: tuple) -> None:
    eager, ours, compiled = opened
    blocks = len(compiled.program.manifest.blocks)
    table = torch.ones(3, blocks, 3)
    table[:, 1, 0] = 0.0
    table[1:, 2, 1] = -1.0
    table[:, 3, 2] = 0.25
    compiled.policy = ScheduledPolicy(table.numpy())
    latents = torch.randn(3, 64, 16, generator=torch.Generator().manual_seed(5))
    together = generate(ours, prompt=["a red cat", "a dog", "the house"], latents=latents)
    for row, prompt in enumerate(("a red cat", "a dog", "the house")):
        compiled.policy = ScheduledPolicy(table[..., row : row + 1].numpy())
        alone = generate(ours, prompt=prompt, latents=latents[row : row + 1])
        assert close(together[row : row + 1], alone)
    assert not close(together, generate(eager, prompt=["a red cat", "a dog", "the house"], latents=latents))


def test_flux_goes_on_after_an_exception_in_the_middle(opened: tuple) -> None:
    eager, ours, _ = opened

    def stop(_pipeline: object, step: int, *_: object) -> dict:
        raise KeyboardInterrupt if step == 1 else RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        generate(ours, callback_on_step_end=stop)
    assert close(generate(ours), generate(eager))


def test_sd3_guidance_is_rows_of_one_batch() -> None:
    eager, ours = sd3_pipeline(sd3_transformer()), sd3_pipeline(sd3_transformer())
    elastic = edit_compile.elasticize(ours.transformer)
    ours.transformer = compiled = edit_compile.compile(elastic, engine="torch", policy=RoutingPolicy(margin=0.0))
    assert close(generate(ours, guidance_scale=4.0), generate(eager, guidance_scale=4.0))
    assert compiled.trace[-1].grid()["done"].shape == (3, 3, 2)
    unsettle(elastic)
    again = edit_compile.compile(elastic, engine="torch", policy=RoutingPolicy(threshold=0.4, margin=0.2, max_reuse=1))
    ours.transformer = again
    assert not close(generate(ours, guidance_scale=4.0), generate(eager, guidance_scale=4.0))
