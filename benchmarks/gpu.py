"""P1 to P6 on one GPU, for FLUX.1-dev and Qwen-Image at their own sizes with random weights.

python -m benchmarks.gpu                                      everything, at most 10 minutes
python -m benchmarks.gpu --models flux --pieces speed parity --engines torch tensorrt
python -m benchmarks.gpu --device cpu --small --output FOLDER  toys, on the CPU: shows that the code runs

Unverified: this has run on the CPU alone.

Every model is measured in a process of its own, piece by piece (benchmarks.gpu_pieces). A piece that fails leaves its
error and the others run; one that takes its process down is marked and the rest goes on in a new one. The results are
written after every piece, so that what is cut off leaves what it has. A model that does not fit the GPU is skipped,
with the numbers; nothing is made smaller unless --blocks or --resolution says so.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.configurations import FULL, SMALL
from benchmarks.gpu_case import ENGINES
from benchmarks.gpu_pieces import DEFAULT, PIECES
from benchmarks.gpu_table import table_of
from benchmarks.gpu_worker import BEGUN, Record
from runtime.base.errors import EngineError
from runtime.engines import check_name

RESULTS = Path(__file__).parent / "results"
WORKER = (sys.executable, "-W", "ignore", "-m", "benchmarks.gpu_worker")
RESTARTS = 5
"""New processes for a model whose process ended early."""
POLL = 1.0
"""Seconds between looks at what a process has measured."""

console = Console()


def record_of(model: str, given: argparse.Namespace) -> Record:
    """What is to be measured of a model, nothing of it yet."""
    engines = given.engines or ENGINES[given.device]
    shape = (SMALL if given.small else FULL)[model]
    return {
        "model": model,
        "title": shape.title,
        "device": given.device,
        "dtype": given.dtype or ("bfloat16" if given.device == "cuda" else "float32"),
        "small": given.small,
        "blocks": given.blocks,
        "resolution": given.resolution,
        "pixels": given.resolution or 16 * shape.side,
        "steps": given.steps,
        "repeats": given.repeats,
        "preset": {"name": shape.preset, "gate": shape.gate, "width": shape.width, "steps": shape.steps},
        "prepare": None,
        "engines": {engine: dict.fromkeys(given.pieces) for engine in engines},
    }


def measure(record: Record, deadline: float, note: Callable[[Record], None], command: Sequence[str] = WORKER) -> Record:
    """`record` filled in by `command` in processes of its own, until `deadline` (of time.monotonic).

    `note` is called with it whenever something has been added.
    """
    with tempfile.TemporaryDirectory(prefix="edit-compile-") as folder:
        place = Path(folder) / "record.json"
        for _ in range(1 + RESTARTS):
            place.write_text(json.dumps(record))
            why = _run([*command, str(place)], deadline, lambda: note(json.loads(place.read_text())))
            record = json.loads(place.read_text())
            left = settle(record, why)
            note(record)
            if not left or time.monotonic() >= deadline:
                break
    settle(record, why, over=True)
    note(record)
    return record


def settle(record: Record, why: str, over: bool = False) -> bool:
    """Mark what was begun and not ended; whether anything is left to do. Once it is `over`, what is left is skipped."""
    if record["prepare"] == BEGUN:
        record["prepare"] = {"error": why}
    for done in record["engines"].values():
        for name, found in done.items():
            if found == BEGUN:
                done[name] = {"error": why}
            elif not found and (over or _hopeless(record)):
                done[name] = {"skipped": why if over and not _hopeless(record) else "there is no compiled model"}
    return any(not found for done in record["engines"].values() for found in done.values())


def _hopeless(record: Record) -> bool:
    """Whether there is no model to measure."""
    return bool(record["prepare"]) and not record["prepare"].keys().isdisjoint({"error", "skipped"})


def _run(command: Sequence[str], deadline: float, note: Callable[[], None]) -> str:
    """Run a worker, calling `note` while it runs; in words, why it measures no more."""
    if time.monotonic() >= deadline:
        return "the time given was used up (--minutes)"
    with subprocess.Popen(command) as worker:
        try:
            while time.monotonic() < deadline:
                try:
                    code = worker.wait(timeout=POLL)
                except subprocess.TimeoutExpired:
                    note()
                    continue
                return f"its process ended with {f'signal {-code}' if code < 0 else f'status {code}'}"
        finally:
            worker.kill()
    return "stopped when the time given was used up (--minutes)"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=FULL)
    parser.add_argument("--pieces", nargs="+", choices=PIECES, default=list(DEFAULT))
    parser.add_argument("--engines", nargs="+", help="default: all that there may be on the device")
    parser.add_argument("--device", choices=ENGINES, default="cuda")
    parser.add_argument("--small", action="store_true", help="toys: shows that the code runs, nothing more")
    parser.add_argument("--dtype", help="default: bfloat16 on a GPU, float32 on the CPU")
    parser.add_argument("--steps", type=int, default=6, help="steps of a request; the presets' own take longer")
    parser.add_argument("--repeats", type=int, default=2, help="timed requests")
    parser.add_argument("--resolution", type=int, help="pixels along a side; default: 1024, flux-mid 256")
    parser.add_argument("--blocks", type=int, help="at most so many blocks of each kind, for a GPU with less memory")
    parser.add_argument("--minutes", type=float, default=10, help="for everything together")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of gpu.json")
    given = parser.parse_args(arguments)
    given.models = given.models or list(SMALL if given.small else FULL)
    for engine in given.engines or ():
        try:
            check_name(engine)
        except EngineError as error:
            parser.error(str(error))
    unknown = [model for model in given.models if given.small and model not in SMALL]
    if unknown:
        parser.error(f"there is no small {unknown[0]}; there are {', '.join(SMALL)}")
    return given


def main(arguments: Sequence[str] | None = None) -> None:
    given = parse(arguments)
    _check(given)
    deadline = time.monotonic() + 60 * given.minutes
    given.output.mkdir(parents=True, exist_ok=True)
    path = given.output / "gpu.json"
    results: dict[str, Any] = {"machine": {}, "models": []}
    for model in given.models:
        console.print(f"{model}: {', '.join(given.pieces)}")

        def note(record: Record) -> None:
            told = {name: value for name, value in record.items() if name != "machine"}
            results["machine"] = record.get("machine", results["machine"])
            results["models"] = [*(one for one in results["models"] if one["model"] != told["model"]), told]
            path.write_text(json.dumps(results, indent=1) + "\n")

        console.print(table_of(measure(record_of(model, given), deadline, note), results["machine"]))
    console.print(f"wrote {path}")


def _check(given: argparse.Namespace) -> None:
    """Refuse what cannot give figures: no GPU, or figures of anything else in the place of a GPU's."""
    import torch

    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here: run this where there is one, or with --device cpu --small")
    if given.device != "cuda" and given.output.resolve() == RESULTS.resolve():
        raise SystemExit("benchmarks/results/ is for figures of a GPU: give --output FOLDER")


if __name__ == "__main__":
    main()
