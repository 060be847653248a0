"""The compiled transformer: what a diffusers pipeline is given in place of the model."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from runtime import arguments, bundle, engines
from runtime.adapters import WithoutAdapters, refuse_adapters
from runtime.arguments import Constant
from runtime.device.policy import why_not
from runtime.device.runner import DeviceRunner, make_runner
from runtime.errors import EditError, InnerShapeError, RecordError
from runtime.host import HostRunner
from runtime.loaded import Loaded, named, search
from runtime.policy import Decider, RoutingPolicy
from runtime.program import Program
from runtime.spec import Glue
from runtime.state import KEPT, cache_context, named_request
from runtime.trace import Counters, Trace

log = logging.getLogger(__name__)

Tracer = Callable[[Mapping[str, object]], Program]
Host = Callable[..., object]


class CompiledTransformer(WithoutAdapters, nn.Module):
    """A program run by an engine, called like the model it was compiled from.

    Args:
        program: what to run; None to have `tracer` make it at the first call.
        engine: one of `runtime.engines.NAMES`; the last two also with "-packed", for weights inside.
        policy: what decides; the program's own policy when None. Settable between calls.
        tracer: called with the arguments of a call that nothing was compiled for; gives a program
            that was. Without it such a call is a ShapeError.
        host: the model's forward with guards for blocks, for programs whose glue is hosted.
        dispatch: "host", or "device" to take decisions on the GPU, where no step waits for the host (`runtime.device`).
            Where that cannot be done they are taken on the host; `dispatch_note` then says why, and so does the log.
        eager: the model itself; shows its device, and without a program its config and dtype, before the first call.

    The forward runs without gradients. Errors are `runtime.errors.EditError`. An exception drops the
    state of the request it came in; a call refused for its arguments leaves all requests as they were.
    """

    def __init__(
        self,
        program: Program | None,
        engine: str = "onnxruntime",
        policy: Decider | None = None,
        tracer: Tracer | None = None,
        *,
        host: Host | None = None,
        eager: nn.Module | None = None,
        dispatch: str = "host",
    ) -> None:
        super().__init__()
        if dispatch not in ("host", "device"):
            raise EditError(f"dispatch is {dispatch!r}: say 'host' or 'device'")
        if program is None and tracer is None:
            raise EditError("a compiled transformer needs a program, or a tracer to make one")
        self.engine = engine
        self._policy = policy
        self._tracer = tracer
        self._host = host
        self._eager = (eager,)  # in a tuple: not a submodule, its weights are not ours
        self._lock = threading.Lock()
        self._counters = Counters()
        self._traces = Trace(KEPT)
        self._host_runner = HostRunner(self._traces)
        self._wanted = dispatch
        self._device_runner: DeviceRunner | None = None
        self.dispatch_note: str | None = None
        self._loaded: Loaded | None = None if program is None else self._load(program)
        self.eval()

    @property
    def program(self) -> Program | None:
        """What runs; None before the first call of a lazily compiled one."""
        return None if self._loaded is None else self._loaded.program

    @property
    def policy(self) -> Decider:
        """What decides for each block; set it between calls, nothing is rebuilt."""
        if self._policy is not None:
            return self._policy
        return RoutingPolicy() if self._loaded is None else RoutingPolicy.stored(self._loaded.program.manifest.policy)

    @policy.setter
    def policy(self, policy: Decider | None) -> None:
        self._policy = policy

    @property
    def trace(self) -> Trace:
        """The decisions of the last requests."""
        self._settle()
        return self._traces

    @property
    def counters(self) -> Counters:
        """The work done since `reset_counters`."""
        self._settle()
        return self._counters

    def reset_counters(self) -> None:
        """Start counting anew."""
        self._settle()
        with self._lock:
            self._counters = Counters()

    @property
    def config(self) -> Any:
        """The model's configuration, by attribute and by key."""
        return self._eager_value("config") if self._loaded is None else self._loaded.config

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights and latents."""
        if self._loaded is None:
            dtype: torch.dtype = self._eager_value("dtype")
            return dtype
        return self._loaded.dtype

    @property
    def device(self) -> torch.device:
        """Where inputs have to be."""
        if self._loaded is not None and (self._loaded.program.weights or self._eager[0] is None):
            return self._loaded.device
        if self._eager[0] is None:
            raise EditError("device is not known before the first call")
        return next(self._eager[0].parameters()).device

    @property
    def dispatch(self) -> str:
        """Where decisions are taken, "host" or "device"; `dispatch_note` says why it is not where they were wanted."""
        return self._wanted if self.dispatch_note is None else "host"

    def request(self, name: str) -> Any:
        """Context manager: calls inside belong to the request `name`, whatever thread they are in."""
        return named_request(str(name))

    def cache_context(self, name: str, **progress: object) -> Any:
        """Context manager: calls inside use the residuals of the cache context `name` (diffusers).

        `progress` is what a pipeline tells of where its loop is; the timestep of the calls says it all.
        """
        return cache_context(name)

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        """End the current request (diffusers calls this after each image)."""
        self._host_runner.requests.drop()
        if self._device_runner is not None:
            self._device_runner.requests.drop()

    def save(self, path: str | Path) -> None:
        """Write the bundle `path`, with the current routing policy (see `runtime.bundle.save`)."""
        if self._loaded is None or not self._loaded.program.manifest.glues:
            raise EditError("nothing to save yet: call the compiled transformer once, or compile with inputs=")
        program = self._loaded.program
        if isinstance(self._policy, RoutingPolicy):
            program = replace(program, manifest=replace(program.manifest, policy=self._policy.to_spec()))
        bundle.save(program, path)

    @torch.no_grad()
    def forward(self, *args: object, **kwargs: object) -> Any:
        """The model's forward: its arguments, and an output with `.sample`, or a tuple.

        Raises InputError for an unknown, missing or unusable argument, ShapeError for shapes or
        constants that were not compiled (unless there is a tracer).
        """
        given = arguments.named(self._argument_names(kwargs) if args or self._loaded else tuple(kwargs), args, kwargs)
        refuse_adapters(given)
        try:
            return self._call(given)
        except InnerShapeError:
            if self._tracer is None:
                raise
        with self._lock:
            self._trace(self._tracer, given)
        return self._call(given)

    def _call(self, given: Mapping[str, object]) -> Any:
        tensors, constants = arguments.flatten(given)
        loaded, glue = self._find(given, tensors, constants)
        arguments.check_tensors(glue, tensors, loaded.device)
        timestep = loaded.timestep(tensors, constants)
        outputs = self._on_device(loaded, glue, tensors, timestep)
        if outputs is None:
            return self._on_host(loaded, glue, given, tensors, timestep)
        return named(glue, outputs, given)

    def _on_host(
        self, loaded: Loaded, glue: Glue, given: Mapping[str, object], tensors: Mapping[str, Tensor], timestep: Tensor
    ) -> object:
        """The model's output, every decision taken here."""
        arguments.check_finite(glue, tensors)

        def run() -> object:
            if glue.file is not None:
                return named(glue, loaded.glue(glue)(*(tensors[i.name] for i in glue.inputs)), given)
            if self._host is None:
                raise EditError("this program is hosted: it runs inside the model it was compiled from")
            return self._host(**given)

        shapes = tuple(tuple(tensor.shape) for tensor in tensors.values())
        return self._host_runner(loaded, glue, shapes, timestep, self.policy, run, partial(self._count, glue))

    def _on_device(
        self, loaded: Loaded, glue: Glue, tensors: Mapping[str, Tensor], timestep: Tensor
    ) -> list[Tensor] | None:
        """The glue's outputs from a recorded step; None where there can be none, which is noted."""
        if self._device_runner is None:
            return None
        policy = self.policy
        reason = why_not(policy) if glue.file is not None else "the model's own Python runs between its blocks"
        if reason is None:
            try:
                outputs = self._device_runner(
                    glue.id,
                    loaded.glue(glue),
                    {given.name: tensors[given.name] for given in glue.inputs},
                    timestep,
                    policy,
                    loaded.costs[glue.id],
                    partial(self._count, glue),
                )
            except RecordError as error:
                reason = str(error)
            else:
                self.dispatch_note = None
                self._host_runner.requests.drop()  # neither may go on from residuals that the other has outdated
                return outputs
        self._device_runner.requests.drop()
        self._note(reason)
        return None

    def _load(self, program: Program) -> Loaded:
        """`program` made ready, and what runs it on the device where that is wanted and possible."""
        loaded = Loaded(program, self.engine)
        self._device_runner = None
        if self._wanted == "device":
            try:
                self._device_runner = make_runner(loaded.blocks, loaded.device, self._traces)
            except RecordError as error:
                self._note(str(error))
        return loaded

    def _note(self, reason: str) -> None:
        if reason != self.dispatch_note:
            self.dispatch_note = reason
            log.warning("decisions are taken on the host: %s", reason)

    def _settle(self) -> None:
        if self._device_runner is not None:
            self._device_runner.settle()

    def _find(
        self, given: Mapping[str, object], tensors: Mapping[str, Tensor], constants: Mapping[str, Constant]
    ) -> tuple[Loaded, Glue]:
        """The glue for these arguments, traced first if need be."""
        found = search(self._loaded, tensors, constants)
        if found is None and self._tracer is not None:
            with self._lock:
                found = search(self._loaded, tensors, constants)  # another thread may have traced it meanwhile
                if found is None:
                    self._trace(self._tracer, given)
                    found = search(self._loaded, tensors, constants)
        if found is None:
            glues = () if self._loaded is None else self._loaded.program.manifest.glues
            raise arguments.explain(glues, tensors, constants)
        return found

    def _trace(self, tracer: Tracer, given: Mapping[str, object]) -> None:
        self._loaded = self._load(tracer(given))
        self._host_runner.requests.clear()  # its blocks may be counted otherwise

    def _count(self, glue: Glue, done: Counters, rows: int) -> None:
        own = rows * glue.flops
        with self._lock:
            self._counters = self._counters + done + Counters(flops=own, dense_flops=own)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompiledTransformer:
        """What ``.to``, ``.cuda`` and ``.half`` come down to; EditError for a move that cannot be made."""
        if self._loaded is None:
            return self
        before = torch.empty(0, dtype=self.dtype, device=self.device)
        after = fn(before)
        if after.dtype != before.dtype:
            raise EditError(f"compiled for {before.dtype}: to run in {after.dtype}, convert the model, then compile it")
        if after.device != before.device:
            self._move(fn, after.device)
        return self

    def _move(self, fn: Callable[[Tensor], Tensor], device: torch.device) -> None:
        assert self._loaded is not None
        if self.engine not in engines.MOVABLE:
            raise EditError(
                f"engine {self.engine!r} runs where it was loaded: to run on {device}, compile or load there"
            )
        program = self._loaded.program
        weights = {key: fn(tensor) for key, tensor in program.weights.items()}
        routers = {key: fn(tensor) for key, tensor in program.routers.items()}
        with self._lock:
            self._loaded = self._load(replace(program, weights=weights, routers=routers))
        self._host_runner.requests.clear()

    def _argument_names(self, kwargs: Mapping[str, object]) -> tuple[str, ...]:
        """What the forward takes; as long as nothing tells, what it is given by name."""
        if self._loaded is not None:
            return self._loaded.program.manifest.arguments
        return tuple(kwargs) if self._eager[0] is None else arguments.argument_names(self._eager[0].forward)

    def __getattr__(self, name: str) -> Any:
        """What pipelines read from a model: its plain attributes, its configuration, and its parts without weights.

        The last are known only as long as the model is beside the program. AttributeError for all else: a method
        or a part of the model would act on weights that are not those that run.
        """
        if name.startswith("_"):
            return super().__getattr__(name)
        if self._loaded is not None:
            manifest = self._loaded.program.manifest
            for known in (manifest.attributes, manifest.config):
                if name in known:
                    return known[name]
        part = getattr(self._eager[0], name, None)
        if isinstance(part, nn.Module) and next(part.parameters(), None) is None:
            return part
        raise AttributeError(f"a compiled transformer has no attribute {name!r}")

    def _eager_value(self, name: str) -> Any:
        if self._eager[0] is None:
            raise EditError(f"{name} is not known before the first call")
        return getattr(self._eager[0], name)
