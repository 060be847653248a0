"""What a machine that serves needs: the Dockerfile as far as it can be read, and the commands without the compiler."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from runtime.face.transformer import CompiledTransformer
from tests import programs, serving

DOCKERFILE = (serving.ROOT / "Dockerfile").read_text()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("serving") / "model.edit"
    CompiledTransformer(programs.make(), "torch").save(path)
    return path


@pytest.mark.parametrize("command", ["inspect", "build", "verify"])
def test_the_command_runs_without_what_compiles(bundle: Path, command: str) -> None:
    done = serving.run(command, bundle)
    assert done.returncode == 0, done.stderr
    assert "single" in done.stdout.lower()


def test_an_error_is_one_line_without_what_compiles(bundle: Path) -> None:
    done = serving.run("verify", bundle, "--engine", "torch")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: engine 'torch' is what the others are compared with")


def test_what_needs_the_compiler_names_its_extra(bundle: Path, tmp_path: Path) -> None:
    done = serving.run("plot", bundle, "--output", tmp_path / "x.png")
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "error: matplotlib is not installed, which this command needs: pip install '.[compile]' in a checkout"
    )


def test_without_an_engines_library_it_says_how_to_install_it(bundle: Path) -> None:
    done = serving.run("verify", bundle, absent=(*serving.ABSENT, "onnxruntime", "threadpoolctl"))
    assert done.returncode == 2
    assert "onnxruntime cannot be loaded (No module named 'onnxruntime'): pip install '.[cpu]'" in done.stderr


def test_without_its_own_packages_the_command_says_what_to_install() -> None:
    done = serving.run("--help", absent=("typer",))
    assert done.returncode == 1
    assert done.stderr.strip() == "edit-compile needs typer: pip install '.[cli]'"


def test_the_extra_of_the_command_line_is_all_that_it_imports_beyond_the_runtime() -> None:
    names = {re.split(r"[<>=]", wanted)[0] for wanted in serving.extras()["cli"]}
    assert names == {"typer", "rich"}
    assert {re.split(r"[<>=]", wanted)[0] for wanted in serving.extras()["compile"]} >= names | set(serving.ABSENT)


def test_what_the_dockerfile_copies_is_there_and_is_not_ignored() -> None:
    copied = [name for line in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.M) for name in line.split()]
    assert {"runtime", "passes", "edit_compile", "pyproject.toml"} <= set(copied)
    assert [name for name in copied if not (serving.ROOT / name).exists()] == []
    kept = re.findall(r"^!(.+)$", (serving.ROOT / ".dockerignore").read_text(), re.M)
    assert sorted(kept) == sorted(copied)


def test_the_extras_that_the_dockerfile_names_exist_and_compile_is_not_among_them() -> None:
    named = {name for extras in re.findall(r'"\.\[([\w,-]+)', DOCKERFILE) for name in extras.split(",") if name}
    told = re.search(r"^# ENGINES: .*?: (.+?), or none", DOCKERFILE, re.M | re.S)
    assert told is not None
    offered = {name.strip("# \n") for name in re.sub(r"\([^)]*\)", "", told[1]).split(",")}
    assert named == {"cli"}
    assert {"gpu", "tensorrt-rtx"} <= offered <= set(serving.extras()) - {"compile"}


def test_the_dockerfile_pins_torch_as_the_project_does() -> None:
    assert "grep '^torch==' constraints.txt" in DOCKERFILE
    assert re.search(r"^torch==[\d.]+$", (serving.ROOT / "constraints.txt").read_text(), re.M)
