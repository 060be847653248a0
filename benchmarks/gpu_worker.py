"""Measures one model of benchmarks.gpu in a process of its own: python -m benchmarks.gpu_worker RECORD.json

The record says what is wanted and holds what is there: every piece goes into it as soon as it is done, and is marked as
begun before, so that whoever started this process knows where it ended. What is in the record already is left alone.
"""

from __future__ import annotations

import gc
import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.configurations import FULL, SMALL, Configuration, Place
from benchmarks.gpu_case import Case, Settings, Unavailable, missing
from benchmarks.gpu_fit import too_large
from benchmarks.gpu_pieces import PIECES
from edit_compile.measuring.machine import describe_machine

BEGUN = {"begun": True}
POISONED = 3
"""Exit status where the GPU answers nothing any more in this process: the rest needs a new one."""
Record = dict[str, Any]


class Poisoned(Exception):
    """The process cannot use its GPU any more."""


def work(record: Record, save: Callable[[Record], None]) -> None:
    """Fill `record`, calling `save` with it whenever something has been added.

    Raises Poisoned where an error has taken the GPU away from this process.
    """
    shape, place = shape_of(record), Place(torch.device(record["device"]), getattr(torch, record["dtype"]))
    record["machine"] = describe_machine()
    _drop_missing(record, place)
    reason = too_large(shape, place)
    if reason:
        record["prepare"] = reason
    if reason or not _left(record):
        save(record)
        return
    case = _prepared(record, shape, place, save)
    while case is not None and (task := _left(record)):
        engine, name = task
        done = record["engines"][engine]
        done[name] = BEGUN
        save(record)
        done[name] = _guarded(lambda: PIECES[name](case, engine))  # noqa: B023 called at once
        save(record)
        _check_alive(done[name])


def shape_of(record: Record) -> Configuration:
    """The configuration that a record asks for."""
    shape = (SMALL if record["small"] else FULL)[record["model"]].shallow(record["blocks"])
    return replace(shape, side=record["resolution"] // 16) if record["resolution"] else shape


def _drop_missing(record: Record, place: Place) -> None:
    """Say of engines that are not for this device or version that they are not."""
    for engine, done in record["engines"].items():
        reason = missing(engine, place.device)
        if reason:
            record["engines"][engine] = {name: {"unavailable": reason} for name in done}


def _prepared(record: Record, shape: Configuration, place: Place, save: Callable[[Record], None]) -> Case | None:
    record["prepare"] = BEGUN
    save(record)
    made: list[Case] = []

    def prepare() -> Record:
        case = Case(shape, place, Settings(record["steps"], record["repeats"]))
        made.append(case)
        return {"seconds": case.seconds, "blocks": case.blocks, "plans": len(case.program.manifest.plans)}

    record["prepare"] = _guarded(prepare)
    save(record)
    return made[0] if made else None


def _left(record: Record) -> tuple[str, str] | None:
    """The next engine and piece that nothing is known of."""
    return next(((e, name) for e, done in record["engines"].items() for name, found in done.items() if not found), None)


def _guarded(measure: Callable[[], Any]) -> Any:
    """What `measure` gives, or its error as data."""
    try:
        return measure()
    except Unavailable as error:
        return {"unavailable": str(error)}
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        return {"error": f"{type(error).__name__}: {error}", "where": where}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _check_alive(result: Any) -> None:
    if isinstance(result, dict) and "error" in result and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise Poisoned(str(error)) from error


def main() -> None:
    path = Path(sys.argv[1])

    def save(record: Record) -> None:
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(record, indent=1) + "\n")
        partial.replace(path)

    try:
        work(json.loads(path.read_text()), save)
    except Poisoned:
        sys.exit(POISONED)


if __name__ == "__main__":
    main()
