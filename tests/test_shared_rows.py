"""Several requests in one call: each is what it would be alone, at whatever step and tier the others are."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from runtime.base.errors import BusyError, EditError, InputError, NotFiniteError, PolicyError
from runtime.face.transformer import CompiledTransformer
from runtime.routing.policy import EXTRAPOLATE, REUSE, SKIP, Decider, RoutingPolicy
from runtime.routing.reuse import ReusePolicy
from runtime.routing.schedule import ScheduledPolicy
from tests import programs

BLOCKS = 3
TIERS: dict[str, Decider] = {
    "routed": RoutingPolicy(threshold=0.3, margin=0.4, max_reuse=2),
    "every third": ReusePolicy(2),
    "ahead": ReusePolicy(1, order=1),
    "by input": ReusePolicy(3, change=0.3, watches="input"),
    "by first block": ReusePolicy(3, change=0.5, watches="first block"),
    "scheduled": ScheduledPolicy(
        np.array([[1.0, 0.5, 0.25], [REUSE, SKIP, 0.25], [0.5, 0.5, REUSE], [EXTRAPOLATE, REUSE, 1.0]])
    ),
}
CONTEXTS = ("cond", "uncond")


def model(engine: str = "torch") -> CompiledTransformer:
    compiled = CompiledTransformer(programs.make(), engine)
    for name, policy in TIERS.items():
        compiled.add_tier(name, policy)
    return compiled


@dataclass
class Job:
    """A loop of its own: Euler steps with guidance."""

    name: str
    tier: str | None
    rows: int
    steps: int
    step: int = 0
    latents: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.latents = programs.inputs(self.rows, len(self.name) + 7 * ord(self.name[-1]))["hidden_states"]

    @property
    def over(self) -> bool:
        return self.step == self.steps

    def arguments(self, context: str) -> dict[str, Tensor]:
        prompt = programs.inputs(self.rows, CONTEXTS.index(context) + len(self.name))["encoder_hidden_states"]
        timestep = torch.full((self.rows,), 1.0 - self.step / self.steps)
        return {"hidden_states": self.latents, "encoder_hidden_states": prompt, "timestep": timestep}

    def advance(self, outputs: dict[str, Tensor]) -> None:
        guided = outputs["uncond"] + 2.0 * (outputs["cond"] - outputs["uncond"])
        self.latents = self.latents - 0.1 * guided / self.steps
        self.step += 1


def together(compiled: CompiledTransformer, jobs: Sequence[Job]) -> None:
    """One step of all of them."""
    found: list[dict[str, Tensor]] = [{} for _ in jobs]
    with compiled.request([job.name for job in jobs], tier=[job.tier for job in jobs]):
        for context in CONTEXTS:
            each = [job.arguments(context) for job in jobs]
            with compiled.cache_context(context):
                output = compiled(**{name: torch.cat([one[name] for one in each]) for name in each[0]}).sample
            for one, own in zip(found, output.chunk(len(jobs)), strict=True):
                one[context] = own
    for job, outputs in zip(jobs, found, strict=True):
        job.advance(outputs)


def alone(compiled: CompiledTransformer, job: Job) -> Job:
    """The same job by itself, from its beginning."""
    twin = type(job)(job.name, job.tier, job.rows, job.steps)
    while not twin.over:
        together(compiled, [twin])
    return twin


def decisions(compiled: CompiledTransformer, name: str) -> list[list[float]]:
    trace = [one for one in compiled.trace if one.request == name][-1].arrays()
    order = np.lexsort([trace[key] for key in ("row", "block", "context", "step")])
    return [trace[key][order].tolist() for key in ("step", "block", "row", "done", "width")]


@st.composite
def schedules(draw: st.DrawFn) -> tuple[list[Job], list[list[int]]]:
    """Jobs, and which of them are called together in each tick; a job may begin late and pause."""
    rows = draw(st.integers(1, 2))
    jobs = [
        Job(f"job {n}", draw(st.sampled_from([None, *TIERS])), rows, draw(st.integers(1, 4)))
        for n in range(draw(st.integers(2, 4)))
    ]
    everyone = list(range(len(jobs)))
    ticks = draw(st.lists(st.lists(st.sampled_from(everyone), min_size=1, unique=True), max_size=10))
    return jobs, ticks + [everyone] * 4


@settings(max_examples=40, deadline=None)
@given(schedules())
def test_each_is_what_it_is_alone(drawn: tuple[list[Job], list[list[int]]]) -> None:
    jobs, ticks = drawn
    compiled, twins = model(), model()
    for tick in ticks:
        called = [jobs[n] for n in tick if not jobs[n].over]
        if called:
            together(compiled, called)
    for job in jobs:
        assert job.over
        torch.testing.assert_close(job.latents, alone(twins, job).latents)
        assert decisions(compiled, job.name) == decisions(twins, job.name)


def test_rows_at_one_width_share_an_engine_call_whosever_they_are() -> None:
    compiled = model()
    jobs = [Job("a", "every third", 1, 4), Job("b", "every third", 1, 4)]
    together(compiled, jobs)
    assert compiled.counters.engine_calls == 2 * BLOCKS  # two contexts
    together(compiled, [jobs[0]])
    compiled.reset_counters()
    together(compiled, jobs)  # one reuses for the second time, the other for the first
    assert (compiled.counters.engine_calls, compiled.counters.reused) == (0, 2 * 2 * BLOCKS)


def test_they_end_together_or_alone() -> None:
    compiled = model()
    jobs = [Job("a", "every third", 1, 6), Job("b", "every third", 1, 6)]
    together(compiled, jobs)
    with compiled.request("a"):
        compiled.reset()
    compiled.reset_counters()
    together(compiled, jobs)
    assert (compiled.counters.computed, compiled.counters.reused) == (2 * BLOCKS, 2 * BLOCKS)
    with compiled.request(["a", "b"]):
        compiled.reset()
    compiled.reset_counters()
    together(compiled, jobs)
    assert compiled.counters.computed == 4 * BLOCKS


def test_an_error_ends_all_of_them() -> None:
    class Failing(ReusePolicy):
        def decide(self, step: int, *rest: object) -> list[float]:
            if step == 1:
                raise PolicyError("no")
            return super().decide(step, *rest)  # type: ignore[arg-type]

    compiled = model()
    compiled.add_tier("failing", Failing(2))
    jobs = [Job("a", "failing", 1, 6), Job("b", "every third", 1, 6)]
    together(compiled, jobs)
    with pytest.raises(PolicyError):
        together(compiled, jobs)
    compiled.reset_counters()
    together(compiled, jobs[1:])
    assert compiled.counters.reused == 0


def test_one_tier_for_all_and_one_chosen_for_all() -> None:
    compiled = model()
    jobs = [Job("a", None, 1, 3), Job("b", None, 1, 3)]
    with compiled.request(["a", "b"], tier="scheduled"):
        given = {name: torch.cat([job.arguments("cond")[name] for job in jobs]) for name in jobs[0].arguments("cond")}
        compiled(**given)
    widths = [one.arrays()["width"].tolist() for one in compiled.trace]
    assert widths == [[1.0, 0.5, 0.25]] * 2
    with compiled.decided_by(TIERS["every third"]):
        together(compiled, [Job("c", None, 1, 3), Job("d", "scheduled", 1, 3)])
    assert [one.arrays()["width"].tolist()[:3] for one in list(compiled.trace)[-2:]] == [[1.0] * 3, [1.0, 0.5, 0.25]]


def test_none_among_tiers_goes_back_to_what_is_chosen_for_all() -> None:
    compiled = model()
    jobs = [Job("a", None, 1, 3), Job("b", "scheduled", 1, 3)]
    with compiled.decided_by(TIERS["every third"]), compiled.request(["a", "b"], tier=["scheduled", "scheduled"]):
        together(compiled, jobs)
    assert [one.arrays()["width"].tolist()[:3] for one in compiled.trace] == [[1.0] * 3, [1.0, 0.5, 0.25]]


def bad_names() -> Iterator[tuple[list[str], object, str]]:
    yield ["a", "a"], None, "a name of its own"
    yield [], None, "a name of its own"
    yield ["a", "b"], ["routed"], "1 entries for 2 requests"
    yield ["a", "b"], [None, "nothing"], "no tier is called 'nothing'"


@pytest.mark.parametrize(("names", "tier", "told"), list(bad_names()))
def test_names_and_tiers_that_make_no_sense(names: list[str], tier: object, told: str) -> None:
    with pytest.raises(EditError, match=told), model().request(names, tier=tier):  # type: ignore[arg-type]
        pytest.fail("entered")


def test_rows_that_cannot_be_shared_equally_are_refused_and_change_nothing() -> None:
    compiled = model()
    jobs = [Job("a", "every third", 1, 6), Job("b", "every third", 1, 6)]
    together(compiled, jobs)
    with pytest.raises(InputError, match="3 rows, which 2 requests"), compiled.request(["a", "b"]):
        compiled(**programs.inputs(3))
    compiled.reset_counters()
    together(compiled, jobs)
    assert compiled.counters.reused == 4 * BLOCKS


def test_what_is_not_finite_names_the_requests() -> None:
    compiled = CompiledTransformer(programs.make(routers=False), "torch")
    steps = ScheduledPolicy(np.array([[1.0] * BLOCKS, [REUSE] * BLOCKS]))
    jobs = [Job("a", None, 1, 3), Job("b", None, 1, 3)]
    with compiled.decided_by(steps):
        together(compiled, jobs)
        for branch in compiled._session.requests._named["b"]._branches:
            branch.banks[1].deltas[0].fill_(torch.inf)
        with pytest.raises(NotFiniteError, match=r"step 1 of request 'a', step 1 of request 'b'.*reused; rows 1\)"):
            together(compiled, jobs)


def test_one_that_runs_in_another_thread_is_refused() -> None:
    compiled = model()
    together(compiled, [Job("a", None, 1, 3), Job("b", None, 1, 3)])
    busy = compiled._session.requests._named["b"].busy
    refused: list[Exception] = []

    def work() -> None:
        try:
            together(compiled, [Job("a", None, 1, 3), Job("b", None, 1, 3)])
        except BusyError as error:
            refused.append(error)

    with busy:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert "'b'" in str(refused[0])
    together(compiled, [Job("a", None, 1, 3), Job("b", None, 1, 3)])  # nothing stayed locked


@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
def test_on_each_engine(engine: str) -> None:
    compiled, twins = model(engine), model(engine)
    jobs = [Job(f"job {n}", tier, 2, 4) for n, tier in enumerate(TIERS)]
    together(compiled, jobs[:2])
    for _ in range(4):
        together(compiled, [job for job in jobs if not job.over])
    for job in jobs:
        torch.testing.assert_close(job.latents, alone(twins, job).latents)
