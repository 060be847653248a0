"""The pieces of benchmarks.gpu: each measures one thing of one model on one engine, and gives what JSON can hold."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_case import Case, Unavailable
from benchmarks.gpu_waits import host_waits
from benchmarks.measures import against_inductor, dispatch_cost, plan_counts, width_costs
from edit_compile.measuring.benchmarking import benchmark, resident_bytes, trajectory_of, weight_bytes
from edit_compile.measuring.timing import Spread, interleaved, timed
from passes.graphs.numbers import TOLERANCE, largest
from passes.program.check import output_distance
from runtime.face.load import load
from runtime.face.transformer import CompiledTransformer
from runtime.routing.policy import REUSE, SKIP
from runtime.routing.schedule import ScheduledPolicy

Result = dict[str, Any]
NEEDS_CUDA = {"unavailable": "needs CUDA"}


def builds(case: Case, engine: str) -> Result:
    """P5: seconds to build engines apart (cold, and warm: what was built is kept), to load them, and of a first call.

    `device_bytes` is what the GPU's used memory grew by at the first load and call, whichever library took it; the
    weights, which were there before, are not among it.
    """
    used = _used(case)
    apart, seconds = case.build(engine), {}
    again = case.build(engine)
    for when in ("cold", "warm"):
        started = time.perf_counter()
        compiled = case.load(engine)
        seconds[f"load_{when}"] = time.perf_counter() - started
        seconds[f"first_call_{when}"] = timed(partial(compiled, **case.inputs))
        if when == "cold":
            grown = None if used is None else _used(case) - used
        del compiled
    return plan_counts(case.on(engine)) | {
        "seconds": case.seconds | seconds,
        "device_bytes": grown,
        "built_cold": apart,
        "built_warm": again,
    }


def speed(case: Case, engine: str) -> Result:
    """P1, P2: eager against compiled at the preset's budgets, interleaved (see edit_compile.benchmark)."""
    compiled, settings = case.on(engine), case.settings
    found = benchmark(case.eager, compiled, case.inputs, settings.steps, settings.repeats)
    told: Result = json.loads(found.to_json())
    del told["machine"]
    return told


def widths(case: Case, engine: str) -> list[dict[str, float]]:
    """P2 of all blocks at one width, without routers."""
    return width_costs(case.eager, case.on(engine), case.inputs, case.settings.repeats)


def memory(case: Case, engine: str) -> Result:
    """P4: weights resident for all four widths against dense ones, and the most that a call takes besides."""
    compiled = case.on(engine)
    dense, resident = weight_bytes(case.eager), resident_bytes(compiled)
    found: Result = {"dense_bytes": dense, "resident_bytes": resident, "ratio": resident / dense}
    if case.place.device.type != "cuda":
        return found | {"peak": NEEDS_CUDA}
    with torch.no_grad():
        eager = _peak(partial(case.eager, **case.inputs))
        peaks = {str(width): _peak(partial(_at_width, case, compiled, width)) for width in case.tracer.widths}
    whole = resident + max(peaks.values())
    return found | {"peak": {"eager": eager, "at_width": peaks, "ratio": whole / (dense + eager)}}


def dispatch(case: Case, engine: str) -> Result:
    """P3: deciding on the host against on the device, on the same steps, interleaved; and how often the host waits.

    `difference_from_host` is the largest relative difference of any step's output, where every second block that would
    be skipped reuses its residual.
    """
    modes, found = _modes(case, engine)
    timestep = case.program.manifest.timestep
    trajectory = trajectory_of(case.inputs, case.settings.steps, timestep)
    calls = {mode: [partial(compiled, **kwargs) for kwargs in trajectory] for mode, compiled in modes.items()}

    def begin() -> None:
        for compiled in modes.values():
            compiled._reset_stateful_cache()

    with torch.no_grad():
        seconds = interleaved(calls, case.settings.repeats, warmup=2, before_run=begin)
        outputs = {mode: _reusing(case, compiled, calls[mode]) for mode, compiled in modes.items()}
        for mode, compiled in modes.items():
            begin()
            found[mode] = {
                "ms_per_step": asdict(Spread.of(seconds[mode] * 1e3)),
                "host_waits": _waits(case, compiled, calls[mode]),
                "difference_from_host": largest(map(output_distance, outputs[mode], outputs["host"])),
                "skipping": asdict(dispatch_cost(compiled, case.inputs, case.settings.repeats)),
                "note": compiled.dispatch_note,
            }
    return found


def parity(case: Case, engine: str) -> list[dict[str, float]]:
    """Every width against the eager model with masked hidden channels: largest difference / largest output."""
    allowed = TOLERANCE["model"][case.place.dtype or torch.float32]
    with closing(case.tracer.at_widths(case.on(engine), case.inputs)) as outputs:
        return [
            {"width": width, "relative": output_distance(output, expected), "allowed": allowed}
            for width, output, expected in outputs
        ]


def inductor(case: Case, engine: str) -> dict[str, float]:
    """P6: a dense step compiled here against one under torch.compile, interleaved."""
    return against_inductor(case.inductor, case.on(engine), case.inputs, case.settings.repeats)


def bundle(case: Case, engine: str) -> Result:
    """P5 of the bundle on disk: seconds to write it, and to load it to where it runs, cold and warm; its bytes.

    `difference` is that of its output from the output of the program it was written from, relative to the largest.
    """
    if engine != "torch":
        raise Unavailable("measured with engine 'torch' alone: writing and reading is the same for all")
    path = case.folder / "model.edit"
    started = time.perf_counter()
    compiled = case.on(engine)
    compiled.save(path)
    seconds = {"save": time.perf_counter() - started}
    for when in ("cold", "warm"):
        started = time.perf_counter()
        loaded = load(path, engine, case.budget).to(case.place.device)
        seconds[f"load_{when}"] = time.perf_counter() - started
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    off = output_distance(loaded(**case.inputs), compiled(**case.inputs))
    return {"seconds": seconds, "bytes": size, "difference": off}


PIECES: dict[str, Callable[[Case, str], Any]] = {
    piece.__name__: piece for piece in (builds, speed, parity, memory, widths, dispatch, inductor, bundle)
}
"""In the order in which they run: what matters most first, what may take a process down last."""
DEFAULT = tuple(name for name in PIECES if name != "bundle")
"""All but the one that writes as many bytes as the model has."""


def _modes(case: Case, engine: str) -> tuple[dict[str, CompiledTransformer], Result]:
    """The transformers to compare, and why one of them is not there."""
    modes = {"host": case.on(engine)}
    if case.place.device.type != "cuda":
        return modes, {"device": NEEDS_CUDA}
    return modes | {"device": case.load(engine, dispatch="device")}, {}


def _reusing(case: Case, compiled: CompiledTransformer, calls: Sequence[Callable[[], object]]) -> list[Any]:
    """The outputs of a request in which residuals are reused as well; the policy is the budget's afterwards."""
    table = case.budget.table.copy()
    seconds = table[:, 1::2]
    seconds[seconds == SKIP] = REUSE
    compiled.policy = ScheduledPolicy(table)
    compiled._reset_stateful_cache()
    outputs = [call() for call in calls]
    compiled.policy = case.budget
    compiled._reset_stateful_cache()
    return outputs


def _waits(case: Case, compiled: CompiledTransformer, calls: Sequence[Callable[[], object]]) -> Result:
    """Waits of a request of these steps."""
    if case.place.device.type != "cuda":
        return NEEDS_CUDA

    def request() -> None:
        compiled._reset_stateful_cache()
        for call in calls:
            call()

    return host_waits(request, len(calls))


def _at_width(case: Case, compiled: CompiledTransformer, width: float) -> None:
    compiled.policy = ScheduledPolicy(np.full((1, case.blocks), width))
    compiled._reset_stateful_cache()
    compiled(**case.inputs)


def _peak(call: Callable[[], object]) -> int:
    """Bytes that torch's allocator holds at most in `call`, above what it holds before; called twice: engines may be
    made at the first call."""
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _used(case: Case) -> int | None:
    """Bytes of the GPU that are in use, by whatever library."""
    if case.place.device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(case.place.device)
    return total - free
