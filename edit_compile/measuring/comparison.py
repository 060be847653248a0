"""The result of `benchmark`: numbers, their limit, and how to show them."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from edit_compile.measuring.machine import summary
from edit_compile.measuring.timing import Spread


@dataclass(frozen=True)
class BlockWork:
    """What one request did with the blocks of one kind.

    `rows` counts (step, block, row) triples, `skipped`, `reused` and `computed` sum to it; `widths` says how many were
    computed at each width; `flops` and `dense_flops` are the work done and that of every row at full width.
    """

    kind: str
    blocks: int
    rows: int
    skipped: int
    reused: int
    computed: int
    widths: dict[float, int]
    flops: int
    dense_flops: int


@dataclass(frozen=True)
class Comparison:
    """Eager and compiled on the same steps.

    `eager_ms` and `compiled_ms` spread over all timed steps; `ratio` is eager seconds of a whole request divided by
    compiled seconds of the same, spread over the requests. `flops` and `dense_flops` are of one request.
    `resident_bytes` holds all widths and the routers, `dense_bytes` the eager model's parameters and buffers.
    """

    model: str
    engine: str
    dtype: str
    steps: int
    repeats: int
    eager_ms: Spread
    compiled_ms: Spread
    ratio: Spread
    dense_flops: int
    flops: int
    dense_bytes: int
    resident_bytes: int
    blocks: tuple[BlockWork, ...]
    machine: dict[str, str] = field(default_factory=dict)

    @property
    def flop_limit(self) -> float:
        """Dense FLOPs / FLOPs left: the ratio if time were FLOPs alone."""
        return self.dense_flops / max(self.flops, 1)

    @property
    def efficiency(self) -> float:
        """Measured ratio / `flop_limit`."""
        return self.ratio.median / self.flop_limit

    @property
    def memory(self) -> float:
        """Resident weights at all widths / dense weights."""
        return self.resident_bytes / max(self.dense_bytes, 1)

    def to_json(self) -> str:
        """All fields and the derived figures, as JSON."""
        derived = {"flop_limit": self.flop_limit, "efficiency": self.efficiency, "memory": self.memory}
        return json.dumps(asdict(self) | derived, indent=1)

    def table(self) -> Table:
        """The comparison as a rich table, with what was done per kind of block below it."""
        table = Table(title=f"{self.model}, {self.dtype}, {self.engine}, {self.steps} steps x {self.repeats}")
        table.add_column("")
        table.add_column("median", justify="right")
        table.add_column("middle half", justify="right")
        for name, spread, unit in (
            ("eager", self.eager_ms, "ms of a step"),
            ("compiled", self.compiled_ms, "ms of a step, which may be one that reuses"),
            ("ratio", self.ratio, "times faster, whole requests"),
        ):
            table.add_row(f"{name} ({unit})", f"{spread.median:.4g}", f"{spread.low:.4g} to {spread.high:.4g}")
        table.add_row("what the FLOPs left allow", f"{self.flop_limit:.4g}", f"{self.efficiency:.0%} of it reached")
        table.add_row(
            "weights, all widths / dense",
            f"{self.memory:.3g}",
            f"{self.resident_bytes / 2**20:.0f} / {self.dense_bytes / 2**20:.0f} MiB",
        )
        for block in self.blocks:
            table.add_row(f"{block.kind} x {block.blocks}", f"{share(block):.0%} of FLOPs", _what_was_done(block))
        table.caption = summary(self.machine) if self.machine else None
        return table

    def plot(self, path: str | Path) -> None:
        """Write latency bars, with the latency that the FLOPs left would allow, as the image `path`."""
        from edit_compile.measuring.plot import latency_bars

        bars = {"eager": self.eager_ms, "compiled": self.compiled_ms}
        latency_bars(bars, limit=self.eager_ms.median / self.flop_limit).savefig(path)

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=110)
        console.print(self.table())
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()


def share(block: BlockWork) -> float:
    """FLOPs done of what all the rows at full width would have taken."""
    return block.flops / max(block.dense_flops, 1)


def _what_was_done(block: BlockWork) -> str:
    widths = ", ".join(f"{count / block.rows:.0%} at {width:g}" for width, count in sorted(block.widths.items()))
    parts = [f"{block.skipped / block.rows:.0%} skipped"]
    if block.reused:
        parts.append(f"{block.reused / block.rows:.0%} reused")
    return ", ".join([*parts, widths] if widths else parts)
