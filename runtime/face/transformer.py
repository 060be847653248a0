"""The compiled transformer: what a diffusers pipeline is given in place of the model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from runtime import engines
from runtime.base.errors import EditError, InnerShapeError
from runtime.bundle import files as bundle
from runtime.bundle.program import Program
from runtime.bundle.spec import Glue
from runtime.calls.calls import Call, Calls, Host
from runtime.calls.loaded import Loaded, search
from runtime.face import arguments
from runtime.face.adapters import WithoutAdapters, refuse_adapters
from runtime.face.arguments import Constant
from runtime.requests.state import cache_context, named_request
from runtime.requests.trace import Counters, Trace
from runtime.routing.policy import Decider, RoutingPolicy

Tracer = Callable[[Mapping[str, object], Program | None], Program]


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

    The forward runs without gradients. Errors are `runtime.base.errors.EditError`. An exception drops the
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
        if program is None and tracer is None:
            raise EditError("a compiled transformer needs a program, or a tracer to make one")
        self.engine = engine
        self._policy = policy
        self._tracer = tracer
        self._host = host
        self._eager = (eager,)  # in a tuple: not a submodule, its weights are not ours
        self._lock = threading.Lock()
        self._counting = threading.Lock()
        self._counters = Counters()
        self._calls = Calls(dispatch, self._count)
        self._loaded: Loaded | None = None if program is None else Loaded(program, engine)
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
        self._calls.settle(self._loaded)
        return self._calls.traces

    @property
    def counters(self) -> Counters:
        """The work done since `reset_counters`."""
        self._calls.settle(self._loaded)
        return self._counters

    def reset_counters(self) -> None:
        """Start counting anew."""
        self._calls.settle(self._loaded)
        with self._counting:
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
        return self._calls.wanted if self.dispatch_note is None else "host"

    @property
    def dispatch_note(self) -> str | None:
        """Why decisions are taken on the host although they were wanted on the device: those of the last call, or,
        before the first, what is known of this machine and engine."""
        self._calls.look(self._loaded)
        return self._calls.note

    def request(self, name: str) -> Any:
        """Context manager: calls inside belong to the request `name`, whatever thread they are in."""
        return named_request(str(name))

    def cache_context(self, name: str, **progress: object) -> Any:
        """Context manager: calls inside use the residuals of the cache context `name` (diffusers).

        `progress` is what a pipeline tells of where its loop is; the timestep of the calls says it all.
        """
        return cache_context(name)

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        """End the current request (diffusers calls this after each image); raises what the device came upon in it."""
        self._calls.end(self._loaded)

    def save(self, path: str | Path) -> None:
        """Write the bundle `path`, with the current routing policy (see `runtime.bundle.files.save`)."""
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
            self._replace(self._tracer(given, self.program))
        return self._call(given)

    def _call(self, given: Mapping[str, object]) -> Any:
        tensors, constants = arguments.flatten(given)
        loaded, glue = self._find(given, tensors, constants)
        arguments.check_tensors(glue, tensors, loaded.device)
        call = Call(glue, given, tensors, loaded.timestep(tensors, constants))
        return self._calls.run(loaded, call, self.policy, self._host)

    def _find(
        self, given: Mapping[str, object], tensors: Mapping[str, Tensor], constants: Mapping[str, Constant]
    ) -> tuple[Loaded, Glue]:
        """The glue for these arguments, traced first if need be."""
        found = search(self._loaded, tensors, constants)
        if found is None and self._tracer is not None:
            with self._lock:
                found = search(self._loaded, tensors, constants)  # another thread may have traced it meanwhile
                if found is None:
                    self._replace(self._tracer(given, self.program))
                    found = search(self._loaded, tensors, constants)
        if found is None:
            glues = () if self._loaded is None else self._loaded.program.manifest.glues
            raise arguments.explain(glues, tensors, constants)
        return found

    def _count(self, glue: Glue, done: Counters, rows: int) -> None:
        own = rows * glue.flops
        with self._counting:
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
            self._replace(replace(program, weights=weights, routers=routers))

    def _replace(self, program: Program) -> None:
        """Run `program` from now on; requests end."""
        loaded = Loaded(program, self.engine)
        self._calls.replaced(self._loaded)
        self._loaded = loaded

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
