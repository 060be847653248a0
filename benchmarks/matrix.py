"""Tests that depend on other libraries, with the oldest and newest of them: python -m benchmarks.matrix [NAME ...].

Each combination has a virtual environment of its own under runs/matrix/ (made anew; some GB where pip's torch is built
for CUDA) and runs `TESTS` there, in one process and thread. Writes results/matrix.json, which keeps the rows of those
that were not asked for, and prints a table. Status 1 where a test failed, or a combination could not be installed.

    oldest    what pyproject.toml names as the lower bound of each direct dependency
    pinned    what constraints.txt pins
    newest    the newest of each direct dependency that pip finds

With --wheels FOLDER the wheels in there are installed last, without what they depend on: a torch for CUDA whose
libraries are too large to be fetched whole, with those that it needs to be imported.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.markdown import table
from edit_compile.measuring.machine import commit, describe_machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results" / "matrix.json"
PLACE = ROOT / "runs" / "matrix"
NAMES = ("oldest", "pinned", "newest")
EXTRAS = ("cpu", "compile")
TOOLS = ("pytest", "pytest-timeout", "pytest-xdist", "hypothesis")
TESTS = (
    "tests/test_bundle_versions.py",
    "tests/test_bundle.py",
    "tests/test_compile.py",
    "tests/test_engine_plans.py",
    "tests/test_engine_inductor.py",
    "tests/test_transformer_requests.py",
    "tests/test_pipelines.py",
    "tests/test_record_pipelines.py",
    "tests/test_cli.py",
)
COUNTED = (".", ":!benchmarks/results")
"""What makes a row's commit another one; a row before writes results."""
SHOWN = ("torch", "diffusers", "onnxruntime", "onnx", "onnxscript", "numpy", "safetensors", "msgspec", "transformers")


@dataclass(frozen=True)
class Row:
    """What came of one combination; `not_run` says why no test ran, where none did."""

    name: str
    commit: str
    python: str
    versions: Mapping[str, str]
    passed: int = 0
    skipped: int = 0
    failed: tuple[str, ...] = ()
    not_run: str | None = None
    wheels: tuple[str, ...] = dataclass_field(default=())


class InstallError(RuntimeError):
    """Something could not be installed; the message is the end of what pip said."""


def requirements() -> dict[str, str]:
    """The lower bound of each direct dependency, by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for e in EXTRAS for line in project["optional-dependencies"][e])]
    found = {}
    for line in lines:
        name, bound = re.fullmatch(r"([A-Za-z0-9_.-]+)>=([0-9.]+)", line).groups()  # type: ignore[union-attr]
        found[name] = bound
    return found


def pins() -> dict[str, str]:
    """What constraints.txt pins, by name in small letters."""
    lines = (ROOT / "constraints.txt").read_text().split()
    return {name.lower(): version for name, _, version in (line.partition("==") for line in lines)}


def wanted(name: str) -> list[str]:
    """What pip is asked for in the combination `name`."""
    bounds, pinned = requirements(), pins()
    versions = {"oldest": bounds, "pinned": {one: pinned[one.lower()] for one in bounds}}.get(name)
    return [f"{one}=={versions[one]}" if versions else f"{one}>={bounds[one]}" for one in bounds]


def install(name: str, folder: Path, wheels: Sequence[Path]) -> Path:
    """Make the environment of the combination `name` in `folder`, and give its Python; InstallError where pip fails."""
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python, asked, pinned = folder / "bin" / "python", wanted(name), pins()
    torch = f"torch=={pinned['torch']}" if wheels else next(one for one in asked if re.match(r"torch[=>]", one))
    _pip(python, "--upgrade", torch)  # first and alone: else it is resolved with everything else
    kept = folder / "constraints.txt"
    kept.write_text(f"torch=={_versions(python)['torch']}\n")
    if name == "pinned":
        kept.write_text((ROOT / "constraints.txt").read_text())
    tools = [f"{one}=={pinned[one]}" for one in TOOLS]
    others = [one for one in asked if not re.match(r"torch[=>]", one)]
    _pip(python, "-c", str(kept), "--upgrade", "--upgrade-strategy", "eager", *others, *tools)
    if wheels:
        _pip(python, "--no-deps", "--force-reinstall", *map(str, wheels))
    return python


def run(name: str, wheels: Sequence[Path] = (), installed: bool = False) -> Row:
    """Install the combination `name`, unless it is `installed`, and run the tests with it."""
    folder = PLACE / name
    told = {"commit": commit(*COUNTED), "python": ".".join(map(str, sys.version_info[:3]))}
    files = tuple(wheel.name for wheel in wheels)
    try:
        python = folder / "bin" / "python" if installed else install(name, folder, wheels)
    except InstallError as error:
        return Row(name, **told, versions={}, not_run=str(error), wheels=files)
    row = Row(name, **told, versions={one: v for one, v in _versions(python).items() if one in requirements()})
    report = folder / "report.xml"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "EDIT_COMPILE_CACHE": str(folder)}
    command = [str(python), "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", f"--junitxml={report}", *TESTS]
    report.unlink(missing_ok=True)
    with (folder / "pytest.log").open("w") as log:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
    if not report.exists() or done.returncode not in (0, 1):  # 1: a test failed, which the report tells
        end = (folder / "pytest.log").read_text().strip().splitlines()[-1:]
        return Row(**asdict(row) | {"not_run": f"pytest did not run: {' '.join(end)}", "wheels": files})
    return Row(**asdict(row) | _counted(report) | {"wheels": files})


def markdown(results: Mapping[str, Any]) -> str:
    """The table, and what it was taken on."""
    rows = results["rows"]
    lines = [[r["name"], *(r["versions"].get(one, "") for one in SHOWN), _outcome(r), r["commit"]] for r in rows]
    pythons = ", ".join(dict.fromkeys(r["python"] for r in rows))
    machines = ", ".join(dict.fromkeys(f"{r['machine']['cpu']}, {r['machine']['cores']} cores" for r in rows))
    files = ", ".join(dict.fromkeys(f"{len(r['tests'])} files of tests" for r in rows))
    by_hand = [f"{r['name']} from {w}, whose libraries for CUDA came by hand" for r in rows for w in r["wheels"][-1:]]
    told = f"{machines}, Python {pythons}; {files}{'; torch of ' * bool(by_hand)}{', '.join(by_hand)}."
    return f"{table(['', *SHOWN, 'tests', 'commit'], lines)}\n\n{told}"


def _outcome(row: Mapping[str, Any]) -> str:
    if row["not_run"]:
        return f"not run: {row['not_run']}"
    failed = f", **{len(row['failed'])} failed**" if row["failed"] else ""
    return f"{row['passed']} passed, {row['skipped']} skipped{failed}"


def _counted(report: Path) -> dict[str, Any]:
    """What pytest's report says became of the tests."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    names = tuple(f"{case.get('classname')}::{case.get('name')}" for case in failed)
    return {"passed": len(cases) - len(failed) - len(skipped), "skipped": len(skipped), "failed": names}


def _pip(python: Path, *arguments: str) -> None:
    command = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise InstallError(" ".join(errors[-2:]) or "pip failed")


def _versions(python: Path) -> dict[str, str]:
    """What is installed, by name as pyproject.toml writes it."""
    listed = subprocess.run([str(python), "-m", "pip", "list", "--format=json"], capture_output=True, check=True)
    found = {one["name"].lower(): one["version"] for one in json.loads(listed.stdout)}
    return {one: found[one.lower()] for one in requirements() if one.lower() in found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*NAMES, []], metavar="NAME", help=f"some of {', '.join(NAMES)}")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="wheels to install last, alone")
    parser.add_argument("--installed", action="store_true", help="take the environments of an earlier run as they are")
    asked = parser.parse_args()
    wheels = sorted(asked.wheels.resolve().glob("*.whl")) if asked.wheels else []
    held = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    rows = {row["name"]: row for row in held}
    for name in asked.names or NAMES:
        rows[name] = asdict(run(name, wheels, asked.installed)) | {"machine": describe_machine(), "tests": TESTS}
        ordered = [rows[one] for one in NAMES if one in rows]
        results = {"rows": ordered}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        sys.stdout.write(f"{name}: {_outcome(rows[name])}\n" + "".join(f"    {one}\n" for one in rows[name]["failed"]))
    sys.stdout.write(markdown(json.loads(RESULTS.read_text())) + "\n")
    return int(any(rows[name]["failed"] or rows[name]["not_run"] for name in asked.names or NAMES))


if __name__ == "__main__":
    raise SystemExit(main())
