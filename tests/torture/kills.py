"""Writers killed anywhere: a reader finds the old or the new, whole; python -m tests.torture.kills [--seed 0].

What writes bundles, engines, checkpoints, elastic models, recorded calls and inputs is killed (SIGKILL) in a child
process: at each of its operations on files (as Python's audit hooks tell of them), and at random times. After each kill
what is there is read; after all of them one that is not killed must leave nothing but its own. Against power failures
nothing is promised: files are not synced. Status 1 where anything is neither the old nor the new, or left over.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from edit_compile.elastic.transformer import ElasticTransformer
from edit_compile.loading import load_inputs, save_inputs
from edit_compile.training.checkpoint import Checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from runtime.bundle import files as bundle
from runtime.engines.tensorrt import cache
from runtime.engines.tensorrt.jobs import Key
from tests import programs

EVENTS = ("open", "os.", "shutil.", "tempfile.", "ctypes.call", "ctypes.dlsym", "pathlib.")


@dataclass(frozen=True)
class Writer:
    """`write` puts the number 0 or 1 into a folder; `read` tells which is there, and raises for what is neither."""

    write: Callable[[Path, int], object]
    read: Callable[[Path], int | None]


@lru_cache
def program(number: int) -> programs.Program:
    return programs.make(("single",), seed=number)


def read_bundle(place: Path) -> int | None:
    weights = bundle.load(place / "model.edit").weights
    return next(n for n in (0, 1) if torch.equal(weights["glue.into"], program(n).weights["glue.into"]))


def checkpoint(number: int) -> Checkpoint:
    tensors = {"a": torch.full((64, 64), float(number)), "b": torch.arange(5.0)}
    return Checkpoint(10 + number, tensors, tensors, {f"{name}/m": one for name, one in tensors.items()}, {"n": number})


def read_checkpoint(place: Path) -> int | None:
    """The newest; every one that is listed has to be whole."""
    found = [load_checkpoint(path) for path in list_checkpoints(place)]
    for one in found:
        assert torch.equal(one.model["a"], torch.full((64, 64), float(one.config["n"])))
    return int(found[-1].config["n"])


KEY = Key("tensorrt", "11", "gpu", "9.0", "float16", "single", 1.0, "0", "shared")


def write_engine(place: Path, number: int) -> None:
    cache.write(place, KEY, (), bytes([number]) * 100_000, 1.0)


def read_engine(place: Path) -> int | None:
    """Engines and their records are two files: between them none is found, and the next build makes it."""
    try:
        data, _ = cache.read(place, KEY)
    except cache.EngineError:
        return None
    assert data in (bytes(100_000), b"\1" * 100_000)
    return data[0]


@lru_cache
def elastic(number: int) -> ElasticTransformer:
    import edit_compile
    from tests import models

    return edit_compile.elasticize(*models.tiny_plain(seed=number))


def read_elastic(place: Path) -> int | None:
    routers = load_file(place / "elastic" / "routers.safetensors")
    model = load_file(place / "elastic" / "model.safetensors")
    name = next(iter(model))
    found = [n for n in (0, 1) if torch.equal(model[name], elastic(n).model.state_dict()[name])]
    assert found and routers.keys() == elastic(0).routers.state_dict().keys()
    return found[0]


def read_inputs(place: Path) -> int | None:
    found = load_inputs(place / "inputs.safetensors")["x"]
    assert torch.equal(found, torch.full((500, 50), found[0, 0].item()))
    return int(found[0, 0])


WRITERS = {
    "a bundle": Writer(lambda place, number: bundle.save(program(number), place / "model.edit"), read_bundle),
    "a checkpoint": Writer(lambda place, number: save_checkpoint(place, checkpoint(number)), read_checkpoint),
    "an engine": Writer(write_engine, read_engine),
    "inputs": Writer(
        lambda place, number: save_inputs({"x": torch.full((500, 50), float(number))}, place / "inputs.safetensors"),
        read_inputs,
    ),
    "an elastic model": Writer(lambda place, number: elastic(number).save_pretrained(place / "elastic"), read_elastic),
}


def killed(writer: Writer, place: Path, number: int, at: int | None = None, after: float = 0.0) -> bool:
    """Write in a child that is killed at its operation `at` on files, or `after` seconds; whether that came to pass."""
    child = os.fork()
    if not child:
        if at is not None:
            _kill_at(at)
        while True:
            writer.write(place, number)
            if at is not None:
                os._exit(0)
            number = 1 - number
    if at is None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def _kill_at(count: int) -> None:
    seen = 0

    def hook(event: str, args: object) -> None:
        nonlocal seen
        if event.startswith(EVENTS) and event != "os.kill":
            seen += 1
            if seen > count:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def campaign(name: str, seed: int, randomly: int, every: int = 1) -> tuple[int, list[str]]:
    """Kills of one writer, at each `every`-th operation and at so many random times, and what went wrong."""
    writer, draw, wrong, kills = WRITERS[name], random.Random(seed), list[str](), 0
    with tempfile.TemporaryDirectory() as made:
        place = Path(made)
        for start in (0, 1):
            writer.write(place, start)
        before = _names(place)
        at, number = 0, 0
        while killed(writer, place, number, at=at):
            kills += 1
            wrong += _looked(writer, place, f"{name} killed at operation {at}")
            at, number = at + every, 1 - number
        for _ in range(randomly):
            after = draw.uniform(0.0, 0.05)
            kills += killed(writer, place, number, after=after)
            wrong += _looked(writer, place, f"{name} killed after {after:.4f} s")
            number = 1 - number
        for start in (0, 1):
            writer.write(place, start)
        if _names(place) != before:
            wrong.append(f"{name} leaves {sorted(set(_names(place)) ^ set(before))}")
    return kills, wrong


def _looked(writer: Writer, place: Path, where: str) -> list[str]:
    try:
        writer.read(place)
    except Exception as error:
        return [f"{where}: {type(error).__name__}: {error}"]
    return []


def _names(place: Path) -> list[str]:
    return sorted(str(path.relative_to(place)) for path in place.rglob("*"))


def main() -> int:
    """Kill every writer, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--randomly", type=int, default=100, help="kills at random times, for each writer")
    asked = parser.parse_args()
    bad = 0
    for name in WRITERS:
        kills, wrong = campaign(name, asked.seed, asked.randomly)
        bad += len(wrong)
        print(f"{name}: {kills} kills, {asked.randomly} of them at random times; {len(wrong)} wrong")
        for line in wrong[:10]:
            print(f"    {line}")
    return int(bad > 0)


if __name__ == "__main__":
    raise SystemExit(main())
