"""The compiler makes no tensor on the host for a model that is elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.serving import ROOT


@pytest.mark.slow
def test_a_model_on_another_device_is_compiled_there() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.elsewhere"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert finished.returncode == 0, finished.stderr[-2000:]
    told = json.loads(finished.stdout.splitlines()[-1])
    assert told["places"] == ["elsewhere"]
    assert len(told["files"]) == 17 and all(told["files"].values())
    assert all(flops > 0 for flops in told["flops"]) and told["glues"] == [["glue/0.pt2", told["glues"][0][1]]]
