"""Generations of every kind over one compiled transformer: each is what it would be alone, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import edit_compile
from edit_compile import CompiledTransformer as Compiled
from edit_compile import ElasticTransformer
from tests.conftest import unsettle
from tests.generations import GUIDANCE, POLICY, Generation, draw, make, one_thread, steps
from tests.models import tiny_flux
from tests.test_transformer import in_threads

THREADS = 8


@pytest.fixture(scope="module")
def shared() -> Iterator[Compiled]:
    """A model whose routers make every decision, traced as it is called."""
    model, inputs = tiny_flux(double=1, single=1)
    elastic = edit_compile.elasticize(model, inputs)
    settle_around_one_half(elastic)
    with one_thread():
        yield edit_compile.compile(elastic, engine="torch", policy=POLICY)


@pytest.fixture(scope="module")
def apart(shared: Compiled) -> Compiled:
    """Another one over the same program, once that has grown."""
    for side in (3, 4):
        for text in (4, 6):
            for beside in (False, True):
                make(shared, Generation(side=side, text=text, steps=2, beside=beside))
    return Compiled(shared.program, "torch", POLICY)


def settle_around_one_half(elastic: ElasticTransformer) -> None:
    """Routers of which every decision is as likely as another."""
    unsettle(elastic)
    with torch.no_grad():
        for router in elastic.routers:
            router.gate.weight.mul_(0.1)


def alone(model: Compiled, generation: Generation) -> list[Tensor]:
    """What a generation gives in a thread of its own, in which nothing came before."""
    (outputs,) = in_threads([lambda: make(model, generation)])
    return outputs


@pytest.mark.parametrize(("seed", "each"), [(0, 20), pytest.param(100, 125, marks=pytest.mark.slow)])
def test_generations_on_many_threads_are_what_they_are_alone(
    shared: Compiled, request: pytest.FixtureRequest, seed: int, each: int
) -> None:
    drawn = [draw(seed + thread, each) for thread in range(THREADS)]
    together = in_threads([lambda mine=mine: [make(shared, one) for one in mine] for mine in drawn])
    apart = request.getfixturevalue("apart")  # forms of call were traced while others ran
    different = []
    for mine, results in zip(drawn, together, strict=True):
        for number, (generation, result) in enumerate(zip(mine, results, strict=True)):
            expected = alone(apart, generation)
            if len(result) != len(expected) or not all(map(torch.equal, result, expected)):
                different.append((mine[number - 1 : number], generation))
    assert not different, f"{len(different)} of {THREADS * each}, after and of: {different[:3]}"
    done = shared.counters
    assert min(done.skipped, done.reused, done.computed) > 20 * each


def test_a_hundred_requests_step_by_step_are_what_they_are_alone(shared: Compiled, apart: Compiled) -> None:
    drawn = [one for one in draw(99, 150) if one.ending in ("reset", "open")][:50] + [
        Generation(noise=n) for n in range(50)
    ]
    outputs: list[list[Tensor]] = [[] for _ in drawn]
    running = {number: steps(shared, one, outputs[number]) for number, one in enumerate(drawn)}
    while running:
        for number, each in list(running.items()):
            with shared.request(f"job {number}"):
                if next(each, "done") == "done":
                    shared.reset()
                    del running[number]
    for generation, got in zip(drawn, outputs, strict=True):
        assert all(map(torch.equal, got, alone(apart, generation)))


def test_what_is_dropped_for_want_of_memory_is_said_and_computed_again(shared: Compiled, apart: Compiled) -> None:
    small = Compiled(shared.program, "torch", POLICY)
    small.memory_limit = 1
    outputs: list[Tensor] = []
    running = {name: steps(small, Generation(steps=4, noise=n), outputs) for n, name in enumerate("ab")}
    with pytest.warns(RuntimeWarning, match="go on at their own step"):
        for _ in range(4):
            for name, each in running.items():
                with small.request(name):
                    next(each)
    for record in small.trace:
        assert set(record.arrays()["step"].tolist()) == {0, 1, 2, 3}
        assert 1 not in record.arrays()["done"]  # nothing was left to reuse


BEFORE = Generation(guidance="unnamed", steps=5, ending="cancelled")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(
            replace(BEFORE, side=3, stop=2),
            replace(BEFORE, sampler="image to image", guidance="none", prompt=1, ending="open"),
            id="another size",
        ),
        pytest.param(
            replace(BEFORE, sampler="image to image", start=0.06),
            replace(BEFORE, sampler="image to image", start=0.06, noise=1, ending="open"),
            id="a gentle change of an image, again with other noise",
        ),
        pytest.param(
            replace(BEFORE, sampler="image to image", stop=1),
            replace(BEFORE, sampler="image to image", start=0.65, ending="open"),
            id="a stronger change of the same image with the same noise",
        ),
        pytest.param(
            replace(BEFORE, guidance="contexts"),
            replace(BEFORE, guidance="contexts", turned=True, ending="open"),
            id="its branches in the other order",
        ),
        pytest.param(
            replace(BEFORE, guidance="none", beside=True, stop=1),
            replace(BEFORE, guidance="none", beside=True, noise=1, ending="open"),
            id="other noise beside the same image",
        ),
    ],
)
def test_after_a_cancel_comes(apart: Compiled, before: Generation, after: Generation) -> None:
    for stop in range(before.stop, 5):
        make(apart, replace(before, stop=stop))
        results, steps_of = [], []
        for run in (make, alone):
            results.append(run(apart, after))
            steps_of.append(apart.trace[-1].arrays()["step"].tolist())
        assert all(map(torch.equal, *results)), stop
        assert steps_of[0] == steps_of[1], stop


@pytest.mark.parametrize("sampler", ["euler", "heun", "multistep"])
@pytest.mark.parametrize("guidance", GUIDANCE)
def test_unnamed_calls_of_one_image_are_one_generation(apart: Compiled, sampler: str, guidance: str) -> None:
    for beside, batch in ((False, 2), (True, 3)):
        one = Generation(sampler, guidance, 6, batch=batch, beside=beside, ending="open")
        model = Compiled(apart.program, "torch", POLICY)
        unnamed = make(model, one)
        assert all(map(torch.equal, unnamed, make(model, replace(one, name="trusted"))))
        assert len(model.trace) == 2


@pytest.mark.parametrize("guidance", GUIDANCE[:5])
def test_the_same_image_again_after_a_cancel_at_any_step(apart: Compiled, guidance: str) -> None:
    whole = Generation(guidance=guidance, steps=5)
    expected = alone(apart, whole)
    for stop in range(5):
        for other in (whole, Generation(guidance=guidance, steps=5, sampler="image to image")):
            make(apart, Generation(guidance=guidance, steps=5, ending="cancelled", stop=stop))
            wanted = expected if other is whole else alone(apart, other)
            assert all(map(torch.equal, make(apart, other), wanted)), (stop, other)


def test_guidance_may_come_and_go_in_one_generation(shared: Compiled, apart: Compiled) -> None:
    model = Compiled(shared.program, "torch", POLICY)
    make(model, Generation(guidance="switched off", steps=6, ending="open"))
    make(model, Generation(guidance="interval", steps=6, noise=1, prompt=1, ending="open"))
    first, second = model.trace
    assert set(first.arrays()["step"].tolist()) == set(second.arrays()["step"].tolist()) == set(range(6))


def test_a_sampler_that_adds_noise_reuses_nothing_unless_it_has_a_name(shared: Compiled, apart: Compiled) -> None:
    inputs = {
        name: tensor[:1] if name.startswith(("enc", "pool")) else tensor for name, tensor in tiny_flux()[1].items()
    }
    draws = torch.Generator().manual_seed(0)

    def noisy(model: Compiled, name: str | None) -> set[int]:
        with model.request(name) if name else nullcontext():
            for moment in (1.0, 0.8, 0.6, 0.4, 0.2):
                latents = torch.randn(1, 16, 8, generator=draws)
                model(**{**inputs, "hidden_states": latents, "timestep": torch.tensor([moment])})
        return {int(step) for record in model.trace for step in record.arrays()["step"]}

    model = Compiled(shared.program, "torch", POLICY)
    with pytest.warns(RuntimeWarning, match=r"compiled\.request"):
        assert noisy(model, None) == {0, 2, 3, 4}
    assert model.counters.reused == 0
    model = Compiled(shared.program, "torch", POLICY)
    assert noisy(model, "sde") == {0, 1, 2, 3, 4}
    assert model.counters.reused > 0
