"""What tuning says of the tiers that it found: beside fewer steps, in words, and as a picture."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest

import edit_compile
from edit_compile import CompiledTransformer, Tuned
from edit_compile.calls.result_quality import Mean
from edit_compile.tuning.plot import quality_against_time
from tests.test_tune import STEPS
from tests.test_tune_asked import Calls, compiled, recording

__all__ = ["compiled", "recording"]  # fixtures


@pytest.fixture(scope="module")
def tuned(compiled: CompiledTransformer, recording: Calls) -> Tuned:
    return edit_compile.tune(compiled, recording, budget={"half": 0.6, "draft": 0.4, "full": 1.0}, reach=3, repeats=1)


def test_the_picture_has_tiers_and_fewer_steps_with_intervals(tuned: Tuned, tmp_path: Path) -> None:
    assert tuned.plot(tmp_path / "made" / "tiers.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = quality_against_time(tuned).axes
    tiers, fewer = axes.containers
    assert (tiers.get_label(), fewer.get_label()) == ("tiers", "as many sampling steps instead")
    shown = {text.get_text() for text in axes.texts}
    assert shown >= {"half", "draft"} and "full" not in shown  # which was recorded itself, at 200 dB
    drawn = dict(zip(*tiers.lines[0].get_data(), strict=True))
    assert drawn == {tuned.seconds[name].tier: tuned.tiers[name].quality_db for name in ("half", "draft")}
    assert all(line.has_yerr for line in (tiers, fewer))


def with_gain(tuned: Tuned, mean: float, reach: float) -> Tuned:
    """As if the draft were better than seven plain steps, which take its time, by so many dB, and others by one."""
    gain = {name: Mean(1.0, 0.5, 1.5) for name in tuned.tiers}
    changed = {**gain, "draft": Mean(mean, mean - reach, mean + reach)}
    return replace(tuned, gain=changed, steps_in_time=dict.fromkeys(tuned.tiers, 7))


def test_the_table_says_where_plain_fewer_steps_are_better(tuned: Tuned) -> None:
    worse = "plain fewer steps are better"
    assert worse not in str(with_gain(tuned, 2.0, 1.0))
    said = str(with_gain(tuned, -2.0, 1.0))
    assert "7 STEPS INSTEAD" in said and f"{worse} than draft (sample with 7 steps): do not use these tiers" in said
    for mean in (2.0, -2.0):
        unsure = str(with_gain(tuned, mean, 3.0))
        assert "undecided" in unsure and "draft (7); record more" in unsure
        assert worse not in unsure and "do not use" not in unsure
    assert "equal" in str(with_gain(tuned, 0.0, 0.0))
    assert all(said in str(tuned) for said in ("figures as predicted", "beside fewer sampling steps", "draft", "half"))


def test_beside_all_steps_no_difference_in_decibels_is_told(tuned: Tuned) -> None:
    slow = replace(with_gain(tuned, -167.0, 1.0), steps_in_time={**dict.fromkeys(tuned.tiers, 7), "draft": STEPS})
    assert "NOT FASTER" in str(slow) and "-167" not in str(slow)
    assert "computing every step takes no longer than draft: do not use these tiers" in (slow.advice or "")


def test_tiers_of_one_schedule_are_timed_once(compiled: CompiledTransformer, recording: Calls) -> None:
    found = edit_compile.tune(compiled, recording, budget={"one": 0.6, "same": 0.6}, reach=3, repeats=1)
    assert found.tiers["one"].policy == found.tiers["same"].policy
    assert found.seconds["one"] == found.seconds["same"]


@pytest.mark.parametrize("mean", [-2.0, 2.0])
def test_a_tier_that_plain_steps_beat_is_warned_of(
    tuned: Tuned, compiled: CompiledTransformer, recording: Calls, mean: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edit_compile.tuning.tune._predicted", lambda *_: with_gain(tuned, mean, 1.0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        edit_compile.tune(compiled, recording, budget={"draft": 0.6}, reach=3, repeats=1)
    told = [one for one in caught if "better than draft (sample with 7 steps): do not use these" in str(one.message)]
    assert len(told) == (mean < 0)


def test_plain_steps_have_the_time_that_the_tier_takes(tuned: Tuned) -> None:
    for name, count in tuned.computed_steps.items():
        in_time = tuned.steps_in_time[name]
        assert count <= in_time <= STEPS
        assert in_time == max(count, min(STEPS, int(STEPS / tuned.seconds[name].times_faster)))
    assert tuned.gain["full"] == Mean(0.0, 0.0, 0.0)
