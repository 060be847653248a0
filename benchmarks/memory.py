"""P4 as the operating system sees it: what loading a bundle and running it at every width adds to a fresh process.

python -m benchmarks.memory BUNDLE ENGINE prints the bytes as JSON.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch


def tensor_bytes() -> int:
    """Bytes of all tensors that this process holds, memory that they share counted once; fake ones have none."""
    gc.collect()
    plain = (torch.Tensor, torch.nn.Parameter)
    tensors = [thing for thing in gc.get_objects() if type(thing) in plain and thing.device.type != "meta"]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def measure_memory(bundle: Path, engine: str, dense_bytes: int) -> dict[str, float]:
    """Bytes added to a fresh process, and their ratio to the dense weights; activations are part of it."""
    command = [sys.executable, "-m", "benchmarks.memory", str(bundle), engine]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{finished.stderr}")
    measured: dict[str, float] = json.loads(finished.stdout.splitlines()[-1])
    return measured | {"ratio": measured["all_widths"] / dense_bytes}


def run_at_every_width(bundle: Path, engine: str) -> dict[str, Any]:
    """Resident bytes above those of the bare process: after one pass at full width, and after one at each width."""
    from edit_compile.bundles.verify import random_inputs
    from runtime.face.load import load
    from runtime.routing.schedule import ScheduledPolicy

    before = psutil.Process().memory_info().rss
    compiled = load(bundle, engine=engine)
    manifest = compiled.program.manifest
    inputs = {
        given.name: tensor[:1] if given.shape[0] is None else tensor
        for given in manifest.glues[0].inputs
        for tensor in [random_inputs(manifest)[given.name]]
    }
    added = {}
    for width in reversed(manifest.widths):
        compiled.policy = ScheduledPolicy(np.full((1, len(manifest.blocks)), width))
        compiled._reset_stateful_cache()
        compiled(**inputs)
        added[width] = psutil.Process().memory_info().rss - before
    return {"full_width": added[max(manifest.widths)], "all_widths": added[min(manifest.widths)]}


if __name__ == "__main__":
    print(json.dumps(run_at_every_width(Path(sys.argv[1]), sys.argv[2])))
