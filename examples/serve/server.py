"""Serve a bundle with Ray Serve on this machine: python -m examples.serve.server demo/served.edit

Until SIGINT or SIGTERM; then jobs under way finish, and new ones are refused.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from ray import serve

from examples.serve.ending import Ending
from examples.serve.metrics import jobs_under_way
from examples.serve.replica import Replica

APP = "edit_compile"
LAST = 8
"""Times for each replica that the server is asked for its health before it ends: each comes to some replica."""


def start(
    bundle: Path,
    shared: str,
    *,
    replicas: int = 2,
    engine: str | None = "torch",
    max_batch: int = 8,
    max_waiting: int = 32,
    threads: int = 1,
    host: str = "127.0.0.1",
    port: int = 8000,
) -> None:
    """Have `replicas` processes of `threads` threads each answer at http://host:port.

    `shared` is an empty folder: what the replicas count together is there, and whether the end has come (`Ending`).
    Ray runs.
    """
    serve.start(http_options={"host": host, "port": port})
    places = max_batch + max_waiting
    deployed = Replica.options(
        num_replicas=replicas,
        max_ongoing_requests=places + 16,  # a replica itself says that its queue is full, and answers /health then
        max_queued_requests=replicas * places,
        graceful_shutdown_timeout_s=120,
        ray_actor_options={
            "num_cpus": threads,
            "runtime_env": {"env_vars": {"PROMETHEUS_MULTIPROC_DIR": shared, "OMP_NUM_THREADS": str(threads)}},
        },
    )
    given = str(bundle.resolve()), engine, max_batch, max_waiting, threads, shared
    serve.run(deployed.bind(*given), name=APP)


def stop(shared: str, host: str, port: int, replicas: int, patience: float = 120.0) -> None:
    """Wait for the jobs there are, `patience` seconds, and end everything; `Ending` has the `replicas` take no more.

    Jobs are counted in the folder `shared`. Replicas answer 503 until all processes end together: Ray's own way to end
    an application has its proxy answer 404 to what comes meanwhile.
    """
    until = time.monotonic() + patience
    while time.monotonic() < until:
        if not jobs_under_way(shared):
            # answered through Ray's proxy after the last images, and after a job that was being taken has been counted
            _ask_health(host, port, LAST * replicas, until)
            if not jobs_under_way(shared):
                break
        time.sleep(0.1)
    ray.shutdown()


def _ask_health(host: str, port: int, times: int, until: float) -> None:
    for _ in range(times):
        if time.monotonic() > until:
            return
        with suppress(OSError, HTTPException), closing(HTTPConnection(host, port, timeout=10)) as connection:
            connection.request("GET", "/health")
            connection.getresponse().read()


def on_signal(handler: Callable[..., None]) -> None:
    """Have `handler` called where the server is asked to end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--engine", default="torch")
    parser.add_argument("--max-batch", type=int, default=8, help="jobs of one call")
    parser.add_argument("--max-waiting", type=int, default=32, help="jobs that wait in a replica, at most")
    parser.add_argument("--threads", type=int, default=1, help="of a replica")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    given = vars(parser.parse_args())
    cpus = max(os.cpu_count() or 1, given["replicas"] * given["threads"])
    with tempfile.TemporaryDirectory() as shared:
        ended = threading.Event()

        def end(*_: object) -> None:
            Ending(shared).begin()
            ended.set()

        on_signal(end)
        ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False)
        on_signal(end)  # ray.init has put handlers of its own in place
        start(given.pop("bundle"), shared, **given)
        host, port = given["host"], given["port"]
        sys.stdout.write(f"ready: http://{host}:{port}/images\n")
        sys.stdout.flush()
        ended.wait()
        sys.stdout.write("finishing what there is\n")
        sys.stdout.flush()
        stop(shared, host, port, given["replicas"])


if __name__ == "__main__":
    main()
