"""Without an engine named, a program runs on the one that takes least time for its blocks on this machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import edit_compile
from runtime import engines
from runtime.base import machine
from runtime.base.errors import EngineError
from runtime.engines import choice
from runtime.face.transformer import CompiledTransformer
from tests import programs
from tests.models import tiny_flux

CPU = ("onnxruntime", "torch", "inductor")


class Takes:
    """An engine whose blocks take so many units of a clock that stands still otherwise."""

    clock = 0.0
    loads: list[str] = []
    rows: set[int] = set()

    def __init__(self, name: str, units: float | Exception) -> None:
        self.name, self._units = name, units

    def hosting(self, elements: int) -> Any:
        return engines.nullcontext()

    def load(self, plan: Any, variant: int, files: Any) -> Any:
        self.loads.append(f"{self.name} {plan.kind} {plan.variants[variant].width:g}")
        if isinstance(self._units, Exception):
            raise self._units
        return self

    def bind(self, weights: Sequence[Tensor], block: str = "") -> Callable[..., Any]:
        return self._run

    def _run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        Takes.rows.add(len(inputs[0]))
        Takes.clock += float(self._units)  # type: ignore[arg-type]
        return list(inputs)


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "core_seconds", lambda: (0.0, 0.0))
    monkeypatch.delenv("EDIT_COMPILE_ENGINE")
    monkeypatch.setenv("EDIT_COMPILE_CACHE", str(tmp_path))
    Takes.loads, Takes.rows = [], set()


@pytest.fixture
def speeds(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def made(name: str, given: Any) -> Takes:
        return given if isinstance(given, Takes) else Takes(name, given)

    def have(**units: float | Exception | Takes) -> None:
        make = engines.make
        monkeypatch.setattr(
            engines, "make", lambda name, program=None: made(name, units[name]) if name in units else make(name)
        )
        monkeypatch.setattr(choice.time, "perf_counter", lambda: Takes.clock)

    return have


@pytest.mark.parametrize(
    ("units", "taken"),
    [
        ((3, 2, 4), "torch"),
        ((1, 2, 4), "onnxruntime"),
        ((3, 2, 1.7), "inductor"),
        ((3, 2, 1.97), "torch"),  # not faster by enough to compile for each set of shapes
        ((EngineError("not installed"), 2, 4), "torch"),
        ((3, EngineError("gone"), EngineError("no compiler")), "onnxruntime"),
        ((RuntimeError("an index is out of range"), 2, 4), "torch"),
    ],
)
def test_the_fastest_is_taken(units: tuple[Any, ...], taken: str, speeds: Callable[..., None]) -> None:
    speeds(**dict(zip(CPU, units, strict=True)))
    found = choice.choose(programs.make())
    assert found.engine == taken
    assert set(found.milliseconds) == {
        name for name, own in zip(CPU, units, strict=True) if isinstance(own, float | int)
    }
    assert "measured here" in str(found)


def test_most_of_the_work_is_what_is_measured_at_the_middle_width(speeds: Callable[..., None]) -> None:
    speeds(onnxruntime=1, torch=2, inductor=3)
    choice.choose(programs.make())
    assert {load.partition(" ")[2] for load in Takes.loads} == {"Double 0.5", "Single 0.5"}


@pytest.mark.parametrize(("batch", "rows"), [(1, 1), (2, 2), (10**9, 16)])
def test_it_is_measured_for_the_rows_that_were_compiled(batch: int, rows: int, speeds: Callable[..., None]) -> None:
    speeds(onnxruntime=1, torch=2, inductor=3)
    program = programs.make()
    choice.choose(replace(program, manifest=replace(program.manifest, batch=batch)))
    assert Takes.rows == {rows}


def test_what_was_measured_for_one_row_is_not_taken_for_two(speeds: Callable[..., None]) -> None:
    speeds(onnxruntime=1, torch=2, inductor=3)
    program = programs.make()
    choice.choose(program)
    speeds(onnxruntime=3, torch=2, inductor=1)
    assert choice.choose(program).engine == "onnxruntime"
    assert choice.choose(replace(program, manifest=replace(program.manifest, batch=2))).engine == "inductor"


def test_where_none_runs_it_is_an_error_that_says_why(speeds: Callable[..., None]) -> None:
    speeds(**{name: EngineError(f"{name} is gone") for name in CPU})
    with pytest.raises(
        EngineError, match=r"torch is gone; onnxruntime: onnxruntime is gone; inductor: inductor is gone"
    ):
        CompiledTransformer(programs.make())


def test_where_noise_suits_none_the_usual_one_is_taken_and_it_is_said(speeds: Callable[..., None]) -> None:
    speeds(**dict.fromkeys(CPU, IndexError("out of range")))
    assert "takes noise" in str(choice.choose(programs.make()))


def test_it_is_measured_once_on_a_machine(speeds: Callable[..., None], tmp_path: Path) -> None:
    speeds(onnxruntime=3, torch=2, inductor=3)
    choice.choose(programs.make())
    count = len(Takes.loads)
    again = choice.choose(programs.make())
    assert (again.engine, len(Takes.loads)) == ("torch", count)
    assert "measured earlier here" in again.why
    (kept,) = (tmp_path / "engines").iterdir()
    assert json.loads(kept.read_text())["torch"] == 2000


def test_what_takes_long_is_said_before_it_is_done(
    speeds: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(choice, "log", SimpleNamespace(info=lambda text, *given: told.append(text % given)))
    speeds(onnxruntime=3, torch=2, inductor=3)
    choice.choose(programs.make())
    assert "timing blocks (" in told[0] and "up to a minute" in told[0] and "trying engine torch" in told[1]
    told.clear()
    choice.choose(programs.make())
    assert not told  # known by now


def test_what_a_busy_machine_says_is_not_kept(
    speeds: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    counts = iter([(1.0, 0.0), (2.0, 0.5)])
    monkeypatch.setattr(machine, "core_seconds", lambda: next(counts))
    speeds(onnxruntime=3, torch=2, inductor=3)
    assert "while the machine was busy" in choice.choose(programs.make()).why
    assert not (tmp_path / "engines").exists()


@pytest.mark.parametrize("damage", ["", "[1]", '{"torch": "x"}', '{"torch": null}', "{}", '{"other": 1}'])
def test_a_damaged_record_is_measured_anew(damage: str, speeds: Callable[..., None], tmp_path: Path) -> None:
    speeds(onnxruntime=3, torch=2, inductor=3)
    choice.choose(programs.make())
    (kept,) = (tmp_path / "engines").iterdir()
    kept.write_text(damage)
    assert choice.choose(programs.make()).engine == "torch"


def test_a_place_that_cannot_be_written_is_no_error(
    speeds: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("EDIT_COMPILE_CACHE", str(tmp_path / "file"))
    speeds(onnxruntime=3, torch=2, inductor=3)
    assert choice.choose(programs.make()).engine == "torch"


def test_the_environment_can_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDIT_COMPILE_ENGINE", "torch")
    compiled = CompiledTransformer(programs.make())
    assert (compiled.engine, compiled.engine_choice.why) == ("torch", "as EDIT_COMPILE_ENGINE says")
    monkeypatch.setenv("EDIT_COMPILE_ENGINE", "fastest")
    with pytest.raises(EngineError, match="no engine 'fastest'"):
        CompiledTransformer(programs.make())


def test_where_it_does_not_run_all_of_the_program_the_next_is_taken(speeds: Callable[..., None]) -> None:
    def load(plan: Any, variant: int, files: Any) -> Any:
        if plan.variants[variant].width == 1:
            raise EngineError("no bfloat16")
        return engine

    engine = Takes("onnxruntime", 1)
    engine.load = load  # type: ignore[method-assign]
    speeds(onnxruntime=engine, torch=2, inductor=3)
    compiled = CompiledTransformer(programs.make())
    assert compiled.engine == "torch"
    assert "but for onnxruntime: no bfloat16" in str(compiled.engine_choice)


def test_a_named_engine_is_not_measured(speeds: Callable[..., None]) -> None:
    compiled = CompiledTransformer(programs.make(), "torch")
    assert (compiled.engine, compiled.engine_choice) == ("torch", None)


@pytest.mark.filterwarnings("ignore:.*no routers")
def test_a_model_that_is_traced_at_its_first_call_has_its_engine_chosen_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_timed", lambda runs: {name: 1.0 + (name != "torch") for name in runs})
    kept = {name: engines.TABLE[name] for name in ("onnxruntime", "torch", "tensorrt")}
    monkeypatch.setattr(engines, "TABLE", kept)
    model, inputs = tiny_flux(double=1, single=1)
    compiled = edit_compile.compile(model, widths=[0.5, 1])
    assert "until the first call" in compiled.engine_choice.why
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).sample, model.eval()(**inputs).sample, rtol=1e-4, atol=1e-4)
    assert compiled.engine == "torch"
    assert set(compiled.engine_choice.milliseconds) == {"onnxruntime", "torch"}
