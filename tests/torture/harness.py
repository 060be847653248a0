"""One bundle in a child process of its own, with limits of time and memory: what became of it, and of the process."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import random
import resource
import signal
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime  # noqa: F401  here, not in the children: they set variables of the environment
import threadpoolctl  # noqa: F401
import torch

from runtime.base.errors import BundleError, EditError
from runtime.face.load import load
from tests import programs

SECONDS = 20
"""That a case may take."""
MEMORY = 2 << 30
"""Bytes that a case may have beyond what its process began with."""
_TICK = 0.002
_RAW = "raw"
GOOD = ("same", "refused", "other")
"""Outcomes that are as promised; "other" is another bundle with outputs of its own, which a pinned digest refuses."""


@dataclass(frozen=True)
class Outcome:
    """What became of a case: `kind` is in GOOD, or "raw", "crash", "slow", "leak", "unpinned", "silent", "nameless".

    `told` is the error's text.
    """

    kind: str
    told: str = ""
    seconds: float = 0.0


def outputs(folder: Path, engine: str) -> str:
    """A hash of what the bundle gives for two steps of one request."""
    compiled = load(folder, engine=engine)
    given = programs.inputs(2)
    made = hashlib.sha256()
    with compiled.request():
        for step in (1.0, 0.5):
            given["timestep"] = torch.full((2,), step)
            made.update(compiled(**given).sample.contiguous().numpy().tobytes())
    return made.hexdigest()


def tried(folder: Path, engine: str, expected: str, digest: str) -> Outcome:
    """Load and run the bundle `folder` in a child; `expected` and `digest` are those of the bundle that it was."""
    reader, writer = os.pipe()
    started = time.perf_counter()
    child = os.fork()
    if not child:
        os.close(reader)
        _limit()
        try:
            found = _found(folder, engine, expected, digest)
        except BaseException as error:
            found = Outcome(_RAW, f"{type(error).__name__}: {error}"[:500])
        os.write(writer, json.dumps([found.kind, found.told]).encode())
        os._exit(0)
    os.close(writer)
    ended = _waited(child)
    with os.fdopen(reader, "rb") as pipe:
        data = pipe.read() if ended is not None else b""
    seconds = time.perf_counter() - started
    if ended is None:
        return Outcome("slow", f"more than {SECONDS} s", seconds)
    if not data:
        return Outcome("crash", f"status {ended}", seconds)
    return Outcome(*json.loads(data), seconds)


def _waited(child: int) -> int | None:
    for _ in range(round(SECONDS / _TICK)):  # not by the clock: whoever stops this process stops its children, too
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        time.sleep(_TICK)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _limit() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: not to outlive the campaign
    now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)  # engines write of what they refuse


def _found(folder: Path, engine: str, expected: str, digest: str) -> Outcome:
    before, files = _state(), _listing(folder)
    try:
        made = outputs(folder, engine)
    except EditError as error:
        told = str(error)
        kind = "refused" if _named(told, folder) else "nameless"
    else:
        told, kind = "", "same" if made == expected else "other"
    after = _state()
    if after != before or _listing(folder) != files:
        changed = [name for name in before if before[name] != after[name]]
        return Outcome("leak", f"changed: {changed or 'files'} ({told})")
    return Outcome(kind, told) if _refused_pinned(folder, digest, kind) else Outcome("unpinned", told)


def _refused_pinned(folder: Path, digest: str, kind: str) -> bool:
    """Whether a load that asks for the bundle that it was refuses this one, unless it is that."""
    if kind != "other":
        return True
    try:
        load(folder, engine="torch", digest=digest)
    except BundleError:
        return True
    return False


def _named(told: str, folder: Path) -> bool:
    """Whether a message names a file, a plan or the bundle itself."""
    return any(name in told for name in (str(folder), "manifest.json", ".safetensors", "plans/", "glue/", "plan "))


def _state() -> dict[str, object]:
    """What no bundle may change in the process that loads it."""
    draws = torch.get_rng_state().numpy().tobytes(), str(np.random.get_state()), random.getstate()
    given = {name: tensor.numpy().tobytes() for name, tensor in programs.inputs(2).items()}
    return {
        "seeds": hashlib.sha256(str(draws).encode()).hexdigest(),
        "inputs": given,
        "working directory": str(Path.cwd()),
        "environment": dict(os.environ),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "default dtype": str(torch.get_default_dtype()),
        "signals": signal.getsignal(signal.SIGINT),
        "python threads": threading.active_count(),
    }


def _listing(folder: Path) -> list[tuple[str, int, int]]:
    found = [folder, *folder.rglob("*")] if folder.is_dir() else []
    return sorted((str(path), path.lstat().st_size, path.lstat().st_mtime_ns) for path in found)
