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
from contextlib import suppress
from pathlib import Path

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from ray import serve
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from examples.serve.replica import Replica

APP = "edit_compile"


def start(
    bundle: Path,
    metrics: str,
    *,
    replicas: int = 2,
    engine: str | None = "torch",
    max_batch: int = 8,
    max_waiting: int = 32,
    threads: int = 1,
    host: str = "127.0.0.1",
    port: int = 8000,
) -> DeploymentHandle:
    """Have `replicas` processes of `threads` threads each answer at http://host:port; what `stop` takes.

    `metrics` is an empty folder, for what the replicas count together.
    """
    ray.init(num_cpus=max(os.cpu_count() or 1, replicas * threads), include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": host, "port": port})
    places = max_batch + max_waiting
    deployed = Replica.options(
        num_replicas=replicas,
        max_ongoing_requests=places + 16,  # a replica itself says that its queue is full, and answers /health then
        max_queued_requests=replicas * places,
        graceful_shutdown_timeout_s=120,
        ray_actor_options={
            "num_cpus": threads,
            "runtime_env": {"env_vars": {"PROMETHEUS_MULTIPROC_DIR": metrics, "OMP_NUM_THREADS": str(threads)}},
        },
    )
    handle = serve.run(deployed.bind(str(bundle.resolve()), engine, max_batch, max_waiting, threads), name=APP)
    handle.broadcast("check_health").results()  # so that the handle knows all replicas when `stop` needs them at once
    return handle


def stop(replicas: DeploymentHandle, patience: float = 120.0) -> None:
    """Have replicas answer 503 to what is new, wait for the jobs there are, `patience` seconds, and end everything."""
    with suppress(TimeoutError, DeploymentUnavailableError):  # some take longer; there are none left
        replicas.broadcast("drain").results(timeout_s=patience, return_exceptions=True)
    serve.delete(APP)
    serve.shutdown()
    ray.shutdown()


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
    with tempfile.TemporaryDirectory() as metrics:
        handle = start(given.pop("bundle"), metrics, **given)
        ended = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):  # only now: ray.init puts handlers of its own in place
            signal.signal(number, lambda *_: ended.set())
        sys.stdout.write(f"ready: http://{given['host']}:{given['port']}/images\n")
        sys.stdout.flush()
        ended.wait()
        sys.stdout.write("finishing what there is\n")
        sys.stdout.flush()
        stop(handle)


if __name__ == "__main__":
    main()
