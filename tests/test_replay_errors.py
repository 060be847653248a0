"""What cannot be replayed is said, and which call it is; how replays are measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edit_compile import (
    CallsError,
    CompiledTransformer,
    EditError,
    Generation,
    RecordedCall,
    Sampler,
    latents_of,
    mean_quality,
    quality,
    replay,
)
from edit_compile.calls.result_quality import Mean
from tests import programs
from tests.loops import Toy, prompt, recorded
from tests.models import noise


def loop(model: Toy) -> Tensor:
    """Three steps, of two calls each."""
    x = noise(1, 64, 8)
    for t in (0.9, 0.6, 0.3):
        one, other = (model(x, torch.tensor([t]), prompt(seed))[0] for seed in (5, 6))
        x = x - 0.3 * (3 * one - 2 * other)
    return x


@pytest.fixture(scope="module")
def generation() -> Generation:
    return recorded(Toy(), loop)


def other_calls(change: Callable[[int, RecordedCall], RecordedCall]) -> Callable[[Generation], Generation]:
    return lambda one: replace(one, calls=tuple(change(index, call) for index, call in enumerate(one.calls)))


def with_arguments(**given: Any) -> Callable[[Generation], Generation]:
    return other_calls(lambda _, call: replace(call, arguments={**call.arguments, **given}))


def cut(index: int, call: RecordedCall) -> RecordedCall:
    if index != 3:
        return call
    arguments = {**call.arguments, "x": call.arguments["x"][:, :32]}
    return replace(call, arguments=arguments, outputs=(call.outputs[0][:, :32],))


@pytest.mark.parametrize(
    ("change", "given", "told"),
    [
        (lambda one: replace(one, calls=one.calls[:1]), (), "a generation of 1 calls"),
        (lambda one: replace(one, calls=one.calls[:2]), (), "are not found"),
        (lambda one: replace(one, calls=one.calls[:2]), ("x", 0), "the same in all calls"),
        (with_arguments(x=noise(1, 64, 8)), (), "are not found"),
        (lambda one: one, ("y", 0), r"calls\[0\] has no tensor 'y'; it has prompt, t, x"),
        (lambda one: one, ("x", 1), r"calls\[0\] has no output 1; it has 1"),
        (lambda one: one, ("t", 0), r"does not advance latents of \(1,\)"),
        (other_calls(cut), ("x", 0), r"calls\[3\] has latents of shape \(1, 32, 8\), calls\[0\] of \(1, 64, 8\)"),
        (lambda one: replace(one, result=noise(1, 28, 28)), (), r"the result is of shape \(1, 28, 28\)"),
    ],
)
def test_samplers_that_cannot_be_told(
    generation: Generation, change: Callable[[Generation], Generation], given: tuple[Any, ...], told: str
) -> None:
    with pytest.raises(CallsError, match=told):
        Sampler.fit(change(generation), *given)


def test_two_latents_are_refused(generation: Generation) -> None:
    two = other_calls(
        lambda _, call: RecordedCall({**call.arguments, "z": 2 * call.arguments["x"]}, None, call.outputs * 2)
    )(generation)
    with pytest.raises(CallsError, match="'x' by output 0, 'z' by output 1"):
        Sampler.fit(two)
    assert Sampler.fit(two, "z").place.latents == "z"


def test_calls_of_another_model(generation: Generation) -> None:
    sampler = Sampler.fit(generation)
    with pytest.raises(CallsError, match=r"arguments of calls\[0\].* unexpected keyword argument 'prompt'"):
        replay(lambda x, t: x, generation, sampler)
    with pytest.raises(CallsError, match=r"arguments of calls\[0\].* missing a required argument: 'mask'"):
        replay(lambda x, t, prompt, mask: x, generation, sampler)
    with pytest.raises(CallsError, match=r"calls\[0\].*It takes hidden_states, .* and no 'x'"):
        replay(CompiledTransformer(programs.make(), "torch"), generation, sampler)
    with pytest.raises(CallsError, match=r"calls\[0\] of 6 gave tensors of shapes \[\(1, 8\)\]"):
        replay(lambda x, t, prompt: prompt, generation, sampler)


def test_a_model_that_goes_astray(generation: Generation) -> None:
    def astray(x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        return x / (t > 0.7)[:, None, None]

    with pytest.raises(EditError, match=r"calls\[2\] of 6 gave NaN or infinity"):
        replay(astray, generation, Sampler.fit(generation))


def test_the_sampler_of_another_generation(generation: Generation) -> None:
    sampler = Sampler.fit(generation)
    for other in (
        replace(generation, calls=generation.calls[:4]),
        replace(generation, calls=generation.calls[::2]),
        replace(generation, result=None),
    ):
        with pytest.raises(CallsError, match="fitted to a generation of other steps"):
            replay(Toy(), other, sampler)
    with pytest.raises(CallsError, match=r"calls\[0\] has not the latents 'hidden_states'"):
        replay(Toy(), generation, replace(sampler, place=replace(sampler.place, latents="hidden_states")))


def test_a_sampler_serves_generations_of_its_schedule(generation: Generation) -> None:
    def another(model: Toy) -> Tensor:
        return loop(lambda x, t, text: model(x, t, text + 1))  # type: ignore[arg-type]

    ours = replay(Toy(0.3), recorded(Toy(), another), Sampler.fit(generation))
    torch.testing.assert_close(ours.result, recorded(Toy(0.3), another).result, atol=1e-5, rtol=0)


def test_latents_by_the_manifest() -> None:
    assert latents_of(CompiledTransformer(programs.make(), "torch")) == ("hidden_states", 0)


def test_recorded_tensors_are_not_written_to(generation: Generation) -> None:
    before = [tensor.clone() for call in generation.calls for tensor in (*call.arguments.values(), *call.outputs)]
    replay(Toy(0.3), generation, Sampler.fit(generation))
    after = [tensor for call in generation.calls for tensor in (*call.arguments.values(), *call.outputs)]
    assert all(map(torch.equal, before, after))


def test_quality_is_psnr_of_the_result(generation: Generation) -> None:
    ours = replay(Toy(), generation, Sampler.fit(generation))
    assert quality(ours, generation) == math.inf
    reach = float(generation.result.max() - generation.result.min())
    off = replace(ours, result=generation.result + reach / 10)
    assert quality(off, generation) == pytest.approx(20.0, abs=1e-4)
    with pytest.raises(CallsError, match="other calls"):
        quality(ours, replace(generation, result=None))


def test_quality_without_a_result_is_of_the_last_call(generation: Generation) -> None:
    silent = replace(generation, result=None)
    sampler = Sampler.fit(silent)
    assert len(sampler.explained) == 2
    assert quality(replay(Toy(), silent, sampler), silent) == math.inf
    ours, last = replay(Toy(0.3), silent, sampler), silent.calls[-1]
    new, old = (
        torch.cat([pair[0], pair[1]])
        for pair in ((ours.latents[-1], ours.outputs[-1][0]), (last.arguments["x"], last.outputs[0]))
    )
    expected = 20 * torch.log10((old.max() - old.min()) / (new - old).square().mean().sqrt())
    assert quality(ours, silent) == pytest.approx(float(expected), abs=1e-3)


def test_the_mean_and_its_interval() -> None:
    values = [31.0, 28.5, 40.2, 35.1, 33.3, 29.9, 36.6, 30.1]
    found = mean_quality(values)
    assert found.value == pytest.approx(sum(values) / len(values))
    assert found.high - found.value == pytest.approx(found.value - found.low)
    assert found.value - found.low == pytest.approx(2.364624 * statistics.stdev(values) * math.sqrt(2 / 8), rel=1e-5)
    assert mean_quality([30.0, 30.0]) == Mean(30.0, 30.0, 30.0)
    assert mean_quality([math.inf, math.inf]) == Mean(math.inf, math.inf, math.inf)
    for unbounded in ([30.0], [30.0, math.inf]):
        assert (mean_quality(unbounded).low, mean_quality(unbounded).high) == (-math.inf, math.inf)
    with pytest.raises(ValueError, match="at least one"):
        mean_quality([])


def test_the_mean_of_as_many_others_is_in_the_interval_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    inside = 0
    for _ in range(1000):
        ours, theirs = draw.normal(30.0, 4.0, (2, 5))
        found = mean_quality(ours)
        inside += found.low <= theirs.mean() <= found.high
    assert 930 <= inside <= 970
