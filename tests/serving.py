"""The command line as on a machine that serves: what only the compiler needs cannot be imported."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ABSENT = ("diffusers", "transformers", "accelerate", "onnx", "onnxscript", "matplotlib", "jinja2")
"""What the extra `compile` brings and no serving machine has."""

_RUN = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name.partition('.')[0])
sys.meta_path.insert(0, Absent())
from edit_compile.cli import app
app({arguments!r})
"""


def run(*arguments: object, absent: tuple[str, ...] = ABSENT) -> subprocess.CompletedProcess[str]:
    """`edit-compile` with `arguments` where nothing of `absent` is installed."""
    code = _RUN.format(absent=set(absent), arguments=[str(argument) for argument in arguments])
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)


def extras() -> dict[str, list[str]]:
    """The extras of pyproject.toml."""
    found: dict[str, list[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    return found
