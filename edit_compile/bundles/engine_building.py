"""Building a bundle's TensorRT engines; what was built before and still fits is kept.

A library that builds ahead of time builds several at once, each with a builder and a thread of its own. One that builds
on the GPU does not: it chooses kernels by timing them, which another build would disturb.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from runtime.base.errors import EngineError
from runtime.bundle import files as bundle
from runtime.bundle.program import Program
from runtime.engines.tensorrt import cache
from runtime.engines.tensorrt.build import Report
from runtime.engines.tensorrt.jobs import MAX_BATCH, Job, jobs, make
from runtime.engines.tensorrt.library import Library, Target, open_library, targets


@dataclass(frozen=True)
class BuiltEngine:
    """One engine: `seconds` of its build, now or, where it was `kept`, before; `block` where weights are packed."""

    plan: str
    kind: str
    width: float
    block: str
    target: str
    seconds: float
    bytes: int
    kept: bool


def build_engines(
    folder: Path, engine: str, asked: Sequence[str] = (), weights: str = "shared", max_batch: int = MAX_BATCH
) -> list[BuiltEngine]:
    """Build into `folder` what it lacks of the engines for `asked` GPUs (default: the one here).

    Each is kept as soon as it is there, so that a build that was interrupted goes on where it stopped. Raises
    BundleError for a damaged bundle, EngineError where the library is missing or cannot build.
    """
    library = open_library(engine)
    aims = targets(library, asked)
    return build_program(bundle.load(folder), folder, library, aims, weights, max_batch)


def build_program(
    program: Program, folder: Path, library: Library, aims: Sequence[Target], weights: str, max_batch: int
) -> list[BuiltEngine]:
    """As `build_engines`, for a program in memory; `folder` need hold nothing."""
    wanted = list(jobs(program, library, aims, weights, max_batch))
    at_once = (os.cpu_count() or 1) if library.ahead_of_time else 1
    with _progress(len(wanted)) as (step, report), ThreadPoolExecutor(at_once) as pool:

        def build(job: Job) -> BuiltEngine:
            with step(f"{job.plan.kind} {job.key.width:g} {job.target.name}"):
                return _kept(folder, job) or _built(folder, job, program, library, report)

        try:
            return list(pool.map(build, wanted))
        except BaseException:
            pool.shutdown(cancel_futures=True)  # those under way are kept
            raise


def table_of(built: Sequence[BuiltEngine], engine: str) -> Table:
    """One line per engine, and their sum; seconds are those of this run."""
    new = [item for item in built if not item.kept]
    table = Table(title=f"{engine}: {len(new)} engines built, {len(built) - len(new)} kept", show_footer=True)
    table.add_column("plan", "all")
    table.add_column("kind")
    table.add_column("width", justify="right")
    if any(item.block for item in built):
        table.add_column("block")
    table.add_column("target")
    table.add_column("seconds", f"{sum(item.seconds for item in new):.2f}", justify="right")
    table.add_column("bytes", f"{sum(item.bytes for item in built)}", justify="right")
    for item in built:
        blocks = [item.block] if any(other.block for other in built) else []
        seconds = "kept" if item.kept else f"{item.seconds:.2f}"
        table.add_row(item.plan[:12], item.kind, f"{item.width:g}", *blocks, item.target, seconds, f"{item.bytes}")
    return table


def _kept(folder: Path, job: Job) -> BuiltEngine | None:
    try:
        _, record = cache.read(folder, job.key)
    except EngineError:
        return None
    return _told(job, record, kept=True) if record.profiles == job.profiles else None


def _built(folder: Path, job: Job, program: Program, library: Library, report: Report) -> BuiltEngine:
    started = time.perf_counter()
    engine, timings = make(job, program, library, cache.read_timings(folder, job.key), report)
    record = cache.write(folder, job.key, job.profiles, engine, time.perf_counter() - started)
    cache.write_timings(folder, job.key, timings)
    return _told(job, record, kept=False)


def _told(job: Job, record: cache.Record, kept: bool) -> BuiltEngine:
    key = record.key
    return BuiltEngine(key.plan, job.plan.kind, key.width, key.block, key.target, record.seconds, record.bytes, kept)


@contextmanager
def _progress(total: int) -> Iterator[tuple[Callable[[str], AbstractContextManager[None]], Report]]:
    """What is entered around each build, and what reports of its phases."""
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, transient=True) as progress:
        whole = progress.add_task("building", total=total)
        phase = progress.add_task("", total=None)

        @contextmanager
        def step(what: str) -> Iterator[None]:
            progress.update(whole, description=f"building {what}")
            yield
            progress.advance(whole)

        def report(name: str, done: int, steps: int) -> None:
            progress.update(phase, description=name, completed=done, total=steps)

        yield step, report
