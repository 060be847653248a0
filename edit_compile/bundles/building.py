"""Building a bundle's engines on the machine that will run them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from rich.progress import track
from rich.table import Table

from runtime import engines
from runtime.bundle import files as bundle


@dataclass(frozen=True)
class Built:
    """One plan at one width: `seconds` to load it into the engine, `bytes` of its file."""

    plan: str
    kind: str
    width: float
    seconds: float
    bytes: int


def build(folder: Path, engine: str) -> list[Built]:
    """Load every plan of the bundle at every width into `engine`.

    What the engine "inductor" compiles, it compiles at the first call. Raises BundleError for a damaged bundle,
    EngineError for a plan the engine cannot run here.
    """
    program = bundle.load(folder)
    loader, suffix = engines.make(engine), engines.entry(engine).file
    variants = [(plan, index) for plan in program.manifest.plans for index in range(len(plan.variants))]
    built = []
    for plan, index in track(variants, description="building", transient=True):
        started = time.perf_counter()
        loader.load(plan, index, program.files)
        seconds = time.perf_counter() - started
        size = len(engines.plan_bytes(plan, index, suffix, program.files, engine))
        built.append(Built(plan.id, plan.kind, plan.variants[index].width, seconds, size))
    return built


def table_of(built: list[Built], engine: str) -> Table:
    """One line per plan and width, and their sum."""
    table = Table(title=f"{engine}: {len(built)} engines", show_footer=True)
    total = sum(item.seconds for item in built)
    table.add_column("plan", "all")
    table.add_column("kind")
    table.add_column("width", justify="right")
    table.add_column("seconds", f"{total:.3f}", justify="right")
    table.add_column("KiB", f"{sum(item.bytes for item in built) / 1024:.1f}", justify="right")
    for item in built:
        table.add_row(item.plan[:12], item.kind, f"{item.width:g}", f"{item.seconds:.3f}", f"{item.bytes / 1024:.1f}")
    return table
