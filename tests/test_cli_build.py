"""`edit-compile build` with TensorRT-RTX: goes on where it stopped, and refuses what cannot be in one line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import edit_compile.bundles.engine_building as engine_building
from edit_compile.bundles.engine_building import build_engines
from tests import tensorrt_cases
from tests.test_cli import run

RTX = ("--engine", "tensorrt-rtx", "--target", "sm_89")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx_cu13 is not installed (see the Makefile)")
    return tensorrt_cases.saved(tmp_path, kinds=("single",))


def counts(text: str) -> tuple[int, int]:
    found = re.search(r"(\d+) engines built, (\d+) kept", text)
    assert found, text
    return int(found[1]), int(found[2])


def engines(bundle: Path) -> list[Path]:
    return sorted(bundle.glob("engines/*/*.engine"))


def test_what_was_built_is_kept_and_the_rest_is_built(bundle: Path) -> None:
    text = run("build", bundle, *RTX)
    assert counts(text) == (4, 0)
    assert len(re.findall(r"sm_89.*\d\.\d\d .*\d{5,}", text)) == 4
    assert counts(run("build", bundle, *RTX, "--target", "sm_120")) == (4, 4)
    assert len(engines(bundle)) == 8


def test_what_is_damaged_stale_or_of_other_options_is_built_anew(bundle: Path) -> None:
    run("build", bundle, *RTX)
    first, second, third, _ = engines(bundle)
    good = first.read_bytes()
    first.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    second.unlink()
    third.with_suffix(".json").write_text(third.with_suffix(".json").read_text().replace('"sm_89"', '"sm_80"'))
    assert counts(run("build", bundle, *RTX)) == (3, 1)
    assert len(first.read_bytes()) == len(good)
    assert counts(run("build", bundle, *RTX)) == (0, 4)
    assert counts(run("build", bundle, *RTX, "--max-batch", 2)) == (4, 0)
    assert counts(run("build", bundle, *RTX, "--weights", "packed", "--max-batch", 2)) == (4, 0)
    assert counts(run("build", bundle, *RTX, "--max-batch", 2)) == (0, 4)


def test_engines_of_another_version_are_left_alone(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("build", bundle, *RTX)
    real = engine_building.open_library
    monkeypatch.setattr(engine_building, "open_library", lambda name: type(real(name))(name, "1.8.0", real(name).api))
    assert counts(run("build", bundle, *RTX)) == (4, 0)
    assert len({place.parent.name for place in engines(bundle)}) == 2


def test_an_interrupted_build_goes_on(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = engine_building.make, []

    def stopping(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(engine_building, "make", stopping)
    with pytest.raises(KeyboardInterrupt):
        build_engines(bundle, "tensorrt-rtx", ["sm_89"])
    there = {place.name for place in engines(bundle)}
    built = build_engines(bundle, "tensorrt-rtx", ["sm_89"])
    assert len(built) == 4
    assert 2 <= sum(item.kept for item in built) == len(there) <= 3  # what was under way beside it may have ended


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--engine", "tensorrt-rtx", "--target", "sm_90"), "--engine tensorrt on that machine itself"),
        ((*RTX, "--weights", "both"), "weights are shared or packed"),
        ((*RTX, "--max-batch", 0), "--max-batch is at least 1"),
        (("--engine", "torch", "--target", "sm_89"), "are for tensorrt and tensorrt-rtx"),
        (("--max-batch", 2), "are for tensorrt and tensorrt-rtx"),
    ],
)
def test_a_users_mistake_is_one_line(bundle: Path, arguments: tuple[object, ...], said: str) -> None:
    text = run("build", bundle, *arguments, code=2)
    assert said in text
    assert len(text.strip().splitlines()) == 1
    assert not engines(bundle)


def test_tensorrt_that_is_not_installed_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    text = run("build", tensorrt_cases.saved(tmp_path), "--engine", "tensorrt", code=2)
    assert "TensorRT 11 is not installed here" in text
    assert "pip install 'tensorrt>=11'" in text
    assert len(text.strip().splitlines()) == 1


def test_an_interrupted_build_says_what_is_kept(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine_building, "make", stopped)
    assert "interrupted: 0 engines are kept" in run("build", bundle, *RTX, code=130)
