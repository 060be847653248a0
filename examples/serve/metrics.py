"""What the batcher does, as Prometheus metrics: of all processes that share PROMETHEUS_MULTIPROC_DIR, or this one."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from examples.serve.batcher import Watch
from examples.serve.jobs import Job

_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
LATENCIES = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120)
BATCHES = (1, 2, 4, 8, 16, 32)


class Metrics(Watch):
    """Metrics named edit_compile_*; one of it for each process, since names are registered once."""

    def __init__(self) -> None:
        _forget_the_dead(os.environ.get(_FOLDER, os.devnull))
        self._own = CollectorRegistry()
        self._requests = Counter(
            "edit_compile_requests", "Requests by tier and outcome", ("tier", "outcome"), registry=self._own
        )
        self._waiting = Gauge(
            "edit_compile_queue_length", "Jobs that wait", registry=self._own, multiprocess_mode="livesum"
        )
        self._under_way = Gauge(
            "edit_compile_jobs", "Jobs taken and not ended", registry=self._own, multiprocess_mode="livesum"
        )
        self._batches = Histogram(
            "edit_compile_batch_size", "Jobs that a step was taken of", buckets=BATCHES, registry=self._own
        )
        self._steps = Histogram("edit_compile_step_seconds", "Seconds of a step of a batch", registry=self._own)
        self._latency = Histogram(
            "edit_compile_latency_seconds",
            "Seconds from the request to its image",
            ("tier",),
            buckets=LATENCIES,
            registry=self._own,
        )

    def queued(self, waiting: int) -> None:
        self._waiting.set(waiting)

    def taken(self, job: Job) -> None:
        self._under_way.inc()

    def advanced(self, rows: int, seconds: float) -> None:
        self._batches.observe(rows)
        self._steps.observe(seconds)

    def ended(self, job: Job, outcome: str) -> None:
        self._under_way.dec()
        tier = job.ask.tier or "dense"
        self._requests.labels(tier, outcome).inc()
        if outcome == "done":
            self._latency.labels(tier).observe(job.age)

    def turned_away(self, tier: str | None, outcome: str) -> None:
        """A request that became no job: "queue full", "draining", or "refused", whose tier, any text, is not kept."""
        self._requests.labels("" if outcome == "refused" else tier or "dense", outcome).inc()

    def text(self) -> bytes:
        """All metrics, in Prometheus's text format."""
        if _FOLDER not in os.environ:
            return generate_latest(self._own)
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
        return generate_latest(registry)


def jobs_under_way(folder: str) -> int:
    """Jobs taken and not ended, of all living processes whose PROMETHEUS_MULTIPROC_DIR is `folder`."""
    _forget_the_dead(folder)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, folder)
    return int(registry.get_sample_value("edit_compile_jobs") or 0)


def _forget_the_dead(folder: str) -> None:
    """Take out the queue lengths of processes that were killed; what they counted stays counted."""
    for file in Path(folder).glob("gauge_live*_*.db"):
        process = int(file.stem.rpartition("_")[2])
        with suppress(PermissionError):  # it lives, and is not ours
            try:
                os.kill(process, 0)
            except ProcessLookupError:
                mark_process_dead(process, folder)
