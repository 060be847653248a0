"""Evidence: choices among rivals, tables of what was recorded, and that no figure stands in a page by hand."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks import evidence_rows, evidence_tables, evidence_told, pareto
from benchmarks.readme import EVIDENCE, PICTURE, README, RESULTS, marks
from examples.fashion_mnist import paper, starts
from examples.fashion_mnist.contestant import Contestant
from examples.fashion_mnist.evidence import outside
from examples.fashion_mnist.finals import Result
from examples.fashion_mnist.rivals_finals import Kept
from examples.fashion_mnist.rivals_trials import Tried, Work, best_of, chosen_of, forget

WORK = Work(100, 1.0)


def tried(who: str, settings: str, share: float, decibels: float) -> Tried:
    return Tried(Contestant(who, settings, lambda: lambda labels, seed: labels), share, decibels)


TRIES = [
    tried("a", "fine", 0.5, 40.0),
    tried("a", "coarse", 0.25, 30.0),
    tried("b", "fine", 0.49, 41.0),
    tried("c", "poor", 0.5, 20.0),
    tried("d", "saves little", 0.7, 45.0),
    tried("fewer steps", "14 steps", 0.5, 50.0),
]


def test_of_each_rival_the_best_within_a_share() -> None:
    assert [one.contestant.name for one in best_of(TRIES, 0.3)] == ["a: coarse"]
    assert {one.contestant.name for one in best_of(TRIES, 0.5)} >= {"a: fine", "b: fine", "c: poor"}


def test_the_best_two_of_each_share_are_drawn() -> None:
    chosen = [(at, one.name) for at, one, _ in chosen_of(TRIES, [], WORK, 2)]
    assert (0.5, "a: fine") in chosen and (0.5, "b: fine") in chosen
    assert (0.25, "a: coarse") in chosen
    assert not any(name.startswith("fewer steps") for _, name in chosen)


def test_who_is_among_the_best_of_no_share_is_drawn_once_all_the_same() -> None:
    tries = [*TRIES, tried("c", "poorer", 0.25, 10.0), tried("d", "saves nothing", 1.0, 99.0)]
    tries += [tried("e", "slow", 0.9, 1.0), tried("a", "finer", 0.74, 60.0), tried("b", "coarse", 0.25, 31.0)]
    found = [(at, one.name) for at, one, _ in chosen_of(tries, [], WORK, 2)]
    assert found[-3:] == [(0.5, "c: poor"), (0.75, "d: saves little"), (1.0, "e: slow")]
    assert sum(name.startswith("c:") for _, name in found) == 1


def test_starts_are_compared_seed_by_seed() -> None:
    ours, theirs = ([result(distance=base + seed) for seed in (0.0, 3.0, 7.0)] for base in (10.0, 12.0))
    (found,) = starts.compared({"full capacity": ours, "random": theirs})
    assert found["distance"] == pytest.approx(-2.0)
    assert found["distance_interval"] == pytest.approx([-2.0, -2.0])
    told = {"starts": {"full capacity": [one.__dict__ for one in ours], "random": [one.__dict__ for one in theirs]}}
    told |= {"differences": [found], "machine": {"cpu": "x", "cores": "2", "torch": "2", "threads": "1"}, "images": 8}
    told |= {"training_seeds": 3, "train_steps": 5, "recorded": 9, "budget": 0.4, "commit": "abc"}
    assert "| random | 47.0% | 48.8 | 15.3 (12.0, 15.0, 19.0) | 98.0% |" in evidence_tables.starts(told)


def test_what_was_drawn_before_stays_where_it_is_still_the_best() -> None:
    tries = [*TRIES, tried("c", "poorer", 0.25, 10.0), tried("b", "coarse", 0.25, 31.0)]
    assert (0.25, "c: poorer") not in [(at, one.name) for at, one, _ in chosen_of(tries, [], WORK, 2)]
    assert (0.25, "c: poorer") in [(at, one.name) for at, one, _ in chosen_of(tries, [], WORK, 2, {"c: poorer"})]


def test_what_is_by_one_can_be_tried_and_drawn_again(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "finals.json", 10, 2)
    for one in (result(who="a"), result(who="a, and b"), result(who="b"), result(who="c", same_as="a: half")):
        kept.results[one.name] = one
    kept.forget("a")
    assert list(kept.results) == ["b: half"]
    path = tmp_path / "trials.json"
    path.write_text(json.dumps({"machine": {"a": 1}, "commit": "abc", "of": {"a: x": [0.5, 1.0], "b: x": [0.5, 2.0]}}))
    forget(path, "a: ")
    assert json.loads(path.read_text())["of"] == {"b: x": [0.5, 2.0]}


def result(**changed: object) -> Result:
    given: dict = {
        "who": "tier", "settings": "half", "at": 0.5, "flops_share": 0.47, "times_faster": 1.8, "decibels": 48.8,
        "decibels_interval": (48.5, 49.1), "distance": 14.1, "distance_interval": (11.1, 17.8), "accuracy": 0.98,
        "accuracy_interval": (0.97, 0.99), "commit": "abc",
    }  # fmt: skip
    return Result(**{**given, **changed})


def test_a_row_outside_of_its_interval_is_told() -> None:
    known = json.loads(json.dumps(result().__dict__))
    assert outside(result(), known) == []
    assert outside(result(times_faster=0.1), known) == []  # times decide nothing
    assert "decibels 47" in outside(result(decibels=47.0), known)[0]
    assert "distance 18.5" in outside(result(distance=18.5), known)[0]
    assert "accuracy 0.9 " in outside(result(accuracy=0.9), known)[0]
    assert "FLOPs are 60.0%" in outside(result(flops_share=0.6), known)[0]


def row(who: str, times_faster: float, decibels: float, settings: str = "x") -> dict:
    given = {"who": who, "settings": settings, "times_faster": times_faster, "decibels": decibels}
    return {**result().__dict__, **given, "decibels_interval": (decibels - 1, decibels + 1)}


def test_beside_a_tier_stands_the_best_of_what_is_as_fast() -> None:
    rivals = {"results": [row("TaylorSeer", 2.5, 30.0), row("TaylorSeer", 1.9, 60.0), row("MagCache", 2.1, 35.0)]}
    found = evidence_rows.beside(rivals, row("tier", 2.1, 44.0), evidence_rows.caches)
    assert found is not None and (found["who"], found["decibels"]) == ("MagCache", 35.0)


def test_the_front_holds_what_nothing_is_both_faster_and_nearer_than() -> None:
    rows = [
        row("tier", 2.0, 44.0),
        row("MagCache", 1.9, 43.0),
        row("TaylorSeer", 2.5, 41.0),
        row("fewer steps", 2.5, 30.0),
    ]
    found = evidence_told.front({"results": [row("dense", 1.0, 206.0), *rows]})
    assert [one["who"] for one in found] == ["tier", "TaylorSeer"]
    assert "**tier**" in evidence_told.front_told({"results": rows})


def test_the_costs_of_steps_are_those_that_the_tiers_times_are_made_of() -> None:
    tuned = {"steps": 10, "tiers": [{"tier": str(n), "decisions": [1.0] * n + [-1.0] * (10 - n)} for n in (2, 5, 8)]}
    rows = [row("tier", 10 / (0.9 * n + 0.1 * (10 - n)), 40.0, str(n)) for n in (2, 5, 8)]
    rows.append(row("fewer steps, compiled", 1.25, 140.0))
    told = evidence_tables.step_costs({"results": rows}, tuned)
    assert "| tier | 90% | 10% | 80% (fewer steps, compiled) |" in told


def test_a_tier_that_is_behind_is_said_to_be() -> None:
    rivals = {
        "results": [row("tier", 2.0, 44.0, "third"), row("tier", 4.0, 27.0, "draft"), row("TaylorSeer", 4.1, 29.0)]
    }
    ahead, behind = evidence_told.clock_told(rivals).splitlines()
    assert "15.0 dB ahead of TaylorSeer" in ahead
    assert "**2.0 dB behind** TaylorSeer" in behind


def test_the_picture_has_a_point_for_each_row_of_a_way() -> None:
    rows = [row("tier, inductor", 2.0, 44.0), row("tier, inductor", 4.0, 27.0), row("nobody", 9.0, 1.0)]
    rivals = {
        "results": [row("dense", 1.0, 200.0), *rows],
        "images": 10,
        "machine": {"cpu": "x", "cores": "2", "torch": "2"},
    }
    near, _ = pareto.pareto(rivals).axes
    (drawn,) = near.containers
    assert drawn.get_label() == "tiers of edit_compile, inductor"
    np.testing.assert_array_equal(drawn.lines[0].get_xydata(), [[2.0, 44.0], [4.0, 27.0]])


def test_the_committed_picture_is_of_what_was_recorded() -> None:
    drawn = PICTURE.read_text()
    recorded = json.loads((RESULTS / "rivals.json").read_text())
    assert hashlib.sha256(pareto.shown(recorded).encode()).hexdigest() in drawn


def test_the_most_frequent_decision() -> None:
    decisions = np.array([[[0.0, 0.5, 0.5], [1.0, 1.0, 0.25]]])
    np.testing.assert_array_equal(paper.most_frequent(decisions)[0], [[0.5, 1.0]])


@pytest.mark.parametrize("name", ["rivals", "paper", "tuned", "partial_steps"])
def test_results_say_where_they_come_from(name: str) -> None:
    told = json.loads((RESULTS / f"{name}.json").read_text())
    assert {"cpu", "cores", "torch", "python"} <= set(told["machine"])
    assert re.fullmatch(r"[0-9a-f]{12}\+?", told["commit"])


def outside_of_marks(path: Path) -> str:
    """The page without what is generated, code, and addresses."""
    text = path.read_text()
    for name in re.findall(r"<!-- end of ([^>]*) -->", text):
        begin, end = map(re.escape, marks(name))
        text = re.sub(f"{begin}.*?{end}", "", text, flags=re.S)
    text = re.sub(r"```.*?```|^    .*?$|`[^`]*`|\]\([^)]*\)", "", text, flags=re.S | re.M)
    names = r"FLUX\.1|Qwen-Image|Hunyuan3D-2|H20|TensorRT 11|Python 3\.11|arXiv [\d.]+|Apache-2\.0|float\d+"
    return re.sub(names, "", text)


@pytest.mark.parametrize("path", [README, EVIDENCE])
def test_measured_figures_stand_between_marks_alone(path: Path) -> None:
    """A number with a decimal point, a percentage but for 95%, or one with a unit of what is measured, is generated."""
    text = outside_of_marks(path).replace("95%", "")
    assert re.findall(r"\d+\.\d+|\d+ ?%|\d+ (?:dB|ms|times)", text) == []
