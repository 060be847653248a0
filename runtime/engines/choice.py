"""Which engine a program runs on where none was named: that which takes least time for its blocks here.

One block is timed of each kind on which most of the work lies, at the middle width, for as many rows as the program was
compiled with, on noise: at a budget most blocks run near it, and what fusing gains shows there more than at full width;
for several rows another engine may be the fastest than for one. What was measured is kept for this
machine and these versions (in the user's cache folder; EDIT_COMPILE_CACHE names another), so that only the first load
takes the seconds; what a busy machine says is not kept. EDIT_COMPILE_ENGINE names an engine instead.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from runtime import engines
from runtime.base.errors import EngineError
from runtime.base.machine import BUSY, CoreWait, cores, cpu_model
from runtime.bundle.folder import write_whole
from runtime.bundle.program import Program
from runtime.bundle.spec import Plan

log = logging.getLogger(__name__)

USUAL = "onnxruntime"
"""Taken where nothing can be measured: the program has no blocks."""
_WORTH = {"inductor": 0.98}
"""An engine that compiles for each set of shapes, for seconds, has to be faster than the others by that much."""
_MOST = 0.75
"""Share of the work that the kinds of block that are timed make up at least."""
_ROWS = 16
"""Rows that are timed at most."""
_BLOCKS, _ROUNDS, _CALLS, _SECONDS = 4, 4, 3, 1.0


@dataclass(frozen=True)
class Choice:
    """The engine chosen, what it was chosen by, and milliseconds a block on each that runs them (none: not measured).

    `others` are those to try where it does not run the rest of the program, the fastest first.
    """

    engine: str
    why: str
    milliseconds: Mapping[str, float]
    others: tuple[str, ...] = ()

    def __str__(self) -> str:
        taken = ", ".join(f"{name} {ms:.3g} ms" for name, ms in self.milliseconds.items())
        return f"engine {self.engine}: {self.why}{f' ({taken})' if taken else ''}"


def choose(program: Program) -> Choice:
    """The fastest engine for `program` on this machine; EngineError where none can run it."""
    named = os.environ.get("EDIT_COMPILE_ENGINE")
    if named:
        return Choice(engines.entry(named).name, "as EDIT_COMPILE_ENGINE says", {})
    if not program.manifest.blocks:
        return Choice(USUAL, "until the first call, at which the model is traced and the engines are tried", {})
    if any(weight.device.type != "cpu" for weight in program.weights.values()):
        return Choice("torch", "it follows weights on a GPU", {})
    plans = _heaviest(program)
    known, kinds = _folder() / f"{_key(plans, _rows(program))}.json", " and ".join(plan.kind for plan in plans)
    times, when = _kept(known), "earlier here"
    if not times:
        log.info("no engine was named: timing blocks (%s) on each, once on this machine, for up to a minute", kinds)
        wait = CoreWait()
        times, when = _measured(program, plans), "here"
        if wait.share > BUSY:
            when = "here while the machine was busy, so the next process measures again"
        else:
            _keep(known, times)
    if not times:
        return Choice(USUAL, f"no {kinds} of {program.manifest.model} takes noise that could be timed", {})
    fastest, *others = sorted(times, key=lambda name: times[name] / _WORTH.get(name, 1.0))
    why = f"the fastest for blocks ({kinds}) of {program.manifest.model}, measured {when}"
    return Choice(fastest, why, times, tuple(others))


def next_best(choice: Choice, error: EngineError) -> Choice:
    """What is chosen where `choice` does not run the program, for `error`; raises that where nothing is left."""
    if not choice.others:
        raise error
    told = f"{choice.why}, but for {choice.engine}: {error}"
    return replace(choice, engine=choice.others[0], why=told, others=choice.others[1:])


def _heaviest(program: Program) -> dict[Plan, int]:
    """The plans with most of the work in the first form of call, and how many blocks have each."""
    manifest = program.manifest
    work = dict.fromkeys((plan.id for plan in manifest.plans), 0)
    for cost in manifest.glues[0].costs if manifest.glues else ():
        work[cost.plan] = max(work[cost.plan], cost.flops)
    uses = Counter(form.plan for block in manifest.blocks for form in block.forms[:1])
    total = sum(work[plan] * count for plan, count in uses.items())
    found: dict[Plan, int] = {}
    for plan in sorted(manifest.plans, key=lambda plan: -work[plan.id] * uses[plan.id]):
        if (uses[plan.id] and sum(work[one.id] * count for one, count in found.items()) < _MOST * total) or not found:
            found[plan] = uses[plan.id]
    return found


def _measured(program: Program, plans: Mapping[Plan, int]) -> dict[str, float]:
    """Milliseconds a block of `plans` by engine; EngineError where none can run them.

    Those that take no noise have no part; nothing where none does.
    """
    # torch is asked first: where it does not take the noise, the others are not, which print what they think of it
    names = sorted((name for name, entry in engines.TABLE.items() if entry.cpu), key=lambda name: name != "torch")
    runs: dict[str, dict[Plan, Callable[[], object]]] = {}
    refused = []
    for name in names:
        log.info("trying engine %s on blocks of %s", name, program.manifest.model)
        try:
            runs[name] = _ready(name, program, plans)
        except EngineError as error:
            refused.append(f"{name}: {error}")
        else:
            plans = {plan: count for plan, count in plans.items() if plan in runs[name]} if name == "torch" else plans
    if len(refused) == len(names):
        raise EngineError(f"no engine of a CPU runs {program.manifest.model} here: {'; '.join(refused)}")
    runs = {name: ready for name, ready in runs.items() if ready.keys() == plans.keys()}
    each = {plan: _timed({name: ready[plan] for name, ready in runs.items()}) for plan in plans}
    blocks = sum(plans.values())
    return {name: sum(plans[plan] * each[plan][name] for plan in plans) / blocks for name in runs if plans}


def _ready(name: str, program: Program, plans: Iterable[Plan]) -> dict[Plan, Callable[[], object]]:
    """What runs the next block of each plan that takes noise on the engine called `name`, compiled and warm."""
    ready = {}
    for plan in plans:
        try:
            run = _run(name, program, plan, _noise(plan, _rows(program)))
            with _no_workers():
                run()
        except (RuntimeError, ValueError, IndexError, TypeError):
            log.info("engine %s does not run noise through a %s", name, plan.kind)
        else:
            ready[plan] = run
    return ready


def _no_workers() -> AbstractContextManager[object]:
    """Inside the ``with`` block torch.compile starts no processes to compile in, which take cores as they start."""
    from torch._inductor import config

    patched: AbstractContextManager[object] = config.patch(compile_threads=1)
    return patched


def _run(name: str, program: Program, plan: Plan, inputs: Sequence[Tensor]) -> Callable[[], object]:
    """What runs the next of some blocks of `plan`: in a model, no block finds its weights in a cache."""
    engine, middle = engines.make(name, program), _middle(plan)
    forms = [form for block in program.manifest.blocks for form in block.forms if form.plan == plan.id][:_BLOCKS]
    kernel, weights = engine.load(plan, middle, program.files), program.weights
    bound = [
        kernel.bind(engines.heads([weights[key] for key in form.weights], plan.variants[middle])) for form in forms
    ]
    return partial(_hosted, engine, itertools.cycle(bound), inputs)


def _middle(plan: Plan) -> int:
    """The variant of the middle width, the narrower of two."""
    by_width = sorted(range(len(plan.variants)), key=lambda variant: plan.variants[variant].width)
    return by_width[(len(by_width) - 1) // 2]


@torch.no_grad()
def _hosted(engine: engines.Engine, bound: Iterator[engines.Bound], inputs: Sequence[Tensor]) -> None:
    with engine.hosting(sum(given.numel() for given in inputs)):
        next(bound)(inputs)


def _timed(runs: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """The median milliseconds of each, taken in turn, so that a machine that is busy for a while is so for all.

    In a turn each is called some times on end, and the first does not count: threads of the one before may still hold
    cores.
    """
    taken: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + _SECONDS * len(runs)
    for turn in range(_ROUNDS):
        if turn > 1 and time.perf_counter() > end:
            break
        for name, run in runs.items():
            run()
            for _ in range(_CALLS):
                started = time.perf_counter()
                run()
                taken[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(times) for name, times in taken.items()}


def _rows(program: Program) -> int:
    return min(max(program.manifest.batch, 1), _ROWS)


def _noise(plan: Plan, rows: int) -> list[Tensor]:
    """Inputs of `rows` rows, of one where it takes no more, at the first sizes that the plan was compiled for."""
    shapes = plan.buckets[0] if plan.buckets else [given.shape for given in plan.inputs]
    drawn, each = torch.Generator().manual_seed(0), 1 if plan.single_row else rows
    made = []
    for given, shape in zip(plan.inputs, shapes, strict=True):
        sizes, dtype = [each if size is None else size for size in shape], getattr(torch, given.dtype)
        real = dtype.is_floating_point or dtype.is_complex
        drawn_or_full = torch.randn(sizes, generator=drawn) if real else torch.full(sizes, dtype is torch.bool)
        made.append(drawn_or_full.to(dtype))
    return made


def _key(plans: Iterable[Plan], rows: int) -> str:
    versions = []
    for library in ("torch", "onnxruntime", "onnxruntime-gpu"):
        with suppress(metadata.PackageNotFoundError):
            versions.append(f"{library} {metadata.version(library)}")
    measured = [(plan.id, _middle(plan), plan.buckets[:1]) for plan in plans]
    told = (measured, rows, cpu_model(), cores(), torch.get_num_threads(), versions)
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def _folder() -> Path:
    named = os.environ.get("EDIT_COMPILE_CACHE")
    if named:
        return Path(named) / "engines"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edit_compile" / "engines"


def _kept(place: Path) -> dict[str, float]:
    """What was measured earlier; nothing where there is no whole record of it."""
    try:
        times = msgspec.json.decode(place.read_bytes(), type=dict[str, float])
    except (OSError, msgspec.MsgspecError):
        return {}
    return times if all(name in engines.TABLE and ms > 0 for name, ms in times.items()) else {}


def _keep(place: Path, times: Mapping[str, float]) -> None:
    """Write `times`; where nothing can be written, the next process measures again."""
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        write_whole(place, msgspec.json.encode(times))
