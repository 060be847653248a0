"""The matrix of libraries: which versions are asked for, and what is told of what ran."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from benchmarks import matrix
from edit_compile.measuring import machine


def test_the_oldest_are_the_bounds_and_the_pinned_the_constraints() -> None:
    oldest, pinned, newest = (dict(one.split("=", 1) for one in matrix.wanted(name)) for name in matrix.NAMES)
    assert oldest["torch"] == f"={matrix.requirements()['torch']}" and "diffusers" in oldest
    assert pinned["torch"] == f"={matrix.pins()['torch']}"
    assert {one.rstrip(">") for one in newest} == oldest.keys() == pinned.keys()


def test_the_tests_that_are_named_are_there() -> None:
    assert all((matrix.ROOT / name).is_file() for name in matrix.TESTS)


def test_what_pytest_reports_is_counted(tmp_path: Path) -> None:
    cases = '<testcase classname="a" name="x"/><testcase classname="a" name="y"><skipped/></testcase>'
    cases += '<testcase classname="a" name="z"><failure>no</failure></testcase>'
    cases += '<testcase classname="b" name="w"><error/></testcase>'
    (tmp_path / "r.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    assert matrix._counted(tmp_path / "r.xml") == {"passed": 1, "skipped": 1, "failed": ("a::z", "b::w")}


def test_what_cannot_be_installed_is_told_and_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object) -> Path:
        raise matrix.InstallError("no such wheel")

    monkeypatch.setattr(matrix, "install", refuse)
    row = matrix.run("oldest")
    assert (row.passed, row.not_run) == (0, "no such wheel")
    taken = {"machine": {"cpu": "A", "cores": "2"}, "tests": ["x"]}
    told = matrix.markdown({"rows": [matrix.asdict(row) | taken]})
    assert "not run: no such wheel" in told and "passed" not in told


def test_what_a_row_before_wrote_does_not_count_as_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*asked: str) -> str:
        given = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *asked]
        return subprocess.run(given, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    code, record = tmp_path / "code.py", tmp_path / "benchmarks" / "results" / "matrix.json"
    record.parent.mkdir(parents=True)
    code.write_text("")
    record.write_text("")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    record.write_text("a row")
    assert machine.commit(*matrix.COUNTED) == git("rev-parse", "--short=12", "HEAD")
    code.write_text("changed")
    assert machine.commit(*matrix.COUNTED).endswith("+")
