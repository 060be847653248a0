"""How many jobs are under way, as another process than the replicas' reads it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("prometheus_client")

from examples.serve.metrics import jobs_under_way

ROOT = Path(__file__).parents[1]
REPLICA = """
import sys
from examples.serve.jobs import Ask, Job
from examples.serve.metrics import Metrics
metrics, jobs = Metrics(), [Job("image", Ask(1), None) for _ in range(3)]
for job in jobs:
    metrics.taken(job)
metrics.ended(jobs[0], "done")
print("taken", flush=True)
sys.stdin.readline()
"""


def test_jobs_of_the_living_are_counted(tmp_path: Path) -> None:
    assert jobs_under_way(str(tmp_path)) == 0
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    command, pipe = [sys.executable, "-c", REPLICA], subprocess.PIPE
    replicas = [
        subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True) for _ in range(2)
    ]
    try:
        for replica in replicas:
            assert replica.stdout is not None and replica.stdout.readline() == "taken\n"
        assert jobs_under_way(str(tmp_path)) == 4
        replicas[0].kill()
        replicas[0].wait()
        assert jobs_under_way(str(tmp_path)) == 2
    finally:
        for replica in replicas:
            replica.kill()
            replica.communicate()
