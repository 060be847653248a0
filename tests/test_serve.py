"""The batcher of examples/serve: who is in which call, and every way in which a job can end."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.serve.batcher import Batcher, Watch
from examples.serve.ending import Ending
from examples.serve.jobs import Ask, Draining, Drawn, Job, QueueFull, Refused, Stopped, TimedOut
from tests.serve_stand_in import Counting

SOON = 30.0


class Seen(Watch):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.outcomes: list[str] = []
        self.rows: list[int] = []
        self.waiting: list[int] = []

    def queued(self, waiting: int) -> None:
        self.waiting.append(waiting)

    def advanced(self, rows: int, seconds: float) -> None:
        self.rows.append(rows)

    def ended(self, job: Job, outcome: str) -> None:
        self.outcomes.append(outcome)


Make = Callable[..., tuple[Counting, Batcher, Seen]]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[tuple[Counting, Batcher]] = []

    def make(gated: bool = False, **options: Any) -> tuple[Counting, Batcher, Seen]:
        sampler, seen = Counting(gated), Seen()
        made.append((sampler, Batcher(sampler, watch=seen, **options)))
        return sampler, made[-1][1], seen

    yield make
    for sampler, batcher in made:
        sampler.open()
        batcher.close()


def drawn(job: Job) -> Drawn:
    return job.future.result(SOON)


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + SOON
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


@settings(deadline=None, max_examples=40)
@given(
    asked=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 3)), min_size=1, max_size=12),
    max_batch=st.integers(1, 5),
)
def test_jobs_join_and_leave_at_any_step(asked: list[tuple[int, int]], max_batch: int) -> None:
    sampler = Counting(gated=True)
    batcher = Batcher(sampler, max_batch=max_batch)
    jobs, to_take = [], 0
    for number, (steps, between) in enumerate(asked):
        jobs.append(batcher.submit(Ask(number, seed=7, steps=steps)))
        to_take += steps
        for _ in range(between):
            if to_take > sum(map(len, sampler.calls)):  # else no call would come
                sampler.let_through()
    sampler.open()
    assert [drawn(job).image for job in jobs] == [(n, 7, steps) for n, (steps, _) in enumerate(asked)]
    assert batcher.drain(SOON)
    batcher.close()
    assert all(len(call) <= max_batch for call in sampler.calls)
    entries = [entry for call in sampler.calls for entry in call]
    assert Counter(entries) == Counter((job.name, step) for job in jobs for step in range(job.ask.steps or 0))
    for job in jobs:  # each takes its steps in turn, one a call, from the one it joined in
        where = [number for number, call in enumerate(sampler.calls) for name, _ in call if name == job.name]
        assert where == list(range(where[0], where[0] + len(where)))
    first_calls = [entries.index((job.name, 0)) for job in jobs]
    assert first_calls == sorted(first_calls)
    assert Counter(sampler.ended) == Counter(job.name for job in jobs)


def test_one_call_has_jobs_of_different_steps(make: Make) -> None:
    sampler, batcher, seen = make(gated=True, max_batch=4)
    early = batcher.submit(Ask(0, steps=5))
    sampler.let_through(2)
    sampler.wait_for_call()
    late = batcher.submit(Ask(1, steps=5))
    sampler.open()
    drawn(early), drawn(late)
    assert [(early.name, 3), (late.name, 0)] in sampler.calls
    assert max(seen.rows) == 2


def test_what_cannot_be_had_is_refused_at_once(make: Make) -> None:
    sampler, batcher, _ = make()
    with pytest.raises(Refused, match="'best'"):
        batcher.submit(Ask(0, tier="best"))
    assert batcher.load == (0, 0) and not sampler.calls


def test_a_full_queue_takes_no_more_and_says_when_to_come_again(make: Make) -> None:
    sampler, batcher, seen = make(gated=True, max_batch=1, max_waiting=2)
    running = batcher.submit(Ask(0))
    sampler.wait_for_call()
    waiting = [batcher.submit(Ask(n)) for n in (1, 2)]
    with pytest.raises(QueueFull) as full:
        batcher.submit(Ask(3))
    assert full.value.retry_after is not None and full.value.retry_after >= 1
    assert batcher.load == (1, 2) and 2 in seen.waiting
    sampler.open()
    assert [drawn(job).image[0] for job in (running, *waiting)] == [0, 1, 2]


def test_jobs_that_gave_up_waiting_leave_their_place_in_the_queue(make: Make) -> None:
    sampler, batcher, _ = make(gated=True, max_batch=1, max_waiting=1)
    batcher.submit(Ask(0))
    sampler.wait_for_call()
    given_up = batcher.submit(Ask(1))
    assert given_up.future.cancel()
    next_one = batcher.submit(Ask(2))
    sampler.open()
    assert drawn(next_one).image[0] == 2
    assert given_up.name not in {name for call in sampler.calls for name, _ in call}


def test_a_job_that_is_late_ends_with_its_residuals(make: Make) -> None:
    sampler, batcher, seen = make(gated=True)
    late, other = batcher.submit(Ask(0), timeout=0.05), batcher.submit(Ask(1))
    sampler.wait_for_call()
    time.sleep(0.06)
    sampler.open()
    with pytest.raises(TimedOut, match="not done in"):
        drawn(late)
    assert drawn(other).image[0] == 1
    assert batcher.drain(SOON)
    assert late.name in sampler.ended and Counter(seen.outcomes) == {"timed out": 1, "done": 1}


def test_a_job_can_be_late_before_it_began(make: Make) -> None:
    sampler, batcher, _ = make(gated=True, max_batch=1)
    batcher.submit(Ask(0))
    sampler.wait_for_call()
    late = batcher.submit(Ask(1), timeout=0.01)
    time.sleep(0.02)
    sampler.open()
    with pytest.raises(TimedOut):
        drawn(late)


def test_a_cancelled_job_ends_with_its_residuals_at_the_next_step(make: Make) -> None:
    sampler, batcher, seen = make(gated=True)
    gone, other = batcher.submit(Ask(0, steps=50)), batcher.submit(Ask(1, steps=50))
    sampler.let_through(3)
    sampler.wait_for_call()
    assert gone.future.cancel()
    sampler.open()
    with pytest.raises(CancelledError):
        drawn(gone)
    assert drawn(other).steps == 50
    assert batcher.drain(SOON)
    steps = [step for call in sampler.calls for name, step in call if name == gone.name]
    assert len(steps) <= 5 and gone.name in sampler.ended
    assert Counter(seen.outcomes) == {"cancelled": 1, "done": 1}


def test_a_storm_of_cancelling_leaves_nothing_behind(make: Make) -> None:
    sampler, batcher, seen = make(max_batch=3, max_waiting=200)
    jobs = [batcher.submit(Ask(n, steps=20)) for n in range(100)]
    for job in jobs[::2]:
        job.future.cancel()
    kept = [job for job in jobs if not job.future.cancelled()]
    assert {drawn(job).image[0] for job in kept} == {job.ask.label for job in kept}
    assert batcher.drain(SOON) and batcher.load == (0, 0)
    began = {name for call in sampler.calls for name, _ in call}
    assert began == set(sampler.ended) & began
    assert len(seen.outcomes) == 100 and seen.outcomes.count("done") == len(kept)


def test_draining_finishes_what_there_is_and_takes_no_more(make: Make) -> None:
    sampler, batcher, _ = make(gated=True, max_batch=1)
    jobs = [batcher.submit(Ask(n)) for n in range(3)]
    sampler.wait_for_call()
    assert not batcher.drain(0)
    with pytest.raises(Draining, match="shutting down"):
        batcher.submit(Ask(9))
    waiter = threading.Thread(target=batcher.drain)
    waiter.start()
    sampler.open()
    waiter.join(SOON)
    assert not waiter.is_alive() and all(job.future.done() for job in jobs)


def test_none_is_taken_once_the_server_ends_and_what_there_is_goes_on(make: Make, tmp_path: Path) -> None:
    sampler, batcher, _ = make(gated=True, max_batch=1, ending=Ending(tmp_path).begun)
    jobs = [batcher.submit(Ask(n)) for n in range(3)]
    sampler.wait_for_call()
    Ending(tmp_path).begin()
    with pytest.raises(Draining, match="shutting down"):
        batcher.submit(Ask(9))
    sampler.open()
    assert [drawn(job).image[0] for job in jobs] == [0, 1, 2]


class Slow(Batcher):
    """Leaves others time to look, after each step."""

    def _wait(self) -> bool:
        time.sleep(0.1)
        return super()._wait()


def test_draining_ends_where_the_last_jobs_gave_up_waiting() -> None:
    sampler = Counting(gated=True)
    batcher = Slow(sampler, max_batch=1)
    batcher.submit(Ask(0, steps=1))
    sampler.wait_for_call()
    assert batcher.submit(Ask(1)).future.cancel()
    waiter = threading.Thread(target=batcher.drain, daemon=True)
    waiter.start()
    sampler.open()
    waiter.join(5)
    assert not waiter.is_alive()
    batcher.close()


def test_closing_stops_what_is_not_done(make: Make) -> None:
    sampler, batcher, seen = make(gated=True, max_batch=1)
    jobs = [batcher.submit(Ask(n, steps=1000)) for n in range(2)]
    sampler.wait_for_call()
    closer = threading.Thread(target=batcher.close)
    closer.start()
    until(lambda: batcher._stopping)
    sampler.open()
    closer.join(SOON)
    for job in jobs:
        with pytest.raises(Stopped):
            drawn(job)
    assert seen.outcomes == ["stopped", "stopped"]


def test_a_job_that_fails_takes_no_other_with_it(make: Make) -> None:
    sampler, batcher, seen = make(gated=True, max_batch=4)
    good = [batcher.submit(Ask(0, steps=9)), batcher.submit(Ask(1, steps=8))]
    sampler.let_through(2)
    sampler.wait_for_call()
    bad = batcher.submit(Ask(2, tier="bad"))
    sampler.open()
    with pytest.raises(ArithmeticError, match="is bad"):
        drawn(bad)
    results = [drawn(job) for job in good]
    assert [result.image for result in results] == [(0, 0, 9), (1, 0, 8)]
    assert [result.restarts for result in results] == [1, 1]
    assert Counter(seen.outcomes) == {"failed": 1, "done": 2}
    fresh = batcher.submit(Ask(3))
    assert drawn(fresh).restarts == 0


def test_a_job_that_cannot_begin_or_end_fails_alone(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, batcher, _ = make()
    with pytest.raises(ValueError, match="cannot begin"):
        drawn(batcher.submit(Ask(0, tier="unusable")))
    monkeypatch.setattr(sampler, "image", lambda _: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        drawn(batcher.submit(Ask(0)))
    monkeypatch.undo()
    assert drawn(batcher.submit(Ask(5))).image[0] == 5


def test_health_says_that_no_step_ends(make: Make) -> None:
    sampler, batcher, _ = make(gated=True)
    batcher.check(stalled=0)  # nothing to do is no stall
    batcher.submit(Ask(0))
    sampler.wait_for_call()
    batcher.check()
    time.sleep(0.01)
    with pytest.raises(RuntimeError, match="no step"):
        batcher.check(stalled=0)


def test_health_says_that_the_batcher_died(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    sampler, batcher, seen = make()

    def broken(waiting: int) -> None:
        raise OSError("no more")

    sampler.gated = True
    job = batcher.submit(Ask(0))
    sampler.wait_for_call()
    seen.queued = broken  # type: ignore[method-assign]
    sampler.open()
    with pytest.raises(Stopped):
        drawn(job)
    until(lambda: batcher._crash is not None)
    with pytest.raises(RuntimeError, match="died"):
        batcher.check()
    with pytest.raises(Draining):
        batcher.submit(Ask(1))


@pytest.mark.parametrize("options", [{"max_batch": 0}, {"max_batch": 17}, {"max_waiting": 0}])
def test_sizes_that_cannot_be(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Batcher(Counting(), **options)
