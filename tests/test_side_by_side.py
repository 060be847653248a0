"""What is made side by side, or looks like the generation before it, never reuses another's residuals in silence."""

from __future__ import annotations

import contextvars
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor

from runtime.face.transformer import CompiledTransformer
from runtime.routing.policy import REUSE
from runtime.routing.schedule import ScheduledPolicy
from tests import programs
from tests.emulator import Emulator

KINDS = ("double", "single")
ALWAYS_REUSE = ScheduledPolicy(np.full((100, len(KINDS)), REUSE), routed=False)
MOMENTS = (1.0, 0.8, 0.6, 0.4, 0.2)

Calls = Iterator[tuple[str, dict[str, Tensor]]]
"""Whose a call is, and its arguments."""


@pytest.fixture(params=["host", "device"])
def model(request: pytest.FixtureRequest, recorder: Emulator) -> CompiledTransformer:
    return CompiledTransformer(programs.make(KINDS, seed=3), "torch", ALWAYS_REUSE, dispatch=request.param)


def noise(seed: int, rows: int = 1, tokens: int = programs.IMAGE) -> Tensor:
    return torch.randn(rows, tokens, programs.C, generator=torch.Generator().manual_seed(seed))


def prompt(seed: int, rows: int = 1) -> Tensor:
    return programs.inputs(rows, seed)["encoder_hidden_states"]


def velocity(latents: Tensor) -> Tensor:
    """What a model might give: a sampler goes along it, whatever the compiled one says."""
    return torch.sin(3 * latents) + latents.roll(1, 1)


def call(latents: Tensor, text: Tensor, moment: float) -> dict[str, Tensor]:
    return {"hidden_states": latents, "encoder_hidden_states": text, "timestep": torch.full((len(latents),), moment)}


def tiles() -> Calls:
    canvas, text = noise(0, tokens=3 * programs.IMAGE), prompt(0)
    for moment in MOMENTS:
        for number, part in enumerate(canvas.split(programs.IMAGE, 1)):
            yield f"tile {number}", call(part, text, moment)
        canvas = canvas - 0.2 * velocity(canvas)


def frames() -> Calls:
    still, text = noise(1), prompt(0)
    frames = [still + 0.02 * noise(2 + number) for number in range(3)]
    for moment in MOMENTS:
        for number in range(3):
            yield f"frame {number}", call(frames[number], text, moment)
            frames[number] = frames[number] - 0.02 * velocity(frames[number])


def edited_beside_its_source() -> Calls:
    source, edited, texts = noise(0), noise(1), (prompt(0), prompt(1))
    for moment in MOMENTS:
        yield "source", call((1 - moment) * source + moment * noise(int(100 * moment)), texts[0], moment)
        yield "edited", call(edited, texts[1], moment)
        edited = edited - 0.2 * velocity(edited)


def degraded_latents() -> Calls:
    latents, texts = noise(0), (prompt(0), prompt(1))
    for moment in MOMENTS:
        yield "cond", call(latents, texts[0], moment)
        yield "uncond", call(latents, texts[1], moment)
        yield "degraded", call(latents.mean(1, keepdim=True).expand_as(latents).contiguous(), texts[1], moment)
        latents = latents - 0.2 * velocity(latents)


def with_and_without_an_image() -> Calls:
    latents, image, text = noise(0), noise(1, tokens=2), prompt(0)
    for moment in MOMENTS:
        yield "with", call(torch.cat([latents[:, 2:], image], 1), text, moment)
        yield "without", call(torch.cat([latents[:, 2:], torch.zeros_like(image)], 1), text, moment)
        latents = latents - 0.2 * velocity(latents)


BESIDE = [tiles, frames, edited_beside_its_source, degraded_latents, with_and_without_an_image]


def run(model: CompiledTransformer, calls: Calls, name: Callable[[str], str | None]) -> list[Tensor]:
    outputs = []
    for whose, given in calls:
        named = name(whose)
        with model.request(named) if named else nullcontext():
            outputs.append(model(**given).sample)
    return outputs


@pytest.mark.parametrize("beside", BESIDE)
def test_what_is_made_side_by_side_is_computed(model: CompiledTransformer, beside: Callable[[], Calls]) -> None:
    computing = CompiledTransformer(model.program, "torch", ScheduledPolicy(np.ones((100, len(KINDS))), routed=False))
    expected = run(computing, beside(), lambda _: "one")
    with pytest.warns(RuntimeWarning, match="a name of its own"):
        together = run(model, beside(), lambda _: "one")
        assert model.counters.reused == 0
    for got, wanted in zip(together, expected, strict=True):
        torch.testing.assert_close(got, wanted)
    model.reset_counters()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(model, beside(), lambda _: None)
        assert model.counters.reused == 0


@pytest.mark.parametrize("beside", BESIDE)
def test_each_by_a_name_of_its_own_is_reused(model: CompiledTransformer, beside: Callable[[], Calls]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        run(model, beside(), lambda whose: whose)
        assert model.counters.reused == len(KINDS) * (len(list(beside())) - len({whose for whose, _ in beside()}))


def guided(model: CompiledTransformer, name: str | None, order: tuple[str, str], contexts: bool) -> list[Tensor]:
    """Outputs of five steps, in the last three of which both branches are called."""
    latents, outputs = noise(0), {}
    texts = {"cond": prompt(0), "uncond": prompt(1)}
    for step, moment in enumerate(MOMENTS):
        for branch in order if step > 1 else ("cond",):
            named = model.request(f"{name} {contexts}") if name else nullcontext()
            with named, model.cache_context(branch) if contexts else nullcontext():
                outputs[step, branch] = model(**call(latents, texts[branch], moment)).sample
        latents = latents - 0.01 * velocity(latents)
    model.reset()
    return [outputs[key] for key in sorted(outputs) if key[1] == "uncond"]


@pytest.mark.parametrize("name", [None, "one"])
@pytest.mark.parametrize("order", [("cond", "uncond"), ("uncond", "cond")])
def test_guidance_that_sets_in_late_takes_nothing_from_the_other_branch(
    model: CompiledTransformer, order: tuple[str, str], name: str | None
) -> None:
    for got, expected in zip(*(guided(model, name, order, contexts) for contexts in (False, True)), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_rows_that_swap_prompts_in_every_step_are_computed(model: CompiledTransformer) -> None:
    latents, text = noise(0), prompt(0, rows=2)
    for name in (None, "one"):
        with pytest.warns(RuntimeWarning, match="conditioning of a branch") if name else nullcontext():
            for step, moment in enumerate(MOMENTS):
                given = call(torch.cat([latents, latents]), text.flip(0) if step % 2 else text, moment)
                run(model, iter([("", given)]), lambda _, name=name: name)
                latents = latents - 0.01 * velocity(latents)
    assert model.counters.reused == 0


def test_rows_that_change_places_are_computed(model: CompiledTransformer) -> None:
    particles, text = noise(0, rows=4), prompt(0).expand(4, -1, -1)
    for step, moment in enumerate(MOMENTS):
        if step == 3:
            before, particles = model.counters.reused, particles[[1, 0, 3, 3]]
        with warnings.catch_warnings(record=True) as told, model.request("one"):
            warnings.simplefilter("always")
            model(**call(particles, text, moment))
            reused = model.counters.reused
        if step == 3:
            assert reused == before and any("a name of its own" in str(one.message) for one in told)
        particles = particles + 0.1 * noise(10 + step, rows=4)
    assert model.counters.reused == 4 * len(KINDS) * 3


def test_a_prompt_made_anew_begins_an_image_anew(model: CompiledTransformer) -> None:
    """Image to image again with less strength, of the same image and noise: its latents are what a sampler makes."""
    source, drawn, steps = noise(0), noise(1), []
    for start in (0.5, 0.3):
        text = prompt(0)
        for moment in (start, start - 0.05, start - 0.1):
            latents = (1 - moment) * source + moment * drawn
            model(**call(latents, text, moment))
    steps = [record.arrays()["step"].tolist() for record in model.trace]
    assert [max(one) for one in steps] == [2, 2]


def test_noise_that_is_only_less_is_another_image(model: CompiledTransformer) -> None:
    text = prompt(0)
    for moment in (1.0, 0.95):
        model(**call(moment * noise(0), text, moment))
    assert len(model.trace) == 2


def test_a_request_that_lost_its_residuals_still_tells_images_apart(model: CompiledTransformer) -> None:
    latents, text = noise(0), prompt(0)
    for moment in (1.0, 0.9, 0.8):
        model(**call(latents, text, moment))
        latents = latents - 0.01 * velocity(latents)
    model._session.requests.lose_all()
    model(**call(latents, text, 0.7))
    model(**call(noise(5), prompt(5), 0.5))
    steps = [sorted(set(record.arrays()["step"].tolist())) for record in model.trace]
    assert steps == [[0, 1, 2, 3], [0]]


def test_steps_of_a_generator_may_run_in_contexts_of_their_own(model: CompiledTransformer) -> None:
    def steps() -> Iterator[int]:
        with model.request("streamed"), model.cache_context("cond"):
            for number, moment in enumerate(MOMENTS):
                model(**call(noise(0), prompt(0), moment))
                yield number

    running = steps()
    served = [contextvars.copy_context().run(next, running, None) for _ in range(len(MOMENTS) + 1)]
    assert served == [0, 1, 2, 3, 4, None]
