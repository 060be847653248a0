"""Tiers on the command line."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from edit_compile import BranchedPolicy, ReusePolicy, RoutingPolicy, ScheduledPolicy, load
from edit_compile.bundles.tier_table import tier_table
from edit_compile.loading import UserError
from edit_compile.measuring import plot as plotting
from edit_compile.measuring.plot import latency_bars
from edit_compile.tuning.command import parse_named
from runtime.face.transformer import CompiledTransformer
from runtime.routing.policy import REUSE, SKIP
from tests import forged, programs
from tests.test_cli import DENSE, run

KINDS = ("double", "single", "double")
TIERS = {
    "routed": RoutingPolicy(0.5, 0.1, 3, 4),
    "planned": ScheduledPolicy([[0.25, REUSE, SKIP], [0.75, 1.0, SKIP]], beyond="compute"),
    "watched": ReusePolicy(1, 0.25, "input", order=1, otherwise=RoutingPolicy(0.2, 0.0, 0)),
}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    model = CompiledTransformer(programs.make(KINDS), "torch")
    for name, policy in TIERS.items():
        model.add_tier(name, policy)
    model.add_tier("quarter", ScheduledPolicy(np.full((2, 3), 0.25)), quality_db=31.25, quality_interval=(29.5, 33.0),
                   times_faster=2.5, flops_share=0.37, steps=2, machine="H20")  # fmt: skip
    model.save(tmp_path / "model.edit")
    (tmp_path / "dense.py").write_text(DENSE)
    return tmp_path / "model.edit"


def test_the_table_says_what_a_tier_does_and_what_is_known_of_it(bundle: Path) -> None:
    console = Console(width=300, record=True, file=io.StringIO())
    console.print(tier_table(load(bundle, engine="torch").tiers))
    text = console.export_text()
    for told in (
        "routed: skips below 0.5, reuses up to 0.6, at most 3 times in a row, not in the first 4 steps",
        "schedule of 2 steps: 50% computed at mean width 0.67, 17% reused, 33% skipped; computes steps beyond",
        "reuses once in a row after 1 step, extrapolated, while its input changes by at most 0.25 of itself; else "
        "routed: skips below 0.2",
    ):
        assert told in text
    (line,) = (line for line in text.splitlines() if "quarter" in line)
    cells = [cell.strip() for cell in line.split("│")][3:-1]
    assert cells == ["31.2 (29.5 to 33.0)", "2.50", "37%", "2", "H20"]


def test_inspect_shows_tiers_where_there_are_any(bundle: Path, tmp_path: Path) -> None:
    text = run("inspect", bundle)
    assert "as predicted" in text
    assert "quarter" in text
    CompiledTransformer(programs.make(KINDS), "torch").save(tmp_path / "plain.edit")
    assert "as predicted" not in run("inspect", tmp_path / "plain.edit")


def test_inspect_does_not_say_that_tiers_skip_nothing(tmp_path: Path) -> None:
    model = CompiledTransformer(programs.make(KINDS, routers=False), "torch")
    model.add_tier("planned", TIERS["planned"])
    model.save(tmp_path / "model.edit")
    text = run("inspect", tmp_path / "model.edit")
    assert "none: tiers and schedules alone skip blocks" in text and "nothing is skipped" not in text


def test_inspect_refuses_a_tier_that_makes_no_sense(bundle: Path) -> None:
    forged.put_manifest(bundle, lambda manifest: manifest["tiers"]["routed"]["policy"].update(margin=3))
    assert "tier 'routed': margin" in run("inspect", bundle, code=2).replace("\n", " ")


def test_bench_runs_at_a_tier(bundle: Path, tmp_path: Path) -> None:
    arguments = ["bench", bundle, "--model", f"{bundle.parent / 'dense.py'}:Dense", "--engine", "torch"]
    arguments += ["--steps", 2, "--repeats", 1]
    run(*arguments, "--tier", "quarter", "--json", tmp_path / "figures.json")
    blocks = json.loads((tmp_path / "figures.json").read_text())["blocks"]
    assert all(list(block["widths"]) == ["0.25"] for block in blocks)
    assert "there are 'routed', 'planned'" in run(*arguments, "--tier", "draft", code=2)
    assert "give one of them" in run(*arguments, "--tier", "quarter", "--schedule", ".5,.5", code=2)


def test_verify_runs_the_tiers_beside_the_model(tmp_path: Path) -> None:
    model = CompiledTransformer(programs.make(KINDS, routers=False), "torch")
    model.add_tier("planned", ScheduledPolicy([[1.0] * 3, [REUSE] * 3, [1.0] * 3, [0.25, 1.0, SKIP]], routed=False))
    model.add_tier("never full", ScheduledPolicy([[0.5] * 3], routed=False))
    model.save(tmp_path / "model.edit")
    (tmp_path / "dense.py").write_text(DENSE)
    arguments = ["verify", tmp_path / "model.edit", "--engine", "torch", "--model"]
    text = run(*arguments, f"{tmp_path / 'dense.py'}:Dense")
    assert "tier planned, its 2 full of 4 steps" in text and "never full" not in text and "FAILED" not in text
    failed = run(*arguments, f"{tmp_path / 'dense.py'}:other", code=1)
    (line,) = (line for line in failed.splitlines() if "tier planned" in line)
    assert "FAILED" in line


def test_verify_runs_each_branch_of_a_tier_that_decides_by_branch(tmp_path: Path) -> None:
    model = CompiledTransformer(programs.make(KINDS, routers=False), "torch")
    odd = ScheduledPolicy([[1.0] * 3, [REUSE] * 3], routed=False)
    model.add_tier("by branch", BranchedPolicy({"cond": odd}, ScheduledPolicy([[1.0] * 3] * 3, routed=False)))
    model.save(tmp_path / "model.edit")
    (tmp_path / "dense.py").write_text(DENSE)
    arguments = ["verify", tmp_path / "model.edit", "--engine", "torch", "--model"]
    text = run(*arguments, f"{tmp_path / 'dense.py'}:Dense").replace("\n", " ")
    assert "by branch in branch cond, its 1 full of 2 steps" in text
    assert "by branch in branch others, its 3 full of 3 steps" in text
    failed = run(*arguments, f"{tmp_path / 'dense.py'}:other", code=1)
    assert failed.count("FAILED") >= 2 and all("FAILED" in line for line in failed.splitlines() if "in branch" in line)


def test_plot_draws_what_a_tier_decides(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(plotting, "router_heat_map", lambda record: drawn.append(record) or latency_bars({}))
    run("plot", bundle, "--engine", "torch", "--steps", 2, "--tier", "quarter", "--output", tmp_path / "a.png")
    assert set(drawn[0].arrays()["width"]) == {0.25}
    assert "there are 'routed', 'planned'" in run("plot", bundle, "--engine", "torch", "--tier", "draft", code=2)
    (tmp_path / "trace.json").write_text("[]")
    assert "--tier is for bundles" in run("plot", tmp_path / "trace.json", "--tier", "quarter", code=2)


def test_a_tier_that_decides_by_branch_decides_as_in_its_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = CompiledTransformer(programs.make(KINDS), "torch")
    model.add_tier("by branch", BranchedPolicy({"cond": TIERS["planned"]}, RoutingPolicy()))
    model.save(tmp_path / "model.edit")
    (tmp_path / "dense.py").write_text(DENSE)
    drawn = []
    monkeypatch.setattr(plotting, "router_heat_map", lambda record: drawn.append(record) or latency_bars({}))
    given = ["--engine", "torch", "--steps", 2, "--tier", "by branch"]
    said = run("plot", tmp_path / "model.edit", *given, "--output", tmp_path / "a.png")
    assert drawn[0].grid()["width"][0, :, 0].tolist() == [0.25, 1.0, 0.0]
    dense = ["--model", f"{tmp_path / 'dense.py'}:Dense", "--repeats", 1]
    for text in (said, run("bench", tmp_path / "model.edit", *given, *dense)):
        assert "all calls are taken for those of its first, 'cond'" in " ".join(text.split())


def test_a_table_that_is_not_for_a_terminal_is_not_cut(bundle: Path) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "edit_compile.cli", "inspect", bundle], capture_output=True, text=True
    )
    assert "31.2 (29.5 to 33.0)" in shown.stdout and "…" not in shown.stdout


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["fast"], "say name=number"),
        (["fast=x"], "say name=number"),
        (["=0.5"], "has no name"),
        ([" =0.5"], "has no name"),
        (["fast=.5", "fast=.4"], "'fast' is given twice"),
    ],
)
def test_tiers_on_the_command_line(given: Sequence[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        parse_named(given)
    assert parse_named(["a=.5", "b=1"]) == {"a": 0.5, "b": 1.0}
