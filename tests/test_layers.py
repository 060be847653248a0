"""The shape of the source: floors, file lengths, and what must not occur in it."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("edit_compile", "passes", "runtime")
FOLDERS = (*PACKAGES, "tests", "examples", "benchmarks")
LONGEST = 350
MOST = {"edit_compile": 7188, "passes": 5661, "runtime": 6535}
"""Lines of code that a package may have, docstrings, comments and blank lines aside: they may fall, and not rise."""
MODEL_NAMES = re.compile(r"flux|qwen|hunyuan|pixart|cogv|z_?image|lumina|kandinsky|sd3|wan\b|sana|cosmos|hidream", re.I)
PRESETS = ROOT / "runtime" / "routing" / "policy.py"


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def code_without_prose(text: str) -> list[tuple[int, str]]:
    """(line, token) of everything that is neither a comment nor a string standing alone (a docstring)."""
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    layout = (tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT)
    kept, starts_line = [], True
    for token in tokens:
        if token.type in layout:
            starts_line = True
            continue
        if not (token.type == tokenize.STRING and starts_line):
            kept.append((token.start[0], token.string))
        starts_line = False
    return kept


def model_names(text: str) -> list[tuple[int, str]]:
    return [(line, word) for line, word in code_without_prose(text) if MODEL_NAMES.search(word)]


def test_arrows_between_floors_point_down() -> None:
    # in a process of its own, since import-linter switches off every logger that there is
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", sources(*FOLDERS), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_can_be_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_does_not_grow(package: str) -> None:
    counts = [len({line for line, _ in code_without_prose(path.read_text())}) for path in sources(package)]
    assert sum(counts) <= MOST[package], "what is added is paid for by what it makes deletable"


@pytest.mark.parametrize("path", sources("passes", "runtime"), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_model_is_named_in_code_below_the_face(path: Path) -> None:
    if path == PRESETS:
        pytest.skip("the paper's presets are called by their model's name")
    assert model_names(path.read_text()) == []


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_pickled(path: Path) -> None:
    found = [line for line, word in code_without_prose(path.read_text()) if word in ("pickle", "cloudpickle", "dill")]
    assert found == []
    assert not re.search(r"torch\.(load|save)\(", path.read_text())


def test_model_names_are_found_in_code_and_not_in_prose() -> None:
    text = '"""As FLUX does."""\n\n# Qwen too\nkind = "flux"\n\n\ndef wide() -> None:\n    """SD3."""\n'
    assert model_names(text) == [(4, '"flux"')]
