"""Tuning: schedules that cost least, tiers that hold what they predict, and errors that say what to do."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from typer.testing import CliRunner

import edit_compile
from edit_compile import CompiledTransformer, Generation, Sampler, latents_of, quality, replay
from edit_compile.calls.generations import CallsError
from edit_compile.cli import app
from edit_compile.tuning.fewer_steps import FewerSteps
from edit_compile.tuning.influence import Influence
from edit_compile.tuning.intervals import error_products, intervals
from edit_compile.tuning.schedules import Predicted, Schedule, even, predicted_best
from runtime.base.errors import PolicyError
from tests import programs

KINDS = ("double", "single")
STEPS = 8


@pytest.fixture(scope="module")
def compiled() -> CompiledTransformer:
    return CompiledTransformer(programs.make(KINDS, seed=3, routers=False), "torch")


@pytest.fixture(scope="module")
def recording(compiled: CompiledTransformer, tmp_path_factory: pytest.TempPathFactory) -> list[Generation]:
    folder = tmp_path_factory.mktemp("calls")
    with edit_compile.record(compiled, folder) as recorder:
        for seed in range(4):
            with recorder.generation():
                recorder.result(sampled(compiled, seed))
    return list(edit_compile.Recording(folder))


def sampled(
    model: nn.Module, seed: int, steps: int = STEPS, rows: int = 2, named: bool = True, scale: float = 0.1
) -> Tensor:
    """Euler steps with guidance, gentle enough for the small model."""
    given, moments = programs.inputs(rows, seed), torch.linspace(1, 0, steps + 1)
    x, texts = given["hidden_states"], {"cond": given["encoder_hidden_states"], "uncond": torch.zeros(rows, 3, 8)}
    for now, then in pairwise(moments):
        v = {}
        for branch, text in texts.items():
            with model.cache_context(branch) if named else nullcontext():
                v[branch] = model(hidden_states=x, encoder_hidden_states=text, timestep=now.expand(rows)).sample
        x = x + scale * (then - now) * (v["uncond"] + 2.0 * (v["cond"] - v["uncond"]))
    return x


class Off:
    """What was recorded, off by something in each call, whatever the latents are."""

    def __init__(self, generation: Generation) -> None:
        draw = torch.Generator().manual_seed(0)
        self.off = [torch.randn(call.outputs[0].shape, generator=draw) for call in generation.calls]
        self._given = iter([(call.outputs[0] + off,) for call, off in zip(generation.calls, self.off, strict=True)])

    def __call__(self, **arguments: object) -> tuple[Tensor]:
        return next(self._given)


def test_influence_is_by_how_much_the_result_is_off(recording: Sequence[Generation]) -> None:
    generation = recording[0]
    sampler, model = Sampler.fit(generation), Off(generation)
    result = replay(model, generation, sampler).result
    assert result is not None and generation.result is not None
    errors = Influence.of(generation, sampler).error(
        {call: sampler.place.rows(off) for call, off in enumerate(model.off)}
    )
    torch.testing.assert_close(
        torch.stack(errors), sampler.place.rows(result - generation.result), rtol=1e-4, atol=1e-4
    )


@settings(max_examples=60, deadline=None)
@given(
    steps=st.integers(2, 9),
    reach=st.integers(2, 9),
    kept=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_no_schedule_that_is_moved_costs_less(steps: int, reach: int, kept: float, seed: int) -> None:
    """The error of a schedule is that of its intervals' errors, summed; the best is not bettered by one move."""
    known = intervals(steps, reach)
    errors = np.random.default_rng(seed).standard_normal((len(known), 5))
    products = errors @ errors.T

    def error(chosen: Schedule) -> float:
        ends = (*chosen.computed[1:], steps)
        befores = [before if order else own for before, own, order in
                   zip((0, *chosen.computed[:-1]), chosen.computed, chosen.orders, strict=True)]  # fmt: skip
        parts = [one for one in zip(befores, chosen.computed, ends, strict=True) if one[1] + 1 < one[2]]
        if not set(parts) <= set(known):
            return np.inf
        own = [errors[known.index(one)] for one in parts]
        sizes = sum(float(one @ one) for one in own)
        return kept * float(np.sum(own, axis=0) @ np.sum(own, axis=0)) + (1 - kept) * sizes if own else 0.0

    for count in range(1, steps + 1):
        found = predicted_best(products, steps, reach, count, kept)
        if not found:
            assert not np.isfinite(error(Schedule.of(even(steps, count), 1)))
            continue
        best, *others = found
        assert len(best.computed) == count == len(set(best.computed)) and best.computed[0] == 0
        assert sorted(best.computed) == list(best.computed) and best.computed[-1] < steps and best.orders[0] == 0
        assert Predicted(products, steps, reach, kept).error(best) == pytest.approx(error(best), abs=1e-9)
        near = (*best.moved(steps, steps), *others, Schedule.of(even(steps, count), 1))
        assert all(error(one) >= error(best) - 1e-9 for one in near)


@pytest.mark.parametrize(
    "schedule",
    [Schedule((0, 2, 5), (0, 0, 1)), Schedule((0, 1, 2, 4, 6), (0, 1, 1, 1, 0)), Schedule.of((0, 3, 4, 5, 6, 7), 1)],
)
def test_errors_of_intervals_add_up_to_that_of_the_schedule(
    compiled: CompiledTransformer, recording: Sequence[Generation], schedule: Schedule
) -> None:
    """Where the model is given what was recorded: what a sampler makes is a sum of all outputs."""
    generation, off = recording[0], dict[int, Tensor]()
    sampler = Sampler.fit(generation, *latents_of(compiled))
    with compiled.request(), compiled.decided_by(schedule.policy(STEPS, len(KINDS))):
        for number, call in enumerate(generation.calls):
            with compiled.cache_context(call.context or ""):
                now = compiled(**call.arguments).sample
            off[number] = sampler.place.rows(now) - sampler.place.rows(call.outputs[0])
    error = torch.cat(Influence.of(generation, sampler).error(off))
    predicted = Predicted(error_products(compiled, generation, sampler, reach=3), STEPS, reach=3, kept=1.0)
    assert predicted.error(schedule) == pytest.approx(float(error.square().sum()), rel=1e-3)


def test_products_of_long_errors_are_kept_nearly(
    compiled: CompiledTransformer, recording: Sequence[Generation], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = Sampler.fit(recording[0], *latents_of(compiled))
    exact = error_products(compiled, recording[0], sampler, reach=3)
    monkeypatch.setattr("edit_compile.tuning.intervals.SKETCH", 32)
    sizes = np.sqrt(np.diag(exact))
    off = (error_products(compiled, recording[0], sampler, reach=3) - exact) / np.outer(sizes, sizes)
    assert 0.0 < np.sqrt(np.mean(off**2)) < 2 / np.sqrt(32)


def test_fewer_steps_are_those_of_the_sampler(compiled: CompiledTransformer, recording: Sequence[Generation]) -> None:
    generation = recording[0]
    sampler = Sampler.fit(generation)
    stages = tuple(stage for stage in sampler.stages_of(generation) if stage.calls)
    with compiled.request():
        result = replay(FewerSteps(compiled, stages, 4), generation, sampler).result
    torch.testing.assert_close(result, sampled(compiled, 0, steps=4), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def tuned(compiled: CompiledTransformer, recording: Sequence[Generation]) -> edit_compile.Tuned:
    return edit_compile.tune(
        compiled, recording, budget={"half": 0.6, "draft": 0.4}, quality={"good": 30.0}, repeats=1, reach=4, rounds=1
    )


def test_a_tier_keeps_its_budget_and_holds_what_it_predicts(
    compiled: CompiledTransformer, recording: Sequence[Generation], tuned: edit_compile.Tuned
) -> None:
    assert list(tuned.tiers) == ["half", "draft", "good"]
    for name, most in (("half", 0.6), ("draft", 0.4)):
        tier = tuned.tiers[name]
        assert tier.flops_share <= most + 1e-9 and tier.steps == STEPS and tier.times_faster > 0
        compiled.reset_counters()
        with compiled.decided_by(tier.policy):
            reached = [
                quality(replay(compiled, generation, Sampler.fit(generation)), generation)
                for generation in recording[2:]
            ]
        assert compiled.counters.flops / compiled.counters.dense_flops == pytest.approx(tier.flops_share)
        assert np.mean(reached) == pytest.approx(tier.quality_db, abs=0.01)
        low, high = tier.quality_interval
        assert low <= tier.quality_db <= high
    assert tuned.tiers["half"].quality_db > tuned.tiers["draft"].quality_db
    assert tuned.computed_steps["half"] > tuned.computed_steps["draft"]


def test_no_even_schedule_is_better_by_what_was_searched_by(
    compiled: CompiledTransformer, recording: Sequence[Generation], tuned: edit_compile.Tuned
) -> None:
    def reached(policy: object) -> float:
        with compiled.decided_by(policy):
            return float(np.mean([quality(replay(compiled, one, Sampler.fit(one)), one) for one in recording[:2]]))

    for name in ("half", "draft"):
        count = tuned.computed_steps[name]
        best = max(reached(Schedule.of(even(STEPS, count), order).policy(STEPS, len(KINDS))) for order in (0, 1))
        assert reached(tuned.tiers[name].policy) >= best - 0.01


def test_a_quality_is_reached_with_as_few_steps_as_can_be(
    compiled: CompiledTransformer, recording: Sequence[Generation], tuned: edit_compile.Tuned
) -> None:
    with compiled.decided_by(tuned.tiers["good"].policy):
        reached = [quality(replay(compiled, one, Sampler.fit(one)), one) for one in recording[:2]]
    assert np.mean(reached) >= 30.0


def test_branches_without_a_name_are_tuned_and_timed_as_they_are(compiled: CompiledTransformer, tmp_path: Path) -> None:
    with edit_compile.record(compiled, tmp_path) as recorder:
        for seed in range(4):
            with recorder.generation():
                recorder.result(sampled(compiled, seed, named=False))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # of steps beyond a schedule
        tuned = edit_compile.tune(compiled, edit_compile.Recording(tmp_path), budget={"half": 0.6}, reach=3, repeats=1)
    assert tuned.tiers["half"].flops_share <= 0.6


def test_a_quality_that_is_missed_by_what_was_held_out_is_said(
    compiled: CompiledTransformer, recording: Sequence[Generation], tmp_path: Path
) -> None:
    with edit_compile.record(compiled, tmp_path) as recorder:
        for seed in range(2):
            with recorder.generation():
                recorder.result(sampled(compiled, seed, scale=0.4))
    harder = list(edit_compile.Recording(tmp_path))
    with pytest.warns(RuntimeWarning, match="on those held out"):
        edit_compile.tune(compiled, [*recording[:2], *harder], quality={"good": 30.0}, reach=3, repeats=1)


def test_tiers_go_into_the_bundle_and_switch(
    compiled: CompiledTransformer, tuned: edit_compile.Tuned, tmp_path: Path
) -> None:
    own = CompiledTransformer(compiled.program, "torch")
    tuned.add_to(own)
    own.save(tmp_path / "bundle")
    loaded = edit_compile.load(tmp_path / "bundle", engine="torch", tier="draft")
    assert dict(loaded.tiers) == dict(tuned.tiers)
    results = []
    for loaded.tier in ("draft", "half", None):
        results.append(sampled(loaded, 9))
        loaded.reset()
    assert not any(torch.equal(a, b) for a, b in combinations(results, 2))


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"budget": {"fast": 1.5}}, PolicyError, r"budget\['fast'\] is a share"),
        ({"budget": {"fast": 0.01}}, PolicyError, r"one computed step takes \d+%"),
        ({"quality": {"best": 190.0}}, PolicyError, r"the best that reuse reaches here is \d+"),
        ({"reach": 1}, PolicyError, "reach is a whole number of at least 2, not 1"),
        ({"rounds": -1}, PolicyError, "rounds is a whole number of at least 0"),
        ({"repeats": 0}, PolicyError, "repeats is a whole number of at least 1"),
        ({"held_out": 3}, CallsError, "held_out=3: tuning needs at least 2 to search by"),
    ],
)
def test_what_cannot_be_had_is_said(
    compiled: CompiledTransformer, recording: Sequence[Generation], change: dict[str, object], error: type, told: str
) -> None:
    with pytest.raises(error, match=told):
        edit_compile.tune(compiled, recording, **{"reach": 3, "repeats": 1, **change})


def test_calls_that_do_not_fit_are_refused(
    compiled: CompiledTransformer, recording: Sequence[Generation], tmp_path: Path
) -> None:
    with pytest.raises(CallsError, match=r"1 recorded.*record more"):
        edit_compile.tune(compiled, recording[:1])
    other = CompiledTransformer(programs.make(KINDS, seed=4, routers=False), "torch")
    with pytest.raises(CallsError, match="another model's"):
        edit_compile.tune(other, recording)
    with edit_compile.record(compiled, tmp_path) as recorder, recorder.generation():
        recorder.result(sampled(compiled, 5, steps=5))
    with pytest.raises(CallsError, match="steps"):
        edit_compile.tune(compiled, [*recording[:3], *edit_compile.Recording(tmp_path)])


def test_the_command_writes_a_bundle_with_tiers(compiled: CompiledTransformer, tmp_path: Path) -> None:
    compiled.save(tmp_path / "bundle")
    with edit_compile.record(compiled, tmp_path / "calls") as recorder:
        for seed in range(4):
            with recorder.generation():
                recorder.result(sampled(compiled, seed, steps=4, rows=1))
    call = ["tune", str(tmp_path / "bundle"), "--calls", str(tmp_path / "calls"), "--engine", "torch"]
    done = CliRunner().invoke(app, [*call, "--output", str(tmp_path / "tuned"), "--budget", "fast=.7"])
    assert done.exit_code == 0, done.output
    assert "fast" in done.output and "fewer sampling steps" in done.output
    assert list(edit_compile.load(tmp_path / "tuned", engine="torch").tiers) == ["fast"]
    assert "replaces" not in done.output
    call[1] = str(tmp_path / "tuned")
    again = CliRunner().invoke(app, [*call, "--output", str(tmp_path / "tuned"), "--budget", "fast=.7"])
    said = "".join(again.output.split())  # lines are broken where the terminal ends
    assert f"replacesthetier'fast'that{tmp_path}/tunedhas" in said and f"replacesthebundle{tmp_path}/tuned" in said
    wrong = CliRunner().invoke(app, [*call, "--output", str(tmp_path / "x"), "--budget", "fast"])
    assert wrong.exit_code == 2 and "say name=number" in wrong.output


def test_few_steps_have_the_tiers_that_a_step_can_be_computed_for(
    compiled: CompiledTransformer, tmp_path: Path
) -> None:
    with edit_compile.record(compiled, tmp_path) as recorder:
        for seed in range(4):
            with recorder.generation():
                recorder.result(sampled(compiled, seed, steps=3))
    tuned = edit_compile.tune(compiled, edit_compile.Recording(tmp_path), repeats=1)
    assert set(tuned.tiers) < {"half", "third", "quarter", "draft"} and "half" in tuned.tiers
    assert tuned.computed_steps["half"] == 1
