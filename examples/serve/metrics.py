"""What the batcher does, as Prometheus metrics of all processes that share PROMETHEUS_MULTIPROC_DIR, else of this one."""

from __future__ import annotations

import os

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from examples.serve.batcher import Watch
from examples.serve.jobs import Job

LATENCIES = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120)
BATCHES = (1, 2, 4, 8, 16, 32)


class Metrics(Watch):
    """Metrics named edit_compile_*; one of it for each process, since names are registered once."""

    def __init__(self) -> None:
        self._own = CollectorRegistry()
        self._requests = Counter(
            "edit_compile_requests", "Requests by tier and outcome", ("tier", "outcome"), registry=self._own
        )
        self._waiting = Gauge(
            "edit_compile_queue_length", "Jobs that wait", registry=self._own, multiprocess_mode="livesum"
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

    def advanced(self, rows: int, seconds: float) -> None:
        self._batches.observe(rows)
        self._steps.observe(seconds)

    def ended(self, job: Job, outcome: str) -> None:
        tier = job.ask.tier or "dense"
        self._requests.labels(tier, outcome).inc()
        if outcome == "done":
            self._latency.labels(tier).observe(job.age)

    def turned_away(self, tier: str | None, outcome: str) -> None:
        """A request that became no job: "refused" (its tier is not said, it may be any text), "queue full", "draining"."""
        self._requests.labels("" if outcome == "refused" else tier or "dense", outcome).inc()

    def text(self) -> bytes:
        """All metrics, in Prometheus's text format."""
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return generate_latest(self._own)
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
        return generate_latest(registry)
