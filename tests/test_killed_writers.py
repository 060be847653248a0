"""Writers that are killed, find the disk full or may not write: what was there stays, and nothing is left over."""

from __future__ import annotations

import os
import resource
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from runtime.base.errors import BundleError, EngineError
from runtime.bundle import files as bundle
from tests import programs
from tests.torture.kills import WRITERS, campaign


def in_a_child(work: Callable[[], object]) -> str:
    """What `work` raises in a process of its own, as text; "" where nothing."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        told = ""
        try:
            work()
        except BaseException as error:
            told = f"{type(error).__name__}: {error}"
        os.write(writer, told.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    return told


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "an elastic model"])
def test_a_reader_finds_the_old_or_the_new_wherever_a_writer_is_killed(name: str) -> None:
    kills, wrong = campaign(name, seed=1, randomly=4, every=5)
    assert kills >= 5 and wrong == []


@pytest.mark.parametrize("name", ["a bundle", "an engine", "inputs", "a checkpoint"])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, name: str) -> None:
    writer = WRITERS[name]
    writer.write(tmp_path, 0)
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        writer.write(tmp_path, 1)

    told = in_a_child(full)
    assert "File too large" in told, told
    if name in ("a bundle", "an engine"):
        kind = BundleError if name == "a bundle" else EngineError
        assert told.startswith(f"{kind.__name__}: {tmp_path}") and "cannot be written" in told
    assert writer.read(tmp_path) == 0
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes a user who may not write")
@pytest.mark.parametrize(
    ("mode", "told"), [(0o755, "is not a folder, or not one that may be written to"), (0o700, "have it opened")]
)
def test_a_folder_that_may_not_be_written_to_is_named(mode: int, told: str) -> None:
    program = programs.make(("single",))
    with tempfile.TemporaryDirectory() as place:  # pytest's own folders are closed to others
        folder = Path(place)
        folder.chmod(mode)

        def as_nobody() -> None:
            os.setuid(65534)
            bundle.save(program, folder / "model.edit")

        found = in_a_child(as_nobody)
        assert place in found and told in found
        assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", ["an engine", "inputs", "a checkpoint"])
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_permissions_are_those_of_the_umask(tmp_path: Path, name: str, umask: int) -> None:
    before = os.umask(umask)
    try:
        WRITERS[name].write(tmp_path, 0)
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~umask}


def test_a_checkpoint_that_a_killed_run_began_at_another_step_goes(tmp_path: Path) -> None:
    left = tmp_path / f".step-00000007.{os.uname().nodename}.{2**22 + 1}.x"
    left.mkdir()
    (left / "model.safetensors").write_bytes(bytes(9))
    WRITERS["a checkpoint"].write(tmp_path, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


def test_a_bundle_is_read_while_another_process_writes_it(tmp_path: Path) -> None:
    target = tmp_path / "model.edit"
    made = [programs.make(("single",), seed=seed) for seed in (0, 1)]
    bundle.save(made[0], target)
    child = os.fork()
    if not child:
        for turn in range(30):
            bundle.save(made[turn % 2], target)
        os._exit(0)
    seen = set()
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        weight = bundle.load(target).weights["glue.into"]
        seen |= {number for number in (0, 1) if torch.equal(weight, made[number].weights["glue.into"])}
    assert seen == {0, 1}
    assert [path.name for path in tmp_path.iterdir()] == ["model.edit"]
