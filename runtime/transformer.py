"""The compiled transformer: what a diffusers pipeline is given in place of the model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from runtime import arguments, bundle, engines, pt2, transfer
from runtime.arguments import Constant
from runtime.blocks import ReadyBlocks
from runtime.dispatch import Costs, Dispatch
from runtime.errors import EditError, InnerShapeError, InputError
from runtime.guard import answering
from runtime.output import Config, Output
from runtime.policy import Decider, RoutingPolicy
from runtime.program import Program
from runtime.spec import Glue
from runtime.state import Requests, cache_context, named_request
from runtime.trace import Counters, Trace

Tracer = Callable[[Mapping[str, object]], Program]
Host = Callable[..., object]


class CompiledTransformer(nn.Module):
    """A program run by an engine, called like the model it was compiled from.

    Args:
        program: what to run; None to have `tracer` make it at the first call.
        engine: one of `runtime.engines.NAMES`; the last two also with "-packed", for weights inside.
        policy: what decides; the program's own policy when None. Settable between calls.
        tracer: called with the arguments of a call that nothing was compiled for; gives a program
            that was. Without it such a call is a ShapeError.
        host: the model's forward with guards for blocks, for programs whose glue is hosted.
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
    ) -> None:
        super().__init__()
        if program is None and tracer is None:
            raise EditError("a compiled transformer needs a program, or a tracer to make one")
        self.engine = engine
        self._policy = policy
        self._tracer = tracer
        self._host = host
        self._eager = (eager,)  # in a tuple: not a submodule, its weights are not ours
        self._requests = Requests()
        self._lock = threading.Lock()
        self._counters = Counters()
        self._loaded: _Loaded | None = None if program is None else _Loaded(program, engine)
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
        return self._requests.trace

    @property
    def counters(self) -> Counters:
        """The work done since `reset_counters`."""
        return self._counters

    def reset_counters(self) -> None:
        """Start counting anew."""
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
        self._requests.drop()

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
        _refuse_adapters(given)
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
        times, timestep = loaded.timestep(tensors, constants)
        with self._requests.entered(times, (glue.id, *(tuple(t.shape) for t in tensors.values()))) as (request, branch):
            assert request.trace is not None
            dispatch = Dispatch(
                loaded.blocks,
                self.policy,
                branch,
                request.step,
                request.trace,
                timestep,
                loaded.costs[glue.id],
                copies=glue.file is None,
            )
            with answering(dispatch):
                result = self._run(loaded, glue, given, tensors)
        self._count(dispatch.counters(), glue, dispatch.rows)
        return result

    def _run(self, loaded: _Loaded, glue: Glue, given: Mapping[str, object], tensors: Mapping[str, Tensor]) -> object:
        if glue.file is None:
            if self._host is None:
                raise EditError("this program is hosted: it runs inside the model it was compiled from")
            return self._host(**given)
        outputs = loaded.glue(glue)(*(tensors[i.name] for i in glue.inputs))
        if not glue.outputs:
            return outputs[0]
        named = arguments.unflatten(dict(zip(glue.outputs, outputs, strict=True)))
        plain = all(name.isdigit() for name in named)
        return tuple(named.values()) if plain or not given.get("return_dict", True) else Output(named.items())

    def _find(
        self, given: Mapping[str, object], tensors: Mapping[str, Tensor], constants: Mapping[str, Constant]
    ) -> tuple[_Loaded, Glue]:
        """The glue for these arguments, traced first if need be."""
        found = _search(self._loaded, tensors, constants)
        if found is None and self._tracer is not None:
            with self._lock:
                found = _search(self._loaded, tensors, constants)  # another thread may have traced it meanwhile
                if found is None:
                    self._trace(self._tracer, given)
                    found = _search(self._loaded, tensors, constants)
        if found is None:
            glues = () if self._loaded is None else self._loaded.program.manifest.glues
            raise arguments.explain(glues, tensors, constants)
        return found

    def _trace(self, tracer: Tracer, given: Mapping[str, object]) -> None:
        self._loaded = _Loaded(tracer(given), self.engine)
        self._requests.clear()  # its blocks may be counted otherwise

    def _count(self, done: Counters, glue: Glue, rows: int) -> None:
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
            self._loaded = _Loaded(replace(program, weights=weights, routers=routers), self.engine)
        self._requests.clear()

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

    def load_lora_adapter(self, *args: object, **kwargs: object) -> NoReturn:
        """Refused: the weights of a compiled transformer are fixed."""
        raise EditError("LoRA cannot be loaded into a compiled transformer: fuse it into the model, then compile")

    add_adapter = set_adapters = fuse_lora = enable_lora = load_lora_adapter

    def _load_ip_adapter_weights(self, *args: object, **kwargs: object) -> NoReturn:
        raise EditError("IP-Adapter is not supported by a compiled transformer: use the eager model")


class _Loaded:
    """A program with everything made from it for one engine."""

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

    def glue(self, glue: Glue) -> Callable[..., tuple[Tensor, ...]]:
        """The glue's graph with its weights."""
        found = self._glues.get(glue.id)
        if found is None:
            assert glue.file is not None
            graph = pt2.load(self.program.files[glue.file], glue.file, self.device)
            weights = [self.program.weights[key] for key in glue.weights]
            found = self._glues[glue.id] = lambda *inputs: graph(*weights, *inputs)
        return found

    def timestep(
        self, tensors: Mapping[str, Tensor], constants: Mapping[str, Constant]
    ) -> tuple[tuple[float, ...], Callable[[], Tensor]]:
        """The timestep on the host (see `runtime.transfer`), one or one per row, and as a tensor."""
        name = self.program.manifest.timestep
        tensor = tensors.get(name)
        if tensor is None:
            value = constants.get(name)
            if not isinstance(value, (int, float)):
                raise InputError(f"missing input {name!r}")
            return (float(value),), lambda: torch.full((1,), float(value), device=self.device)
        return tuple(transfer.to_host(tensor.reshape(-1))), lambda: tensor


def _search(
    loaded: _Loaded | None, tensors: Mapping[str, Tensor], constants: Mapping[str, Constant]
) -> tuple[_Loaded, Glue] | None:
    if loaded is None:
        return None
    glue = arguments.find_glue(loaded.program.manifest.glues, tensors, constants)
    return None if glue is None else (loaded, glue)


def _refuse_adapters(given: Mapping[str, object]) -> None:
    for name, value in given.items():
        if name.endswith("attention_kwargs") and isinstance(value, Mapping):
            for key in value:
                what = "IP-Adapter" if "ip_adapter" in key else "LoRA" if key == "scale" else None
                if what:
                    raise InputError(f"{name}[{key!r}]: {what} is not supported by a compiled transformer")
