from __future__ import annotations

import io
import time
from typing import Any

import pytest
from rich.console import Console

import edit_compile
from edit_compile import progress
from passes.graphs.progress import tell, telling
from tests.unprepared import UNTRAINED, Net, dry, inputs

pytestmark = UNTRAINED


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=100)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_what_takes_long_is_shown_with_what_is_being_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_PATIENCE", 0.01)
    console = terminal()
    with progress.shown("compiling Net", console):
        tell("exporting blocks", 1, 3)
        time.sleep(0.3)
    assert "compiling Net: exporting blocks" in written(console) and "1/3" in written(console)


def test_what_is_short_and_what_is_no_terminal_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    short, plain = terminal(), Console(file=io.StringIO())
    with progress.shown("compiling Net", short):
        tell("exporting blocks", 1, 3)
    monkeypatch.setattr(progress, "_PATIENCE", 0.0)
    with progress.shown("compiling Net", plain):
        tell("exporting blocks", 1, 3)
        time.sleep(0.1)
    assert not written(short) and not written(plain)


def test_every_stage_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    with telling(lambda what, done, total: told.append(f"{what} {done}/{total}")):
        tell("by hand", 0, 1)
    tell("to nobody", 0, 1)
    assert told == ["by hand 0/1"]

    class Log:
        def info(self, text: str, *args: Any) -> None:
            told.append(text % args)

    monkeypatch.setattr(progress, "log", Log())
    dry(Net(), inputs())
    elastic = edit_compile.elasticize(Net().eval(), inputs())
    edit_compile.compile(elastic, inputs=inputs(), engine="torch")
    assert not any("choosing an engine" in line for line in told)
    edit_compile.compile(elastic, inputs=inputs())
    assert any("compiling Net: choosing an engine, for up to a minute" in line for line in told)
    for said in ("looking at Net: running the model", "finding the blocks of Net: exporting blocks (0 of 1)"):
        assert any(said in line for line in told)
    assert any("compiling Net: exporting the model around its blocks" in line for line in told)
