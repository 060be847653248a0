from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edit_compile.measuring.plot import decision_levels, latency_bars, read_trace, router_heat_map, save
from edit_compile.measuring.timing import Spread
from runtime.requests.trace import COMPUTED, MISSING, REUSED, SKIPPED, RequestTrace, Trace
from runtime.routing.policy import REUSE, SKIP

DECISIONS = [[[SKIP, 1.0], [0.25, 0.5]], [[REUSE, 0.25], [1.0, SKIP]]]


def trace() -> Trace:
    """Two steps of two blocks, two rows each."""
    held = Trace()
    record = held.begin("r")
    context = record.context("cond")
    for step, blocks in enumerate(DECISIONS):
        for block, rows in enumerate(blocks):
            record.add(context, step, block, [0.2, 0.8], rows)
    return held


def test_levels_tell_skipped_reused_and_each_width_apart() -> None:
    done = np.array([[SKIPPED, REUSED, MISSING], [COMPUTED, COMPUTED, COMPUTED]])
    width = np.array([[0.0, 0.0, np.nan], [0.25, 1.0, 0.5]], dtype=np.float32)
    levels = decision_levels(done, width, [0.25, 0.5, 1.0])
    np.testing.assert_array_equal(levels, [[0, 1, np.nan], [2, 4, 3]])


def test_heat_map_shows_blocks_over_steps(tmp_path: Path) -> None:
    figure = router_heat_map(trace()[-1])
    gates, decisions = figure.axes[:2]
    assert gates.images[0].get_array().shape == (2, 2)
    np.testing.assert_array_equal(decisions.images[0].get_array().filled(-1), [[0, 1], [2, 4]])
    labels = [text.get_text() for text in figure.axes[3].get_yticklabels()]
    assert labels == ["skipped", "reused", "width 0.25", "width 0.5", "width 1"]
    path = save(figure, tmp_path / "new" / "map.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_steps_and_blocks_are_counted_in_whole_numbers() -> None:
    figure = router_heat_map(trace()[-1])
    figure.canvas.draw()
    for axes in figure.axes[:2]:
        for ticks in (axes.get_xticks(), axes.get_yticks()):
            assert len(ticks) >= 2 and all(tick == round(tick) for tick in ticks)


def colours(decisions: list[float]) -> dict[str, tuple[float, ...]]:
    """By what the colour bar calls it, of a request of one block."""
    record = RequestTrace("r")
    for step, decision in enumerate(decisions):
        record.add(record.context("cond"), step, 0, [0.5], [decision])
    figure = router_heat_map(record)
    names = [text.get_text() for text in figure.axes[3].get_yticklabels()]
    return dict(zip(names, map(tuple, figure.axes[1].images[0].get_cmap()(range(len(names)))), strict=True))


def test_a_width_has_one_colour_whatever_else_is_drawn() -> None:
    few, many = colours([0.25, 1.0]), colours([0.25, 0.5, 0.75, 1.0])
    assert all(few[name] == many[name] for name in few)
    assert len(set(many.values())) == len(many)


def test_skipped_is_clearly_apart_from_the_lightest_width() -> None:
    drawn = colours([0.1])
    apart = np.abs(np.subtract(drawn["skipped"], drawn["width 0.1"])[:3])
    assert apart.sum() > 0.3


def test_numbers_stand_beside_bars_and_not_in_them() -> None:
    (axes,) = latency_bars({"long": Spread(30, 29, 33, 5), "short": Spread(3.2, 3.0, 3.6, 5)}).axes
    assert [text.get_text() for text in axes.texts] == ["30", "3.2"]
    assert [text.xy[0] for text in axes.texts] == [33, 3.6]


def test_an_empty_trace_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        router_heat_map(RequestTrace("r"))


def test_a_written_trace_reads_back_the_same() -> None:
    held = trace()
    read = read_trace(held.to_json())
    assert read.contexts == ["cond"]
    for name, column in held[-1].arrays().items():
        np.testing.assert_array_equal(read.arrays()[name], column)


@pytest.mark.parametrize("text", ["[]", "{}", "no json", '[{"request": "r"}]'])
def test_what_is_not_a_trace_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a trace"):
        read_trace(text)
