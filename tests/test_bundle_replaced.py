"""A bundle that is replaced: killed on the way, by two at once, beside readers, and what permissions it has."""

from __future__ import annotations

import os
import random
import signal
import stat
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from runtime.bundle import files as bundle
from runtime.bundle import folder
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
    with pytest.raises(OSError, match="disk full"):
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
