"""Timing and the arithmetic of a comparison, without a model."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from edit_compile.measuring.comparison import BlockWork, Comparison
from edit_compile.measuring.timing import Spread, interleaved
from runtime.base import machine

MACHINE = {"cpu": "a processor", "cores": "2", "torch": "2.13.0"}


def comparison() -> Comparison:
    return Comparison(
        model="M",
        engine="torch",
        dtype="float32",
        steps=4,
        repeats=3,
        eager_ms=Spread(100, 95, 110, 12),
        compiled_ms=Spread(50, 48, 56, 12),
        ratio=Spread(2.0, 1.9, 2.1, 3),
        dense_flops=1000,
        flops=400,
        dense_bytes=100,
        resident_bytes=130,
        blocks=(BlockWork("kind", 2, 8, 2, 1, 5, {0.5: 4, 1.0: 1}, 300, 800),),
        machine=MACHINE,
    )


def test_calls_are_interleaved_step_by_step_and_take_turns_at_going_first() -> None:
    order: list[str] = []
    runs = {name: [lambda s=step, n=name: order.append(f"{n}{s}") for step in range(2)] for name in "ab"}
    seconds = interleaved(runs, repeats=2, warmup=1, before_run=lambda: order.append("|"))
    rounds = "".join(order).split("|")[1:]
    assert rounds == ["b0a0a1b1"] * 3
    assert seconds["a"].shape == seconds["b"].shape == (2, 2)
    assert (seconds["a"] >= 0).all()


@pytest.mark.parametrize(("waited", "told"), [(0.5, "for 50% of the time"), (0.05, None), (0.0, None)])
def test_a_machine_too_busy_for_figures_is_warned_of(
    waited: float, told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter([(3.0, 1.0), (4.0 - waited, 1.0 + waited)])
    monkeypatch.setattr(machine, "core_seconds", lambda: next(counts))
    with pytest.warns(UserWarning, match=told) if told else nullcontext():
        interleaved({"a": [lambda: None]}, repeats=1)


def test_the_time_of_threads_on_cores_is_counted() -> None:
    before, end = machine.core_seconds()[0], time.process_time() + 0.2
    while time.process_time() < end:
        pass
    assert machine.core_seconds()[0] - before > 0.1


@pytest.mark.parametrize("runs", [{"a": []}, {"a": [print], "b": [print, print]}])
def test_runs_that_cannot_be_compared_are_refused(runs: dict) -> None:
    with pytest.raises(ValueError, match="equal length"):
        interleaved(runs, repeats=1)


def test_spread_is_the_median_with_its_middle_half() -> None:
    assert Spread.of([[4, 1], [3, 2], [5, 5]]) == Spread(3.5, 2.25, 4.75, 6)
    with pytest.raises(ValueError, match="nothing"):
        Spread.of([])


def test_efficiency_is_the_ratio_over_what_flops_allow() -> None:
    found = comparison()
    assert found.flop_limit == 2.5
    assert found.efficiency == pytest.approx(0.8)
    assert found.memory == 1.3


def test_json_holds_the_figures_with_the_machine() -> None:
    read = json.loads(comparison().to_json())
    assert read["ratio"]["median"] == 2.0
    assert read["flop_limit"] == 2.5
    assert read["machine"] == MACHINE
    assert read["blocks"][0]["widths"] == {"0.5": 4, "1.0": 1}


def test_printed_comparison_says_what_was_measured_where() -> None:
    text = str(comparison())
    for part in ("100", "50", "80% of it reached", "a processor, 2 cores", "38% of FLOPs", "25% skipped", "50% at 0.5"):
        assert part in text


def test_nothing_computed_is_shown_as_skipped() -> None:
    block = replace(comparison().blocks[0], skipped=8, reused=0, computed=0, widths={}, flops=0)
    assert "100% skipped" in str(replace(comparison(), blocks=(block,)))


def test_plot_writes_an_image(tmp_path: Path) -> None:
    comparison().plot(tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
