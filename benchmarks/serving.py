"""The figures of docs/serving.md, from results/serve.json, which `python -m examples.serve.load` writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.markdown import table
from edit_compile.measuring.machine import summary

LOADS = (
    "max batch",
    "asked, 1/s",
    "load",
    "images, 1/s",
    "jobs a call",
    "refused",
    "timed out",
    "errors",
    "p50 p95 p99, s",
)
TIERS = ("max batch", "load", "tier", "images", "p50, s", "p95, s", "p99, s")

ENOUGH = 20
"""Latencies of which p95 and p99 are told."""


def loads(record: Mapping[str, Any]) -> str:
    """A row for each rate, and where it was taken."""
    rows = [
        (
            str(run["max_batch"]),
            f"{run['rate']:.1f}",
            f"{run['load']:g}",
            f"{run['images_per_second']:.2f}",
            f"{run['batch']:.1f}",
            f"{run['refused']} of {run['asked']}",
            str(run["timed_out"]),
            str(run["errors"]),
            _latencies(run["latency_of_all"]),
        )
        for run in record["runs"]
    ]
    machine = record["machine"]
    taken = (
        f"{summary(machine)}, Ray {machine['ray']}; engine {record['engine']}, {record['replicas']} replicas of one "
        f"thread, at most {record['max_waiting']} jobs waiting in each; clients on the same machine; "
        f"seed {record['seed']}, commit {record['commit']}. Load 1 is what the replicas do one image at a time, in "
        f"{record['seconds_alone']:.2f} s each, the mean of the tiers. "
        f"Before it began, {record['load_average']:.1f} processes were running on the machine."
    )
    return f"{table(LOADS, rows)}\n\n{taken}"


def tiers(record: Mapping[str, Any]) -> str:
    """Latencies of each tier at each rate."""
    rows = []
    for run in record["runs"]:
        for tier, found in run["latency"].items():
            told = [_share(found, share) for share in ("p50", "p95", "p99")]
            rows.append((str(run["max_batch"]), f"{run['load']:g}", tier, str(found["count"]), *told))
    return table(TIERS, rows)


def trials(record: Mapping[str, Any]) -> str:
    """What was tried beside, in sentences."""
    found = record["trials"]
    cancelled, killed, end = found["cancelled"], found["killed"], found["end"]
    ended = ", ".join(f"{count} {outcome}" for outcome, count in sorted(cancelled["ended"].items()))
    then = ", ".join(f"{count} of status {status}" for status, count in sorted(end["then_asked"].items()))
    then = then or "nothing, they were done before"
    largest = max(found["apart"], *(run["apart"] for run in record["runs"]))
    return "\n".join(
        [
            f"- Images beside those drawn alone, of the same seed and tier, {found['compared']} from these trials and "
            f"some of each rate: no pixel is further apart than {largest:.1e}, of a range of 2.",
            f"- Half of the clients go away at a random moment: {cancelled['done']} of the {cancelled['stayed']} that "
            f"stayed got their image; of the jobs, {ended}.",
            f"- A replica is killed under {killed['asked']} requests: {killed['done_at_first']} got their image at "
            f"first, {killed['done_when_asked_again']} after the others had asked again.",
            f"- SIGTERM under {end['under_way']} requests: {end['done']} got their image; what was asked then: {then}.",
        ]
    )


def sections(record: Mapping[str, Any]) -> dict[str, str]:
    """What stands between which marks."""
    return {"loads": loads(record), "latencies": tiers(record), "trials": trials(record)}


def _share(found: Mapping[str, float], share: str) -> str:
    """A share of the latencies in seconds; not the last of a few."""
    enough = 1 if share == "p50" else ENOUGH
    return f"{found[share]:.2f}" if found["count"] >= enough else "-"


def _latencies(found: Mapping[str, float]) -> str:
    return " ".join(f"{found[share]:.2f}" for share in ("p50", "p95", "p99")) if found["count"] else "-"
