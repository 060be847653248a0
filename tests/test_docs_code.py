"""The Python of README and docs/, pasted from the top of each page down: no name comes from nowhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from benchmarks.readme import README
from tests.test_readme_code import PROMPTS, pipe

__all__ = ["pipe"]
DOCS = README.parent / "docs"
YOURS = {
    "README.md": "model pipe prompts your_loop",
    "architecture.md": "inputs model rewritten",
    "calls.md": "pipe prompts",
    "checkpoints.md": "elastic",
    "faster.md": "model pipe prompt your_loop",
    "security.md": "",
    "serving.md": "compiled inputs labels names t tiers x",
    "training.md": "pipe prompts",
    "your_model.md": "DiT cfg_scale inputs model t x y",
}
"""What the reader has, by page."""


def code(page: Path) -> str:
    return "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE))


def pages() -> dict[str, Path]:
    """Those with Python."""
    return {page.name: page for page in (README, *sorted(DOCS.glob("*.md"))) if code(page)}


def undefined(text: str) -> set[str]:
    """Names that nothing defines, by ruff."""
    ruff = shutil.which("ruff", path=str(Path(sys.executable).parent)) or "ruff"
    asked = [ruff, "check", "--isolated", "--select", "F821", "--output-format", "concise", "-"]
    told = subprocess.run(asked, input=text, capture_output=True, text=True, check=False)
    assert told.returncode in (0, 1), told.stderr
    assert "invalid-syntax" not in told.stdout, told.stdout
    return set(re.findall(r"F821 Undefined name `(\w+)`", told.stdout))


def test_every_page_is_looked_at() -> None:
    assert pages().keys() == YOURS.keys()


@pytest.mark.parametrize("name", YOURS)
def test_all_names_are_defined_or_the_readers_own(name: str) -> None:
    assert undefined(code(pages()[name])) == set(YOURS[name].split())


def test_a_name_from_nowhere_is_found() -> None:
    assert undefined("import edit_compile\nedit_compile.load(path)\n") == {"path"}
    with pytest.raises(AssertionError, match="invalid-syntax"):
        undefined("with edit_compile.record(:\n")


@pytest.mark.slow
def test_the_page_of_calls_runs_from_top_to_bottom(
    pipe: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    given: dict[str, Any] = {"pipe": pipe, "prompts": PROMPTS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code(DOCS / "calls.md"), given)
    assert set(given["compiled"].tiers) == {"fast", "good"} and len(given["recordings"]) == len(PROMPTS)
    assert "ff" in capsys.readouterr().out
