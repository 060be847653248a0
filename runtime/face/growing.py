"""A program on one engine, which grows where a call has a form that it lacks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from runtime import engines
from runtime.base.errors import EngineError
from runtime.bundle.program import Program
from runtime.bundle.spec import Glue
from runtime.calls.bound import BoundBlocks, glue_graph
from runtime.engines.choice import Choice, choose, next_best
from runtime.face import arguments
from runtime.face.arguments import Constant
from runtime.face.output import Config
from runtime.requests.trace import Costs


class Tracer(Protocol):
    """What can make a program grow: the compiler with the model beside it."""

    def __call__(self, given: Mapping[str, object], program: Program) -> Program:
        """`program` and what a call with the arguments `given` needs beyond it; EditError where that cannot be made."""

    def changed(self) -> str | None:
        """Name of a weight or attribute of the model that is not what it was at the first trace; None where all are."""

    def untraced(self) -> Program:
        """A program that says what the model is and holds nothing yet."""

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move or cast the model, as `torch.nn.Module.to` does."""


FORMS = 1024
"""Forms of call whose glue is found at once."""


class GrowingProgram:
    """`program` on the engine called `engine`, else the fastest here, which grows by `tracer` where there is one.

    `grown` is called with every program that is run from then on. Raises EngineError where the engine cannot run the
    program here.
    """

    def __init__(
        self, program: Program, engine: str | None, tracer: Tracer | None, grown: Callable[[Program], None]
    ) -> None:
        self.asked, self.tracer = engine, tracer
        self._grown = grown
        self._lock = threading.RLock()
        self._start(program)

    def grow(self, program: Program) -> None:
        """Run `program`, which has all that was there before, from now on; what runs goes on undisturbed."""
        before = self.program
        if not before.manifest.blocks:
            self._start(program)
            return
        new = {key: tensor for key, tensor in program.weights.items() if key not in before.weights}
        placed = engines.placed(self.engine, replace(program, weights=new, routers={}))
        program = replace(program, weights={**before.weights, **placed.weights}, routers=before.routers)
        self.blocks.grow(program)
        self._run_from_now_on(program)

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Have `fn` move all tensors to another device."""
        with self._lock:
            weights = {key: fn(tensor) for key, tensor in self.program.weights.items()}
            routers = {key: fn(tensor) for key, tensor in self.program.routers.items()}
            self._start(replace(self.program, weights=weights, routers=routers))

    def hold(self, stored: Program) -> None:
        """Run on the tensors of `stored`, which are equal."""
        with self._lock:
            program = self._bind(replace(self.program, weights=stored.weights, routers=stored.routers))
            self._graphs.clear()
            self._run_from_now_on(program)

    def find(
        self, given: Mapping[str, object], tensors: Mapping[str, Tensor], constants: Mapping[str, Constant]
    ) -> tuple[Glue, Mapping[str, Tensor]]:
        """The glue for these arguments, traced first if need be, and the tensors as it takes them."""
        form = (
            tuple((name, t.shape, t.dtype) for name, t in tensors.items()),
            tuple(arguments.all_exactly(constants).items()),
        )
        found = self._found.get(form) or self._search(tensors, constants)
        if found is None and self.tracer is not None:
            with self._lock:
                found = self._search(tensors, constants)  # another thread may have traced it meanwhile
                if found is None:
                    self.retrace(given)
                    found = self._search(tensors, constants)
        if found is not None:
            if len(self._found) >= FORMS:
                self._found.clear()
            self._found[form] = found
            return found, tensors
        manifest = self.program.manifest
        cast = arguments.retyped(manifest.glues, tensors, constants, manifest.timestep)
        found = None if cast is None else self._search(cast, constants)
        if cast is None or found is None:
            raise arguments.explain(manifest.glues, tensors, constants)
        return found, cast

    def retrace(self, given: Mapping[str, object]) -> None:
        """Grow so that the program covers a call with `given`."""
        assert self.tracer is not None
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self.grow(self.tracer(given, self.program))

    def graph(self, glue: Glue) -> Callable[..., Sequence[Tensor]]:
        """A glue's graph with its weights."""
        found = self._graphs.get(glue.id)
        if found is None:
            found = self._graphs[glue.id] = glue_graph(self.program, glue, self.device)
        return found

    def _start(self, program: Program) -> None:
        """Run `program` and forget what was made for another."""
        self.choice: Choice | None = choose(program) if self.asked is None else None
        program = self._bind(program)
        self.config = Config(program.manifest.config)
        self.dtype: torch.dtype = getattr(torch, program.manifest.dtype)
        tensors = (*program.weights.values(), *program.routers.values())
        self.device = next((t.device for t in tensors if t.device.type != "cpu"), torch.device("cpu"))
        self._graphs: dict[str, Callable[..., Sequence[Tensor]]] = {}
        self.costs: dict[str, Costs] = {}
        """What a row costs, by glue."""
        self._found: dict[object, Glue] = {}
        self._run_from_now_on(program)

    def _bind(self, program: Program) -> Program:
        """`program` where its engine runs it; that is another than was chosen where this does not run all of it."""
        while True:
            self.engine = self.asked or (self.choice.engine if self.choice else "")
            try:
                program = engines.placed(self.engine, program)
                self.blocks = BoundBlocks(program, self.engine)
                return program
            except EngineError as error:
                if self.choice is None:
                    raise
                self.choice = next_best(self.choice, error)

    def _run_from_now_on(self, program: Program) -> None:
        for glue in program.manifest.glues:
            self.costs[glue.id] = {(cost.plan, cost.variant): cost for cost in glue.costs}
        self.program = program
        self._grown(program)

    def _search(self, tensors: Mapping[str, Tensor], constants: Mapping[str, Constant]) -> Glue | None:
        return arguments.find_glue(self.program.manifest.glues, tensors, constants)
