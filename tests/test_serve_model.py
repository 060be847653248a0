"""Images of the batcher of examples/serve beside those drawn alone, on a small FLUX with random weights."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edit_compile import CompiledTransformer, ReusePolicy
from examples.fashion_mnist.call import CHANNELS, TOKENS, inputs
from examples.fashion_mnist.sample import sample
from examples.serve.batcher import Batcher
from examples.serve.jobs import Ask, Job, Refused
from examples.serve.sampling import STEPS, EulerSampler
from tests.serve_model import HALF, small_compiled

ALONE: dict[Ask, torch.Tensor] = {}


class Failing(ReusePolicy):
    """Raises in its third step."""

    def decide(self, step: int, *given: object) -> list[float]:  # type: ignore[override]
        if step == 2:
            raise ArithmeticError("a policy that fails")
        return super().decide(step, *given)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def compiled() -> CompiledTransformer:
    made = small_compiled()
    made.add_tier("failing", Failing(1))
    return made


@pytest.fixture
def batcher(compiled: CompiledTransformer) -> Iterator[Batcher]:
    made = Batcher(EulerSampler(compiled), max_batch=4, max_waiting=100)
    yield made
    made.close()


def alone(compiled: CompiledTransformer, ask: Ask) -> torch.Tensor:
    """What a server with nothing else to do would draw, by the sampler of the example."""
    if ask not in ALONE:
        with compiled.request(tier=ask.tier):
            steps = ask.steps or (len(HALF) if ask.tier == "half" else STEPS)
            ALONE[ask] = sample(compiled, torch.tensor([ask.label]), steps=steps, seed=ask.seed)[0]
    return ALONE[ask]


def check(compiled: CompiledTransformer, jobs: list[Job], asked: list[Ask]) -> None:
    for job, ask in zip(jobs, asked, strict=True):
        torch.testing.assert_close(job.future.result(60).image, alone(compiled, ask), rtol=1e-4, atol=1e-5)


ASKED = st.one_of(
    st.builds(Ask, label=st.integers(0, 9), seed=st.integers(0, 2), steps=st.integers(1, 7)),
    st.builds(Ask, label=st.integers(0, 9), seed=st.integers(0, 2), tier=st.just("half")),
    st.builds(Ask, label=st.integers(0, 9), seed=st.just(0), tier=st.just("every third"), steps=st.integers(1, 9)),
)


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(asked=st.lists(ASKED, min_size=1, max_size=9), seed=st.integers(0, 9))
def test_images_are_those_drawn_alone(
    compiled: CompiledTransformer, batcher: Batcher, asked: list[Ask], seed: int
) -> None:
    pauses, jobs = random.Random(seed), []
    for ask in asked:
        jobs.append(batcher.submit(ask))
        time.sleep(pauses.random() * 0.02)  # so that others are at any step
    check(compiled, jobs, asked)


def test_images_are_those_drawn_alone_while_others_are_cancelled(
    compiled: CompiledTransformer, batcher: Batcher
) -> None:
    kept = [Ask(n, seed=n, tier="half") if n % 2 else Ask(n, seed=n, steps=8) for n in range(6)]
    jobs, gone = [], []
    for ask in kept:
        jobs.append(batcher.submit(ask))
        gone += [batcher.submit(Ask(1, seed=8, tier="every third")), batcher.submit(Ask(2, seed=9), timeout=0.03)]
        gone[-2].future.cancel()
        time.sleep(0.01)
    check(compiled, jobs, kept)
    assert batcher.drain(60)
    for job in gone:
        with pytest.raises((CancelledError, TimeoutError)):
            job.future.result(0)
    for job in (*jobs, *gone):  # under an ended job's name a generation would begin anew: nothing of it is kept
        with compiled.request(job.name, tier="every third"):
            compiled(**inputs(torch.randn(1, TOKENS, CHANNELS), torch.tensor([0.1]), torch.tensor([3])))
            compiled.reset()
        assert compiled.trace[-1].request == job.name and set(compiled.trace[-1].arrays()["step"]) == {0}


def test_a_job_that_fails_leaves_the_others_their_images(compiled: CompiledTransformer, batcher: Batcher) -> None:
    asked = [Ask(1, seed=1, steps=12), Ask(2, seed=2, tier="half"), Ask(3, seed=3, tier="every third", steps=9)]
    jobs = [batcher.submit(ask) for ask in asked]
    failing = batcher.submit(Ask(4, tier="failing", steps=9))
    with pytest.raises(ArithmeticError, match="a policy that fails"):
        failing.future.result(60)
    check(compiled, jobs, asked)
    assert max(job.future.result(0).restarts for job in jobs) == 1


def test_the_share_of_flops_is_what_the_counters_say(compiled: CompiledTransformer, batcher: Batcher) -> None:
    for ask in (Ask(0, steps=3), Ask(0, tier="half"), Ask(0, tier="every third", steps=8)):
        compiled.reset_counters()
        found = batcher.submit(ask).future.result(60).flops_share
        counted = compiled.counters
        assert found == pytest.approx(counted.flops / counted.dense_flops)
        assert (found == 1) == (ask.tier is None)


@pytest.mark.parametrize(
    ("ask", "told"),
    [
        (Ask(0, tier="best"), "'half', 'every third'"),
        (Ask(10), "label is 10"),
        (Ask(-1), "label is -1"),
        (Ask(0, seed=-1), "seed is -1"),
        (Ask(0, seed=2**63), "seed is"),
        (Ask(0, steps=201), "steps is 201"),
        (Ask(0, steps=-1), "steps is -1"),
        (Ask(0, steps=0), "steps is 0"),
        (Ask(0, tier="half", steps=7), "made for 6 steps, not 7"),
    ],
)
def test_what_cannot_be_drawn_is_refused(compiled: CompiledTransformer, ask: Ask, told: str) -> None:
    with pytest.raises(Refused, match=told):
        EulerSampler(compiled).check(ask)


def test_a_tier_brings_its_number_of_steps(compiled: CompiledTransformer) -> None:
    sampler = EulerSampler(compiled)
    assert [sampler.check(Ask(0, tier=tier)).steps for tier in ("half", "every third", None)] == [6, STEPS, STEPS]
    assert sampler.check(Ask(0, tier="every third", steps=5)).steps == 5
