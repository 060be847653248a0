"""Sections of docs/evidence.md, from benchmarks/results/{rivals,paper,starts}.json."""

from __future__ import annotations

from benchmarks import evidence_tables as tables
from benchmarks import evidence_told as told
from benchmarks.evidence_rows import Row

NOT_RUN = "Not run yet: `python -m examples.fashion_mnist.{}`."


def sections(rivals: Row, tuned: Row, paper: Row | None, starts: Row | None) -> dict[str, str]:
    """What stands between the marks, by their name."""
    return {
        "taken": tables.taken(rivals, paper),
        "front": told.front_told(rivals),
        "by clock": told.by_clock(rivals),
        "clock told": told.clock_told(rivals),
        "step costs": tables.step_costs(rivals, tuned),
        "engines": tables.engines(rivals),
        "by share": tables.by_share(rivals),
        "trials": tables.trials(rivals),
        "few steps": tables.few_steps(rivals),
        "few told": told.few_told(rivals),
        "predicted": tables.predicted(rivals),
        "static": tables.static(paper) if paper else NOT_RUN.format("paper"),
        "borderline": tables.borderline(paper) if paper else NOT_RUN.format("paper"),
        "starts": tables.starts(starts) if starts else NOT_RUN.format("starts"),
        "complexity": tables.complexity(paper) if paper else NOT_RUN.format("paper"),
    }
