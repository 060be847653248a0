"""Long runs over one compiled transformer: nothing grows, nothing mixes; python -m tests.torture.long_runs.

    steps      thousands of steps, of one to four rows, by requests that end, break off, or are never ended
    threads    hundreds of threads, each of which begins a request and never ends it, eight at a time and all at once
    requests   thousands of names that are never ended

After a warm-up, resident memory (once the allocator has given back what is free), open files and threads are read, and
again at the end: memory may have grown by 8 MiB, the others not at all; status 1 where more did. That generations of
eight threads are what they are alone is tests/test_generations.py (`pytest -m slow` there makes 1,000).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import random
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from runtime.face.transformer import CompiledTransformer
from runtime.routing.policy import RoutingPolicy
from tests import programs

ALLOWED = 8 << 20
POLICY = RoutingPolicy(threshold=0.5, margin=0.3)


@dataclass(frozen=True)
class Held:
    """What this process holds."""

    memory: int
    files: int
    threads: int

    @classmethod
    def now(cls) -> Held:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(
            pages * os.sysconf("SC_PAGE_SIZE"), len(list(Path("/proc/self/fd").iterdir())), threading.active_count()
        )


def steps(model: CompiledTransformer, count: int, seed: int = 0) -> None:
    """`count` steps in requests of each kind, of one to four rows."""
    draw = random.Random(seed)
    done = 0
    while done < count:
        rows, length, how = draw.randint(1, 4), draw.randint(1, 6), draw.choice(("ends", "breaks", "goes on"))
        given = programs.inputs(rows, seed=draw.randrange(100))
        name = f"{how} {draw.randrange(50)}"
        with model.request(None if how == "ends" else name):
            for step in range(length):
                given["timestep"] = given["timestep"].fill_(1.0 - step / 10)
                model(**given)
                done += 1
            if how == "breaks":
                model.reset()


def in_threads(model: CompiledTransformer, count: int, at_once: int) -> None:
    """Requests of `count` threads, never ended, of which `at_once` run side by side."""
    for start in range(0, count, at_once):
        gate = threading.Barrier(min(at_once, count - start))

        def one(gate: threading.Barrier = gate) -> None:
            gate.wait()
            model(**programs.inputs(2))

        threads = [threading.Thread(target=one) for _ in range(gate.parties)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def named(model: CompiledTransformer, count: int) -> None:
    """Requests by `count` names, never ended."""
    for number in range(count):
        with model.request(f"request {number}"):
            model(**programs.inputs(1))


def growth(warm: Callable[[], object], work: Callable[[], object]) -> tuple[Held, Held]:
    """What is held before and after `work`, once `warm` has run."""
    warm()
    before = Held.now()
    work()
    return before, Held.now()


def grown(before: Held, after: Held) -> bool:
    """Whether more is held than may be."""
    return after.memory - before.memory > ALLOWED or after.files > before.files or after.threads > before.threads


def campaigns(model: CompiledTransformer, times: float) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """A warm-up and the work of each, by name."""
    many = round(600 * times)
    return {
        f"{round(5000 * times)} steps": (
            lambda: steps(model, 1000),
            lambda: steps(model, round(5000 * times), seed=1),
        ),
        f"{many} threads, 8 at once": (lambda: in_threads(model, 64, 8), lambda: in_threads(model, many, 8)),
        f"{many} threads at once, twice": (
            lambda: in_threads(model, 2 * many, many),
            lambda: in_threads(model, 2 * many, many),
        ),
        f"{round(4000 * times)} names": (
            lambda: named(model, 4200),
            lambda: named(model, round(4000 * times)),
        ),
    }


def main() -> int:
    """Run each on both engines of a CPU, and print what grew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=float, default=1.0, help="as long")
    times = parser.parse_args().times
    warnings.simplefilter("ignore")
    bad = False
    for engine in ("torch", "onnxruntime"):
        model = CompiledTransformer(programs.make(), engine, POLICY)
        for name, (warm, work) in campaigns(model, times).items():
            before, after = growth(warm, work)
            bad |= grown(before, after)
            more = f"{(after.memory - before.memory) / 2**20:+.1f} MiB, {after.files - before.files:+d} files"
            said = "GREW" if grown(before, after) else "level"
            print(f"{engine}, {name}: {more}, {after.threads - before.threads:+d} threads: {said}", flush=True)
    return int(bad)


if __name__ == "__main__":
    raise SystemExit(main())
