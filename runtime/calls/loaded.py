"""A program with everything made from it for one engine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from runtime import engines
from runtime.base.errors import InputError, RecordError
from runtime.bundle import archive as pt2
from runtime.bundle.program import Program
from runtime.bundle.spec import Glue
from runtime.calls.bound import ReadyBlocks
from runtime.calls.tally import Costs
from runtime.device.runner import DeviceRunner, make_runner
from runtime.face import arguments
from runtime.face.arguments import Constant
from runtime.face.output import Config, Output
from runtime.requests.trace import Trace


class Loaded:
    """`program`, its plans on the engine called `engine`; EngineError where that cannot run them here."""

    def __init__(self, program: Program, engine: str) -> None:
        program = engines.placed(engine, program)
        manifest = program.manifest
        self.program = program
        self.blocks = ReadyBlocks(program, engine)
        self.config = Config(manifest.config)
        self.dtype: torch.dtype = getattr(torch, manifest.dtype)
        tensors = (*program.weights.values(), *program.routers.values())
        self.device = next((t.device for t in tensors if t.device.type != "cpu"), torch.device("cpu"))
        self.costs: dict[str, Costs] = {g.id: {(c.plan, c.variant): c for c in g.costs} for g in manifest.glues}
        self._glues: dict[str, Callable[..., tuple[Tensor, ...]]] = {}
        self._lock = threading.Lock()
        self._runner: DeviceRunner | None = None
        self._no_runner: str | None = None

    def glue(self, glue: Glue) -> Callable[..., tuple[Tensor, ...]]:
        """The glue's graph with its weights."""
        found = self._glues.get(glue.id)
        if found is None:
            found = self._glues[glue.id] = glue_graph(self.program, glue, self.device)
        return found

    @property
    def started(self) -> DeviceRunner | None:
        """What runs steps on the device, if anything has been run there."""
        return self._runner

    def runner(self, traces: Trace) -> DeviceRunner:
        """What runs steps on the device, and traces them in `traces`; RecordError where there can be none."""
        with self._lock:
            if self._no_runner is not None:
                raise RecordError(self._no_runner)
            if self._runner is None:
                try:
                    self._runner = make_runner(self.blocks, self.device, traces)
                except RecordError as error:
                    self._no_runner = str(error)  # not the error: its traceback would hold the frames of every call
                    raise
            return self._runner

    def timestep(self, tensors: Mapping[str, Tensor], constants: Mapping[str, Constant]) -> Tensor:
        """The timestep, one or one per row; on the CPU where it was given as a number."""
        name = self.program.manifest.timestep
        tensor = tensors.get(name)
        if tensor is not None:
            return tensor
        value = constants.get(name)
        if not isinstance(value, (int, float)):
            raise InputError(f"missing input {name!r}")
        return torch.tensor([float(value)], dtype=torch.float64)


def glue_graph(program: Program, glue: Glue, device: torch.device) -> Callable[..., tuple[Tensor, ...]]:
    """The graph of a glue that is not hosted, with its weights: a function of the glue's inputs, on `device`."""
    assert glue.file is not None
    graph = pt2.load(program.files[glue.file], glue.file, device)
    weights = [program.weights[key] for key in glue.weights]
    return lambda *inputs: graph(*weights, *inputs)


def search(
    loaded: Loaded | None, tensors: Mapping[str, Tensor], constants: Mapping[str, Constant]
) -> tuple[Loaded, Glue] | None:
    """`loaded` and its glue for such arguments; None where there is none."""
    if loaded is None:
        return None
    glue = arguments.find_glue(loaded.program.manifest.glues, tensors, constants)
    return None if glue is None else (loaded, glue)


def named(glue: Glue, outputs: Sequence[Tensor], given: Mapping[str, object]) -> object:
    """What the model gives, from the glue's outputs and the arguments of the call."""
    if not glue.outputs:
        return outputs[0]
    named = arguments.unflatten(dict(zip(glue.outputs, outputs, strict=True)))
    plain = all(name.isdigit() for name in named)
    return tuple(named.values()) if plain or not given.get("return_dict", True) else Output(named.items())
