from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.readme import (
    EXAMPLE,
    NO_GPU,
    NOT_MEASURED,
    PAGES,
    README,
    RESULTS,
    figures,
    marks,
    tables_of,
    with_figures,
    written,
)
from examples.fashion_mnist.model import WEIGHTS

BEGIN, END = marks("figures")
SPREAD = {"median": 2.0, "low": 1.9, "high": 2.1, "count": 5}
GIVEN = {
    "shape": {"name": "flux-mid", "steps": 28, "side": 32, "text": 128, "repeats": 5},
    "machine": {"cpu": "a processor", "cores": "2", "torch": "2.13.0"},
    "runs": [
        {
            "dtype": "float32",
            "modulation": "full",
            "engine": "torch",
            "comparison": {
                "eager_ms": SPREAD | {"median": 900.0},
                "compiled_ms": SPREAD | {"median": 450.4},
                "ratio": SPREAD,
                "flop_limit": 2.51,
                "memory": 1.04,
            },
        }
    ],
}


def test_a_result_becomes_a_table_that_names_its_machine() -> None:
    text = figures(GIVEN)
    assert "| flux-mid, float32, torch | 900 | 450 | 2.00 (1.90 to 2.10) | 2.51 | 1.04 |" in text
    assert "a processor, 2 cores, torch 2.13.0; 28 steps, batch 1, 1024 image and 128 text tokens" in text


def test_only_what_is_between_the_marks_is_replaced() -> None:
    text = f"above\n{BEGIN}\nold\n{END}\nbelow\n"
    once = with_figures(text, ["new"])
    assert once == f"above\n{BEGIN}\nnew\n{END}\nbelow\n"
    assert with_figures(once, ["new"]) == once


def test_a_missing_mark_is_an_error() -> None:
    with pytest.raises(ValueError, match="lacks"):
        with_figures("nothing", [])


def test_the_readme_has_the_marks() -> None:
    assert with_figures(README.read_text(), ["x"]).count("x\n") >= 1


def test_a_gpu_has_a_table_only_where_one_has_run(tmp_path: Path) -> None:
    assert tables_of(tmp_path) == [NOT_MEASURED, NO_GPU]
    (tmp_path / "flux_mid.json").write_text(json.dumps(GIVEN))
    machine = {"gpu": "A GPU", "torch": "2.13.0", "cuda": "13.0", "driver": "580.65", "gpu_memory": "79.1 GiB"}
    (tmp_path / "gpu.json").write_text(json.dumps({"machine": machine, "models": []}))
    cpu, gpu = tables_of(tmp_path)
    assert "a processor" in cpu
    assert "A GPU" in gpu and NO_GPU not in gpu


@pytest.mark.parametrize("path", PAGES)
def test_the_readme_is_what_the_results_say(path: Path) -> None:
    assert written(path, RESULTS) == path.read_text()


def test_the_examples_tables_of_quality_and_decisions_say_what_was_measured() -> None:
    text, measured = EXAMPLE.read_text(), json.loads((WEIGHTS / "quality.json").read_text())
    rows = re.findall(r"^\| (elastic), distilled \| (\d+) \| .*? \| (.*?)% \| (.*?) \|$", text, re.MULTILINE)
    rows += re.findall(r"^\| (dense) \| (\d+) \| .*? \| (.*?)% \| (.*?) \|$", text, re.MULTILINE)
    assert len(rows) == 7
    for name, steps, accuracy, distance in rows:
        own = measured[f"{name}, {steps} steps"]
        assert (accuracy, distance) == (f"{own['accuracy']:.1%}"[:-1], f"{own['distance']:.1f}")
    (real,) = re.findall(r"^\| real training images \|.* (\S+) \|$", text, re.MULTILINE)
    assert real == f"{measured['real_images']['distance']:.1f}"
    decisions = re.findall(r"^\| (?:double|single) \d \| (.*) \|$", text, re.MULTILINE)
    names = ("gate_rate", "mean_width", "deviation_over_steps", "deviation_over_rows")
    for told, block in zip(decisions, measured["elastic, 7 steps"]["decisions"]["blocks"], strict=True):
        values = [f"{block[name]:.2f}" for name in names]
        assert told.split(" | ") == [values[0], values[1] if block["mean_width"] else "-", *values[2:]]
