"""The figures of benchmarks.gpu as tables: for the terminal, and for the README."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.table import Table

from benchmarks.markdown import table
from edit_compile.measuring.machine import summary
from passes.graphs.numbers import largest

Found = Mapping[str, Any]


def _ratio(done: Found) -> str:
    ratio = done["speed"]["ratio"]
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def _dispatch(done: Found, mode: str) -> str:
    found = done["dispatch"][mode]
    waits = found["host_waits"].get("per_step")
    counted = "" if waits is None else f", the host waits {waits:g} times"
    noted = f" ({found['note']})" if found["note"] else ""
    return f"{found['ms_per_step']['median']:.1f} ms{counted}{noted}"


def _parity(rows: list[Found]) -> str:
    """The largest difference of any width, and whether it is more than is allowed."""
    off = largest(row["relative"] for row in rows)
    return f"{off:.1e}" if all(row["relative"] <= row["allowed"] for row in rows) else f"{off:.1e}, TOO MUCH"


COLUMNS: dict[str, Callable[[Found], str]] = {
    "eager, ms per step": lambda done: f"{done['speed']['eager_ms']['median']:.1f}",
    "compiled": lambda done: f"{done['speed']['compiled_ms']['median']:.1f}",
    "times faster": _ratio,
    "FLOPs would allow": lambda done: f"{done['speed']['flop_limit']:.2f}",
    "weights, four widths / dense": lambda done: f"{done['memory']['ratio']:.2f}",
    "decided on the host": lambda done: _dispatch(done, "host"),
    "decided on the device": lambda done: _dispatch(done, "device"),
    "dense / torch.compile": lambda done: f"{done['inductor']['ratio']:.2f}",
    "off eager, any width": lambda done: _parity(done["parity"]),
}
"""Headings, and what stands below them for an engine; KeyError or TypeError where it was not measured."""


def cell(heading: str, done: Found) -> str:
    """A figure; empty where there is none."""
    try:
        return COLUMNS[heading](done)
    except (KeyError, TypeError, ValueError):
        return ""


def why_not(done: Found) -> list[str]:
    """Why pieces of an engine have no figures, each reason once."""
    reasons: dict[str, list[str]] = {}
    for name, found in done.items():
        told = found if isinstance(found, Mapping) else {}
        for kind in ("unavailable", "skipped", "error"):
            if kind in told:
                reasons.setdefault(f"{kind}: {told[kind]}", []).append(name)
    return [f"{', '.join(names)} {reason}" for reason, names in reasons.items()]


def table_of(record: Found, machine: Mapping[str, str]) -> Table:
    """One model, a column for each engine, reasons below."""
    engines = record["engines"]
    table = Table("", *engines, title=f"{record['title']}, {record['dtype']}, {record['pixels']} pixels")
    for heading in COLUMNS:
        table.add_row(heading, *(cell(heading, done) for done in engines.values()))
    table.add_row("", *("\n".join(why_not(done)) for done in engines.values()))
    if machine:
        table.caption = summary(machine)
    return table


HEADINGS = ("eager, ms per step", "compiled", "times faster", "FLOPs would allow", "weights, four widths / dense")
"""Of COLUMNS, those in the README."""


def markdown(results: Found) -> str:
    """All models and engines with a measured speed, with the machine named below them; reasons for whole models."""
    rows, told = list[list[str]](), list[str]()
    for record in results["models"]:
        for engine, done in record["engines"].items():
            if "ratio" in (done.get("speed") or {}):
                run = f"{record['title']}, {record['dtype']}, {engine}"
                rows.append([run, *(cell(name, done) for name in HEADINGS)])
        reason = (record["prepare"] or {}).get("skipped")
        told += [f"{record['title']}: {reason}."] if reason else []
    machine = results["machine"]
    steps = ", ".join(
        f"{one['title']} {one['steps']} steps ({one['preset']['steps']} in the paper) at {one['pixels']} pixels"
        for one in results["models"]
    )
    where = f"{summary(machine)}, CUDA {machine['cuda']}, driver {machine['driver']}, {machine['gpu_memory']}"
    taken = f"{where}; {steps}; random weights, decisions at the paper's budgets."
    return "\n".join([table(("run", *HEADINGS), rows), "", taken, *told])
