"""One model made ready to be measured: eager, compiled in memory, and on one engine after another."""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import edit_compile
from benchmarks.configurations import Configuration, Place
from edit_compile.bundles.engine_building import build_program
from edit_compile.compiling.compiler import WIDTHS, Tracer
from runtime import engines
from runtime.base.errors import EngineError
from runtime.bundle.program import Program
from runtime.engines.tensorrt.jobs import MAX_BATCH
from runtime.engines.tensorrt.library import MODULES, open_library, targets
from runtime.face.transformer import CompiledTransformer
from runtime.routing.schedule import ScheduledPolicy

ENGINES = {
    "cuda": ("torch", "inductor", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx"),
    "cpu": ("torch", "inductor", "onnxruntime"),
}
"""Engines measured by default, by kind of device."""
_FOR_CUDA = ("onnxruntime-cuda", *MODULES)


class Unavailable(Exception):
    """Something that cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Settings:
    """How much is measured: `steps` of a request, `repeats` of it."""

    steps: int
    repeats: int


class Case:
    """A model of random weights, its program in memory, and the inputs of a call; all on one device."""

    def __init__(self, shape: Configuration, place: Place, settings: Settings) -> None:
        self.shape, self.place, self.settings = shape, place, settings
        self.seconds: dict[str, float] = {}
        self.eager: nn.Module = self._timed("model", lambda: shape.model(place))
        self.inputs = shape.inputs(place)
        elastic = edit_compile.elasticize(self.eager)
        self.tracer = Tracer(elastic, WIDTHS, None)
        self.program: Program = self._timed("compile", lambda: self.tracer.trace(self.inputs))
        self._plain = ExitStack()  # from here on the eager model is measured, without what made it elastic
        self._plain.enter_context(elastic.detached())
        self.tracer.elastic = None
        self._loaded: dict[str, CompiledTransformer] = {}
        self._failed: dict[str, Exception] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="edit-compile-")

    @property
    def folder(self) -> Path:
        """Where engines and bundles are kept as long as the case is there."""
        return Path(self._folder.name)

    @property
    def blocks(self) -> int:
        """Guarded blocks."""
        return len(self.program.manifest.blocks)

    @property
    def budget(self) -> ScheduledPolicy:
        """Decisions at random at the preset's budgets; the routers run."""
        shape, widths = self.shape, self.program.manifest.widths
        return ScheduledPolicy.at_budget(self.settings.steps, self.blocks, shape.gate, shape.width, widths=widths)

    @functools.cached_property
    def inductor(self) -> Callable[..., Any]:
        """The eager model under torch.compile, which compiles at its first call."""
        return torch.compile(self.eager, dynamic=False)

    def load(self, engine: str, **options: Any) -> CompiledTransformer:
        """The program on `engine`; Unavailable where that is not to be had here, with its own reason."""
        self.build(engine)
        program = replace(self.program, folder=self.folder) if engine in MODULES else self.program
        with self._refusing(engine):
            return CompiledTransformer(program, engine, self.budget, **options)

    def on(self, engine: str) -> CompiledTransformer:
        """As `load`, once for all that is measured on `engine`; its policy is the budget's again."""
        if engine not in self._loaded:
            self._loaded = {engine: self.load(engine)}  # the one before goes: engines' scratch is not small
        compiled = self._loaded[engine]
        compiled.policy = self.budget
        compiled._reset_stateful_cache()
        return compiled

    def build(self, engine: str) -> list[dict[str, Any]]:
        """Build the engines that are built apart from loading (TensorRT's), keeping what is there; what each took."""
        with self._refusing(engine):
            reason = missing(engine, self.place.device)
            if reason:
                raise EngineError(reason)
            if engine not in MODULES:
                return []
            library = open_library(engine)
            built = build_program(self.program, self.folder, library, targets(library), "shared", MAX_BATCH)
        return [
            {"kind": one.kind, "width": one.width, "seconds": one.seconds, "bytes": one.bytes, "kept": one.kept}
            for one in built
        ]

    @contextmanager
    def _refusing(self, engine: str) -> Iterator[None]:
        """Inside the ``with`` block EngineErrors are Unavailable; an engine that has failed is not tried again."""
        if engine in self._failed:
            raise self._failed[engine]
        try:
            yield
        except Exception as error:
            self._failed[engine] = Unavailable(str(error)) if isinstance(error, EngineError) else error
            raise self._failed[engine] from error

    def _timed(self, name: str, make: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        made = make()
        if self.place.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[name] = time.perf_counter() - started
        return made


def missing(engine: str, device: torch.device) -> str | None:
    """Why `engine` cannot be measured on `device`; None where only trying tells."""
    if engine not in engines.NAMES:
        return f"this version has no engine {engine!r}; it has {', '.join(engines.NAMES)}"
    if device.type != "cuda" and engine in _FOR_CUDA:
        return f"engine {engine!r} needs CUDA, and this run is on the CPU"
    if device.type == "cuda" and engine == "onnxruntime":
        return "engine 'onnxruntime' runs on the CPU, and the model is on the GPU"
    return None
