"""Samplers told from what they do: coefficients, schedulers of diffusers, noise, images beside latents, bfloat16."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edit_compile import Sampler, replay
from tests.loops import Loop, Toy, prompt, recorded
from tests.models import noise

TIMES = (1.0, 0.85, 0.6, 0.3, 0.1, 0.0)
GUIDANCE = 4.0


def moved(ours: Tensor | None, theirs: Tensor | None) -> float:
    """Root mean square of a difference."""
    assert ours is not None and theirs is not None
    return float((ours.double() - theirs.double()).square().mean().sqrt())


def compared(loop: Loop, other: Toy, model: Toy | None = None) -> tuple[float, float, Sampler]:
    """How far a replay is from the real loop with `other`, how far that is from the recorded one; and the sampler."""
    generation, expected = recorded(model or Toy(), loop), recorded(other, loop)
    fitted = Sampler.fit(generation, "x", 0)
    ours = replay(other, generation, fitted)
    return moved(ours.result, expected.result), moved(generation.result, expected.result), fitted


def euler(
    apart: float = 1.0, dtype: torch.dtype = torch.float32, joined: bool = False, tokens: int = 64, seed: int = 1
) -> Loop:
    """Euler with guidance; the prompts are `apart` from each other."""

    def loop(model: Toy) -> Tensor:
        x, one = noise(2, tokens, 8, seed=seed).to(dtype), prompt(5, 2)
        prompts = [text.to(dtype) for text in (one, one + apart * prompt(6, 2))]
        for now, then in pairwise(TIMES):
            if joined:
                without, given = model(torch.cat([x, x]), torch.full((4,), now), torch.cat(prompts))[0].chunk(2)
            else:
                without, given = (model(x, torch.full((2,), now), text)[0] for text in prompts)
            x = x + (then - now) * (without + GUIDANCE * (given - without))
        return x

    return loop


def factors(sampler: Sampler, step: int, group: int = 0) -> dict[tuple[int, int, bool], float]:
    return {(term.call, term.row, term.given): term.factor for term in sampler.steps[step].groups[group]}


@pytest.mark.parametrize(("apart", "near"), [(1.0, 1e-5), (1e-2, 1e-4), (1e-3, 1e-3)])
@pytest.mark.parametrize("joined", [False, True])
def test_the_coefficients_of_euler_and_guidance(joined: bool, apart: float, near: float) -> None:
    sampler = Sampler.fit(recorded(Toy(), euler(apart, joined=joined)))
    for step, (now, then) in enumerate(pairwise(TIMES)):
        for row in (0, 1):
            calls = [(step, row), (step, row + 2)] if joined else [(2 * step, row), (2 * step + 1, row)]
            expected = {(*calls[0], False): 1.0, (*calls[0], True): (1 - GUIDANCE) * (then - now)}
            expected[(*calls[1], True)] = GUIDANCE * (then - now)
            assert factors(sampler, step, row) == pytest.approx(expected, abs=near)


def test_the_coefficients_of_heun_and_of_two_steps() -> None:
    def heun(model: Toy) -> Tensor:
        x, text = noise(1, 64, 8), prompt(5)
        for now, then in pairwise(TIMES[:4]):
            first = model(x, torch.tensor([now]), text)[0]
            second = model(x + (then - now) * first, torch.tensor([then]), text)[0]
            x = x + (then - now) * (first + second) / 2
        return x

    def two_steps(model: Toy) -> Tensor:
        x, text, last = noise(1, 64, 8), prompt(5), None
        for now in TIMES[:4]:
            v = model(x, torch.tensor([now]), text)[0]
            x, last = x - 0.2 * (v if last is None else 1.5 * v - 0.5 * last), v
        return x

    assert factors(Sampler.fit(recorded(Toy(), heun)), 1) == pytest.approx(
        {(1, 0, False): 1.0, (1, 0, True): -0.075, (0, 0, True): 0.075}, abs=1e-4
    )
    assert factors(Sampler.fit(recorded(Toy(), two_steps)), 2) == pytest.approx(
        {(2, 0, False): 1.0, (2, 0, True): -0.3, (1, 0, True): 0.1}, abs=1e-4
    )


def scheduled(scheduler: Any, seed: int = 0, **step: Any) -> Loop:
    """A scheduler of diffusers, six steps of it."""

    def loop(model: Toy) -> Tensor:
        scheduler.set_timesteps(6)
        draw = torch.Generator().manual_seed(seed)
        x = (
            noise(1, 512, 8) * scheduler.init_noise_sigma
            if hasattr(scheduler, "init_noise_sigma")
            else noise(1, 512, 8)
        )
        drawn = {"generator": draw} if step.get("noisy") else {}
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x, t) if step.get("scaled") else x
            x = scheduler.step(model(scaled, t[None].float() / 1000, prompt(5))[0], t, x, return_dict=False, **drawn)[0]
        return x

    return loop


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SCHEDULERS = {
    "euler": lambda: FlowMatchEulerDiscreteScheduler(),
    "heun": lambda: FlowMatchHeunDiscreteScheduler(),
    "ddim": lambda: DDIMScheduler(clip_sample=False),
    "dpm 2": lambda: DPMSolverMultistepScheduler(**FLOW),
    "dpm 3": lambda: DPMSolverMultistepScheduler(solver_order=3, **FLOW),
    "dpm of noise": lambda: DPMSolverMultistepScheduler(),
    "unipc 2": lambda: UniPCMultistepScheduler(**FLOW),
    "unipc 3": lambda: UniPCMultistepScheduler(solver_order=3, **FLOW),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_of_diffusers(name: str) -> None:
    wrong, apart, sampler = compared(scheduled(SCHEDULERS[name]()), Toy(bend=0.3))
    assert wrong < 1e-4 * apart
    assert min(sampler.explained) > 1 - 1e-6


@pytest.mark.parametrize(
    ("scheduler", "how"),
    [
        (DDPMScheduler(clip_sample=False), {}),
        (EulerAncestralDiscreteScheduler(), {"scaled": True}),
        (DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", **FLOW), {}),
    ],
)
def test_noise_that_is_added_stays_what_it_was(scheduler: Any, how: dict[str, Any]) -> None:
    wrong, apart, sampler = compared(scheduled(scheduler, noisy=True, **how), Toy(bend=0.3))
    assert wrong < 0.15 * apart
    assert min(sampler.explained) < 0.99
    assert sampler.explained[-1] > 1 - 1e-6  # the last step adds none


def test_bfloat16() -> None:
    other = Toy(bend=0.3).bfloat16()
    wrong, apart, sampler = compared(euler(dtype=torch.bfloat16, tokens=512), other, Toy().bfloat16())
    exact = euler(tokens=512)(other.float())
    rounding = moved(exact, euler(dtype=torch.bfloat16, tokens=512)(Toy(bend=0.3).bfloat16()))
    assert wrong < 1.5 * rounding < 0.1 * apart
    assert 1 - 1e-3 < min(sampler.explained) < 1 - 1e-6
    expected = {(2, 0, False): 1.0, (2, 0, True): 0.75, (3, 0, True): -1.0}
    assert factors(sampler, 1) == pytest.approx(expected, abs=0.01)


IMAGE = noise(1, 16, 8, seed=9)


def beside(shape: str) -> tuple[Loop, dict[str, Any]]:
    """Euler over 64 tokens with something beside them, and how the model is made that takes it."""
    channels = shape in ("in channels", "output has more")

    def loop(model: Toy) -> Tensor:
        x = noise(1, 64, 4 if shape == "in channels" else 8)
        text = prompt(5, channels=8)
        for now, then in pairwise(TIMES):
            parts = {"behind": [x, IMAGE], "in front": [IMAGE, x], "in front, output without": [IMAGE, x]}
            whole = torch.cat(parts.get(shape, [x]), 1)
            if shape == "in channels":
                whole = torch.cat([x, noise(1, 64, 4, seed=8)], 2)
            v = model(whole, torch.tensor([now]), text)[0]
            v = v[:, -64:] if shape.startswith("in front") else v[:, :64]
            x = x + (then - now) * v[..., : x.shape[2]]
        return x

    made: dict[str, Any] = {"out": {"in channels": 4, "output has more": 16}[shape]} if channels else {}
    return loop, made | ({"kept": slice(16, None)} if shape.endswith("without") else {})


@pytest.mark.parametrize("shape", ["behind", "in front", "in front, output without", "in channels", "output has more"])
def test_something_beside_the_latents_stays_as_it_was(shape: str) -> None:
    loop, made = beside(shape)
    generation = recorded(Toy(**made), loop)
    expected, sampler = recorded(Toy(0.3, **made), loop), Sampler.fit(generation, "x", 0)
    ours = replay(Toy(0.3, **made), generation, sampler)
    for latents, call in zip(ours.latents, expected.calls, strict=True):
        torch.testing.assert_close(latents, call.arguments["x"], atol=2e-6, rtol=0)
    assert moved(ours.result, expected.result) < 1e-6 < 0.01 < moved(generation.result, expected.result)
    assert sampler == Sampler.fit(generation)  # found without being told


class Tired(Toy):
    """Gives something else in every second call."""

    calls = 0

    def forward(self, x: Tensor, t: Tensor, prompt: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        self.calls += 1
        return (super().forward(x, t, prompt)[0] * (1.0 if self.calls % 2 else 0.5),)


def test_of_outputs_that_were_equal_the_last_one_counts() -> None:
    def twice(model: Toy) -> Tensor:
        x = noise(1, 64, 8)
        for now, then in pairwise(TIMES):
            for _ in range(2):  # as where bfloat16 rounds two timesteps to one
                v = model(x, torch.tensor([now]), prompt(5))[0]
            x = x + (then - now) * v
        return x

    generation = recorded(Toy(), twice)
    ours = replay(Tired(), generation, Sampler.fit(generation))
    assert moved(ours.result, recorded(Tired(), twice).result) < 1e-6


def test_samples_that_begin_with_the_same_noise() -> None:
    def turned(model: Toy) -> Tensor:
        x, text = noise(1, 64, 8) * torch.tensor([1.0, 1.0, -1.0])[:, None, None], prompt(5, 3)
        for now in TIMES[:4]:
            x = 0.3 * model(x, torch.full((3,), now), text)[0] - x  # nearer to another sample than to itself
        return x

    wrong, apart, sampler = compared(turned, Toy(0.3))
    assert min(sampler.explained) > 1 - 1e-9
    assert wrong < 1e-5 * apart


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_linear_sampler(data: st.DataObject) -> None:
    """Of latents and outputs of up to three steps before, with guidance on or off in any of the steps."""
    number = st.floats(-0.5, 0.5)
    steps = data.draw(st.integers(2, 5), "steps")
    depth = data.draw(st.integers(0, 2), "depth")
    guided = data.draw(st.lists(st.booleans(), min_size=steps, max_size=steps), "guided")
    rows = data.draw(st.integers(1, 3), "rows")
    table = [[[data.draw(number) for _ in range(3)] for _ in range(depth + 1)] for _ in range(steps)]
    seed = data.draw(st.integers(0, 99), "seed")

    def loop(model: Toy) -> Tensor:
        x, given = noise(rows, 64, 8, seed=seed).double(), []
        for step, joined in enumerate(guided):
            prompts = [prompt(5, rows), prompt(6, rows)] if joined else [prompt(5, rows)]
            batch, time = torch.cat([x] * len(prompts)), torch.full((len(prompts) * rows,), 1 - step / steps)
            outputs = model(batch, time, torch.cat(prompts).double())[0].chunk(len(prompts))
            given.append((x, outputs[0], outputs[-1]))
            x = 0.7 * x + sum(
                factor * tensor
                for factors, before in zip(table[step], reversed(given), strict=False)
                for factor, tensor in zip(factors, before, strict=True)
            )
        return x

    wrong, apart, sampler = compared(loop, Toy(0.3).double(), Toy().double())
    assert min(sampler.explained) > 1 - 1e-10
    assert wrong <= 1e-6 * apart + 1e-9
