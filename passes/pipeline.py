"""The passes in order, and what runs them: from a model and example inputs to a program.

Every pass has a `name` and ``run(compilation) -> compilation`` (see passes.program.compilation). A block that a pass
refuses stays in the glue as it is; a report says where and why.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import FunctionType
from typing import Protocol

from torch import nn

from passes.block_passes import GROWTH, HEADS, MLPS, REAL, STATES, Dedupe, Discover, Export, Streams
from passes.blocks.export import ExportError, validate
from passes.dump import dumping, graph_texts, modules, start, write_pass
from passes.lowering.lower import Lower, check_proven
from passes.observe.statement import Statements
from passes.program.assemble import Assemble
from passes.program.check import CheckError
from passes.program.compilation import Compilation, PassError
from passes.program.glue import Guards
from passes.program.plans import Plans, Widths

log = logging.getLogger(__name__)


class Pass(Protocol):
    """What the list holds: `name` tells a pass from others in it, the first line of its docstring says what it does."""

    name: str

    def run(self, compilation: Compilation) -> Compilation:
        """`compilation` with what this pass adds; it may report what it left alone, and raise to stop everything."""


class Passes(tuple[Pass, ...]):
    """Passes in order; ``print(passes)`` shows each with what it does."""

    def __str__(self) -> str:
        width = max((len(one.name) for one in self), default=0)
        return "\n".join(f"{one.name:{width}}  {_purpose(one)}" for one in self)

    __repr__ = __str__

    def with_pass(self, one: Pass, after: str) -> Passes:
        """The list with `one` behind the pass called `after`; PassError where there is none."""
        names = [own.name for own in self]
        if after not in names:
            raise PassError(f"there is no pass {after!r} to stand behind; there are {', '.join(names)}")
        place = names.index(after) + 1
        return Passes((*self[:place], one, *self[place:]))


_BLOCKS = (Discover(), Dedupe(), STATES, Export(), REAL, HEADS, GROWTH, MLPS, Streams())
PASSES = Passes((*_BLOCKS, Widths(), Plans(), Guards(), Assemble(), Lower()))


def run_passes(
    compilation: Compilation,
    passes: Sequence[Pass] = PASSES,
    until: str | None = None,
    dump: str | Path | None = None,
) -> Compilation:
    """Run those of `passes` that have not run on `compilation` yet, in order, and stop after the one called `until`.

    `dump` is a folder for the state after each pass, as text (see passes.dump). A graph that a pass of one's own
    changed is compared with the blocks at once. Where a pass raises, the compilation's memory is as it was.

    Raises:
        PassError: a pass that cannot be left out is missing, stands before one that it needs, or is there twice.
        CheckError: a graph does not give what the model gives.
        DumpError: nothing can be written to `dump`.
        Others, as the passes say.
    """
    check_passes(passes, until)
    folder = None if dump is None else Path(dump)
    if folder is not None and not compilation.seconds:
        with dumping(folder):
            start(folder, compilation)
    with compilation.memory.unless_raised():
        for number, one in enumerate(passes, 1):
            if one.name not in compilation.seconds:
                compilation = _run(one, compilation, number, folder)
            if one.name == until:
                break
    return compilation


def check_passes(passes: Sequence[Pass], until: str | None = None) -> None:
    """PassError where `passes` cannot run (see `run_passes`)."""
    for place, each in enumerate(passes):
        if not isinstance(getattr(each, "name", None), str) or not callable(getattr(each, "run", None)):
            kind = each.__qualname__ if isinstance(each, type | FunctionType) else type(each).__name__
            raise PassError(
                f"passes[{place}] ({kind}) is no pass: give an object with a name, a string, and "
                "run(compilation) -> compilation"
            )
    names = [one.name for one in passes]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise PassError(f"two passes are called {twice[0]!r}: a name tells a pass from others")
    if until is not None and until not in names:
        raise PassError(f"there is no pass {until!r} to stop after; there are {', '.join(names)}")
    wanted = names if until is None else names[: names.index(until)]
    own = [one.name for one in PASSES]
    last = max((own.index(name) for name in wanted if name in own), default=-1) if until else len(own) - 1
    missing = [one.name for one in PASSES[: last + 1] if getattr(one, "needed", False) and one.name not in names]
    if missing:
        purpose = _purpose(PASSES[own.index(missing[0])])
        raise PassError(f"the pass {missing[0]!r} cannot be left out: there is no program without it ({purpose})")
    order = [own.index(name) for name in names if name in own]
    if order != sorted(order):
        raise PassError(f"the passes are in another order than they need each other: {', '.join(own)}")


def analyse(
    model: nn.Module,
    inputs: Mapping[str, object] | Sequence[Mapping[str, object]],
    timestep: str | None = None,
    narrow: Sequence[str] | None = None,
    stated: Statements = (),
) -> Compilation:
    """The blocks of `model`, their states, graphs and MLP sites: the passes as far as "streams".

    Arguments are those of `Compilation`. Raises StreamError where `narrow` names a state that no block has.
    """
    return run_passes(Compilation(model, inputs, timestep, narrow, stated=stated), until="streams")


def _run(one: Pass, compilation: Compilation, number: int, folder: Path | None) -> Compilation:
    """What `one` makes of `compilation`; timed, logged, and dumped where a folder is given."""
    home = getattr(getattr(one, "change", type(one)), "__module__", "")
    foreign = not home.startswith(("passes.", "edit_compile."))
    graphs = graph_texts(compilation) if folder is not None or foreign else {}
    started, before = time.perf_counter(), len(compilation.reports)
    made = one.run(compilation)
    if not isinstance(made, Compilation):
        raise PassError(f"the pass {one.name!r} in passes= gave {type(made).__name__}: return the compilation from run")
    if foreign:
        _check_changed(one, made, graphs)
    seconds = time.perf_counter() - started
    made = replace(made, seconds={**made.seconds, one.name: seconds})
    for report in made.reports[before:]:
        for line in report.done:
            log.info("%s: %s", report.name, line)
        for refusal in report.refused:
            log.info("%s: left %s alone: %s", report.name, refusal.where, refusal.reason)
    log.info("%s: %d blocks of %d kinds, %.2f s", one.name, len(made.blocks), len(made.groups), seconds)
    if folder is not None:
        with dumping(folder):
            write_pass(folder, number, one.name, made, graphs)
    return made


def _check_changed(one: Pass, made: Compilation, graphs: Mapping[str, str]) -> None:
    """CheckError where a group's graph is not what it was in `graphs` and does not give what its blocks give.

    PassError where a graph holds something itself, which no engine is given.
    """
    for key, module in modules(made).items():
        module.recompile()
        held = next((node for node in module.graph.nodes if node.op in ("get_attr", "call_module")), None)
        if held is not None:
            raise PassError(
                f"the pass {one.name!r} put {held.target!r} into the graph of {key}, which may hold nothing: "
                "make it of operators in the graph (aten.full, aten.scalar_tensor), or hold it in the block as a buffer"
            )
    if Lower.name in made.seconds:
        check_proven(made)
    now = graph_texts(made)
    for group in made.groups:
        if group.exported is not None and now[group.first.name] != graphs.get(group.first.name):
            try:
                for site in group.blocks:
                    validate(group.graph, site)
            except ExportError as error:
                raise CheckError(f"the pass {one.name!r} changed what a graph computes: {error}") from error


def _purpose(one: Pass) -> str:
    """The first line of the pass's docstring."""
    return (inspect.getdoc(one) or "").partition("\n")[0]
