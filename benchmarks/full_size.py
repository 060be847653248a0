"""What would be compiled of FLUX.1-dev and Qwen-Image at their own sizes: python -m benchmarks.full_size.

Neither weights nor a GPU: the models are built on the meta device from their published configurations, and dry-run at a
1024 x 1024 image. Each runs in a process of its own. Prints the reports, writes results/full_size.json.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.configurations import FLUX, QWEN_IMAGE, Place
from edit_compile.measuring.machine import describe_machine

RESULTS = Path(__file__).parent / "results" / "full_size.json"
META = Place(torch.device("meta"))
MODELS = {shape.title: shape for shape in (QWEN_IMAGE, FLUX)}


def measure(name: str) -> dict[str, Any]:
    """The dry run of one of MODELS in a fresh process: its figures, the report as text, seconds and peak memory."""
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.full_size", name],
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode:
        raise RuntimeError(f"the dry run of {name} failed:\n{finished.stderr}")
    measured: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return measured


def dry_run(name: str) -> dict[str, Any]:
    """See `measure`; in this process. Seconds include building the model, bytes the libraries."""
    import edit_compile

    started, worked = time.perf_counter(), time.process_time()
    model = MODELS[name].bare()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    report = edit_compile.compile(edit_compile.elasticize(model), inputs=MODELS[name].inputs(META), dry_run=True)
    return {
        "name": name,
        "parameters": parameters,
        "blocks": report.blocks,
        "plans": [asdict(row) for row in report.plans],
        "router_parameters": report.router_parameters,
        "router_flops": report.router_flops,
        "standalone": report.standalone,
        "refused": [[where, refusal.where, refusal.reason] for where, refusal in report.refused],
        "unchecked": list(report.unchecked),
        "seconds": time.perf_counter() - started,
        "processor_seconds": time.process_time() - worked,
        "peak_bytes": _peak_bytes(),
        "text": str(report),
    }


def _peak_bytes() -> int:
    """Largest resident size of this process; unlike getrusage's, it forgets the process that started this one."""
    found = re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return int(found[1]) * 1024


def main() -> None:
    rows = []
    for name in MODELS:
        row = measure(name)
        print(row.pop("text"))
        print(
            f"{name}: {row['parameters'] / 1e9:.1f} B parameters, {row['seconds']:.0f} s "
            f"({row['processor_seconds']:.0f} s of one processor), {row['peak_bytes'] / 2**30:.2f} GiB at most\n"
        )
        rows.append(row)
    RESULTS.write_text(json.dumps({"machine": describe_machine(), "rows": rows}, indent=1) + "\n")
    print(f"wrote {RESULTS.name}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(dry_run(sys.argv[1])))
    else:
        main()
