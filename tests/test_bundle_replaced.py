"""A bundle that is replaced: killed on the way, by two at once, beside readers, and what permissions it has."""

from __future__ import annotations

import os
import random
import signal
import stat
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from runtime.base.errors import BundleError
from runtime.bundle import digest, folder
from runtime.bundle import files as bundle
from tests import programs

PROGRAMS = [programs.make(("single",), seed=seed) for seed in (0, 1)]
KILLS = 25


def which(path: Path) -> int:
    """Which of PROGRAMS the bundle holds; raises where it is neither."""
    weight = bundle.load(path).weights["glue.into"]
    return next(number for number, one in enumerate(PROGRAMS) if torch.equal(one.weights["glue.into"], weight))


@pytest.mark.skipif(sys.platform != "linux", reason="names are exchanged on Linux alone")
def test_a_reader_finds_the_old_or_the_new_one_whenever_the_writer_is_killed(tmp_path: Path) -> None:
    target, drawn = tmp_path / "bundle", random.Random(0)
    bundle.save(PROGRAMS[0], target)
    found = []
    for _ in range(KILLS):
        child = os.fork()
        if not child:
            while True:
                for program in (PROGRAMS[1], PROGRAMS[0]):
                    bundle.save(program, target)
        time.sleep(drawn.uniform(0.0, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found.append(which(target))
    assert set(found) == {0, 1}
    bundle.save(PROGRAMS[0], target)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_two_writers_and_a_reader_at_once(tmp_path: Path) -> None:
    target, failed = tmp_path / "bundle", list[BaseException]()
    bundle.save(PROGRAMS[0], target)

    def writes(number: int) -> None:
        try:
            for _ in range(15):
                bundle.save(PROGRAMS[number], target)
        except BaseException as error:
            failed.append(error)

    writers = [threading.Thread(target=writes, args=(number,)) for number in (0, 1)]
    for writer in writers:
        writer.start()
    seen = 0
    while any(writer.is_alive() for writer in writers):
        assert which(target) in (0, 1)
        seen += 1
    assert not failed and seen
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_where_names_cannot_be_exchanged_it_is_replaced_in_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, rename = tmp_path / "bundle", Path.rename
    bundle.save(PROGRAMS[0], target)
    monkeypatch.setattr(folder, "_exchanged", lambda *_: False)
    bundle.save(PROGRAMS[1], target)
    assert which(target) == 1

    def failing(self: Path, other: Path) -> Path:
        if other == target and self.name != "old" and not target.exists():
            raise OSError("disk full")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(BundleError, match="disk full"):
        bundle.save(PROGRAMS[0], target)
    assert which(target) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_what_a_living_process_or_another_machine_writes_is_left(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    own = folder.temporary_beside(target)
    other = tmp_path / ".bundle.elsewhere.1.x"
    dead = own.with_name(own.name.replace(f".{os.getpid()}.", f".{2**22 + 1}."))
    for path in (own, other, dead):
        path.write_text("x")
    bundle.save(PROGRAMS[0], target)
    assert own.exists() and other.exists() and not dead.exists()


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_permissions_are_those_of_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        bundle.save(PROGRAMS[0], tmp_path / "bundle")
    finally:
        os.umask(before)
    for path in ((tmp_path / "bundle"), *(tmp_path / "bundle").rglob("*")):
        wanted = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == wanted & ~umask, path


def test_a_bundle_that_is_replaced_while_it_is_checked_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, of_file, done = tmp_path / "bundle", digest.of_file, list[Path]()
    other = replace(PROGRAMS[1], manifest=replace(PROGRAMS[1].manifest, config={"other": 1}))
    bundle.save(PROGRAMS[0], target)

    def slow(path: Path) -> str:
        found = of_file(path)
        if path == target / bundle.WEIGHTS and not done:
            done.append(path)
            bundle.save(other, target)
        return found

    monkeypatch.setattr(digest, "of_file", slow)
    loaded = bundle.load(target)
    assert done and dict(loaded.manifest.config) == {"other": 1}
    assert torch.equal(loaded.weights["glue.into"], other.weights["glue.into"])


def test_what_a_link_leads_to_is_replaced(tmp_path: Path) -> None:
    bundle.save(PROGRAMS[0], tmp_path / "v1")
    (tmp_path / "current").symlink_to("v1")
    for number in (1, 0, 1):
        bundle.save(PROGRAMS[number], tmp_path / "current")
        assert which(tmp_path / "v1") == number and (tmp_path / "current").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["current", "v1"]


def test_what_was_there_is_put_back_after_a_kill_between_two_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "bundle"
    bundle.save(PROGRAMS[0], target)
    left = folder.temporary_beside(target)
    left = left.with_name(left.name.replace(f".{os.getpid()}.", f".{2**22 + 1}."))
    left.mkdir()
    target.rename(left / "old")
    monkeypatch.setattr(bundle, "_write", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(BundleError, match="disk full"):
        bundle.save(PROGRAMS[1], target)
    assert which(target) == 0


def test_many_sweep_at_once(tmp_path: Path) -> None:
    target, failed = tmp_path / "bundle", list[BaseException]()
    dead = folder.temporary_beside(target).name.replace(f".{os.getpid()}.", f".{2**22 + 1}.")
    for number in range(200):
        (tmp_path / f"{dead}{number}" / "deep").mkdir(parents=True)

    def saves() -> None:
        try:
            bundle.save(PROGRAMS[0], target)
        except BaseException as error:
            failed.append(error)

    savers = [threading.Thread(target=saves) for _ in range(4)]
    for saver in savers:
        saver.start()
    for saver in savers:
        saver.join()
    assert not failed and [path.name for path in tmp_path.iterdir()] == ["bundle"]
