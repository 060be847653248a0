"""Which commit a figure is of."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from edit_compile.measuring import machine
from edit_compile.measuring.machine import commit


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of code, a text and results, from which `machine` seems to be run."""
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    (tmp_path / "results").mkdir()
    for name in ("code.py", "notes.md", "results/one.json"):
        (tmp_path / name).write_text("1\n")
    return tmp_path


def committed(checkout: Path) -> None:
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    for asked in (("init", "-q"), ("add", "."), (*who, "commit", "-q", "-m", "one")):
        subprocess.run(["git", *asked], cwd=checkout, check=True)


def test_what_differs_is_said(checkout: Path) -> None:
    committed(checkout)
    found = commit()
    assert len(found) == 12 and int(found, 16)
    (checkout / "notes.md").write_text("2\n")
    (checkout / "results" / "one.json").write_text("2\n")
    assert commit() == found
    assert commit(".", ":!results") == commit("notes.md") == f"{found}+"
    (checkout / "notes.md").write_text("1\n")
    assert commit(".", ":!results") == found
    (checkout / "code.py").write_text("2\n")
    assert commit() == commit(".") == f"{found}+"
    subprocess.run(["git", "add", "."], cwd=checkout, check=True)
    assert commit() == f"{found}+"


def test_outside_of_a_repository_there_is_none(checkout: Path) -> None:
    assert commit() == ""
