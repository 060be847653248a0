"""Calls of a program, run on the host or on the device, and all that is remembered of them."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor

from runtime.base.errors import (
    EditError,
    EngineError,
    InnerShapeError,
    InputError,
    NotFiniteError,
    RecordError,
    ShapeError,
    where,
)
from runtime.base.guard import answering
from runtime.bundle.program import Program
from runtime.bundle.spec import Glue
from runtime.calls.dispatch import Dispatch
from runtime.calls.finite import Again, all_finite
from runtime.calls.rehearsal import rehearse
from runtime.calls.rows import Scene
from runtime.device.policy import why_not
from runtime.device.runner import DeviceRunner, make_runner, why_not_here
from runtime.device.state import DeviceState
from runtime.face import arguments
from runtime.face.arguments import Constant
from runtime.face.call import Call, advanced_of, latents_of
from runtime.face.growing import GrowingProgram, Tracer
from runtime.face.output import Output, tensors_of
from runtime.requests.registry import Requests
from runtime.requests.request import Request
from runtime.requests.scope import current_context
from runtime.requests.sighting import Sighting
from runtime.requests.trace import Counters, RequestTrace, Trace, work
from runtime.routing.branched import of_branch
from runtime.routing.policy import Decider

log = logging.getLogger(__name__)

KEPT = 16
"""Traces of requests that are kept."""

Host = Callable[..., object]
"""The model's forward with guards for blocks, for programs whose glue is hosted."""


class Session(GrowingProgram):
    """A program that grows, with the requests that call it; `trace` and `counters` hold what was decided and done."""

    def __init__(
        self,
        program: Program,
        engine: str | None,
        dispatch: str,
        tracer: Tracer | None,
        host: Host | None,
        grown: Callable[[Program], None],
    ) -> None:
        if dispatch not in ("host", "device"):
            raise EditError(f"dispatch is {dispatch!r}: say 'host' or 'device'")
        super().__init__(program, engine, tracer, grown)
        self.wanted = dispatch
        self.trace = Trace(KEPT)
        self.counters = Counters()
        self.requests = Requests(self.trace)
        self._host = host
        self._counting = threading.Lock()
        self._runner: DeviceRunner | None = None
        self._no_runner: str | None = None
        self._note: str | None = None
        self._said_changed = False
        self._looks: dict[tuple[object, ...], bool] = {}  # whether calls look at values, by glue, requests and rows
        self._told: WeakSet[RequestTrace] = WeakSet()  # generations of which it was said that they are not finite

    def __call__(self, given: Mapping[str, object], policies: Sequence[Decider]) -> object:
        """The model's output for the arguments `given`; each of the current requests is decided by its policy."""
        manifest = self.program.manifest
        given = arguments.without_silent(given, manifest.arguments, manifest.telling_none)
        flat, constants = arguments.flatten(given)
        glue, tensors = self.find(given, flat, constants)
        arguments.check_device(glue, tensors, self.device)
        empty = [name for name, count in arguments.rows(glue, tensors).items() if not count]
        if empty:
            raise InputError(f"{', '.join(empty)} holds no rows: a batch has at least one")
        return self._run(self._call(glue, given, tensors, constants), policies)

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Have `fn` move all tensors to another device; residuals stay behind."""
        self.settle()
        super().move(fn)
        runner, self._runner, self._no_runner = self._runner, None, None
        self.requests.lose_all(None if runner is None else runner.leave)

    def reset_counters(self) -> None:
        """Start counting anew."""
        with self._counting:
            self.counters = Counters()

    def settle(self) -> None:
        """Wait for the device, so that trace and counters hold all calls."""
        if self._runner is not None:
            self._runner.settle()

    def end(self) -> None:
        """End the current request; raises what the device came upon in it."""
        self.settle()
        ended = self.requests.existing()
        self.requests.drop()
        for request in ended:
            if isinstance(request.elsewhere, DeviceState) and request.elsewhere.error is not None:
                raise request.elsewhere.error

    def why_not_on_device(self) -> str | None:
        """Why decisions are taken on the host although they were wanted on the device; None where that is not so."""
        if self.wanted == "device" and self._note is None:
            return why_not_here(self.blocks, self.device)
        return self._note

    def _call(
        self, glue: Glue, given: Mapping[str, object], tensors: Mapping[str, Tensor], constants: Mapping[str, Constant]
    ) -> Call:
        step = self.program.manifest.timestep
        timestep = tensors.get(step)
        if timestep is None:
            value = given.get(step)
            if not isinstance(value, (int, float, np.number)):
                raise InputError(f"missing input {step!r}")
            timestep = torch.tensor([float(value)], dtype=torch.float64)
        advanced = {name for name, _ in glue.latents}
        conditioning = {name: t for name, t in tensors.items() if name != step and name not in advanced}
        others = arguments.all_exactly(constants)
        sighting = Sighting(timestep, latents_of(glue, tensors), conditioning, current_context(), others)
        return Call(glue, given, tensors, sighting)

    def _run(self, call: Call, policies: Sequence[Decider]) -> object:
        glue, finite = call.glue, False
        parts = call.parts(len(policies))
        reason = self._why_on_host(glue, policies)
        if reason is not None:  # before the request is touched: a call that is refused leaves it as it was
            arguments.check_finite(glue, call.tensors)
            finite = True
        try:
            if reason is not None:
                self._rehearse(call, len(policies))
            with self.requests.held(self.device) as requests:
                if reason is None and not requests[0].stays:
                    try:
                        return self._on_device(requests[0], call, policies[0])
                    except RecordError as error:
                        reason = str(error)
                if self._runner is not None:
                    for request in requests:
                        self._runner.leave(request)
                if self.wanted == "device":
                    self._say(reason)
                if not finite:
                    arguments.check_finite(glue, call.tensors)
                return self._on_host(requests, call, parts, policies)
        except Exception as error:
            if isinstance(error, (EditError, torch.OutOfMemoryError)):
                raise
            explained = _explained(call, error) or self._named(error)
            if explained is None:
                raise
            raise explained from error

    def _rehearse(self, call: Call, requests: int) -> None:
        """Have a call that is refused for its arguments in its course be refused now.

        How rows fall to requests is tried once for each number of them, values that a call looks at every time. The
        model's own Python runs a second time only for several requests.
        """
        hosted, form = call.glue.file is None, (call.glue.id, requests, *call.rows.values())
        if not self._looks.get(form, True) or (hosted and requests == 1):
            return
        if hosted:  # it may write into its arguments
            call = replace(call, given=arguments.mapped(call.given, lambda _, tensor: tensor.clone()))
        grow = None if self.tracer is None else partial(self.retrace, call.given)
        run = partial(self._answered, call)
        try:
            self._looks[form] = rehearse(self.blocks, call.glue, call.sighting, requests, grow, run)
        except Exception as error:
            told = error if isinstance(error, EditError) else _explained(call, error)
            if isinstance(told, InputError) and not isinstance(told, ShapeError):  # these may be others with blocks
                raise

    def _named(self, error: Exception) -> EditError | None:
        """`error` of a graph that was read from a bundle, with the file's name; None for any other."""
        folder, name = self.program.folder, where(error)
        if folder is None or not name:
            return None
        told = str(error).partition("\n")[0] or type(error).__name__
        return EngineError(
            f"{folder / name} fails in this call ({told}): check the inputs; where the model itself takes them, "
            "compile it again"
        )

    def _why_on_host(self, glue: Glue, policies: Sequence[Decider]) -> str | None:
        """Why a call is decided on the host, as far as that is known before it; None where the device may decide."""
        if self.wanted != "device":
            return "that is what was asked for"
        if glue.file is None:
            return "the model's own Python runs between its blocks"
        if glue.sized_by:
            return f"sizes inside it depend on the values of {', '.join(glue.sized_by)}"
        if len(policies) > 1:
            return "several requests share the rows of a call"
        return self._no_runner or why_not(policies[0]) or why_not_here(self.blocks, self.device)

    def _on_device(self, request: Request, call: Call, policy: Decider) -> object:
        glue = call.glue
        self._check_weights(glue, begins=request.elsewhere is None)
        with self._lock:
            if self._runner is None:
                try:
                    self._runner = make_runner(self.blocks, self.device, self.trace, self._count)
                except RecordError as error:
                    self._no_runner = str(error)  # not the error: its traceback would hold the frames of every call
                    raise
        inputs = {given.name: call.tensors[given.name] for given in glue.inputs}
        advanced = partial(advanced_of, glue)
        costs = self.costs[glue.id]
        outputs = self._runner(request, glue, self.graph(glue), inputs, call.sighting, policy, costs, advanced)
        self._note = None
        return _named(glue, outputs, call.given)

    def _on_host(
        self, requests: Sequence[Request], call: Call, parts: Sequence[Sighting], policies: Sequence[Decider]
    ) -> object:
        glue = call.glue
        seen = [request.look(part) for request, part in zip(requests, parts, strict=True)]
        scenes = [_scene(*each) for each in zip(requests, seen, policies, strict=True)]
        self._check_weights(glue, begins=any(scene.step == 0 for scene in scenes))
        grow = None if self.tracer is None else partial(self.retrace, call.given)
        already = [len(scene.trace) for scene in scenes]
        timestep = call.sighting.timestep.to(self.device)

        def dispatched() -> tuple[Dispatch, object, Sequence[Any]]:
            dispatch = Dispatch(self.blocks, scenes, timestep, glue, grow)
            with answering(dispatch):
                return dispatch, *self._answered(call)

        def parts_of(outputs: Sequence[Any]) -> Sequence[Sequence[Any]]:
            advanced = advanced_of(glue, outputs)
            return [outputs] if len(scenes) == 1 or advanced is None else [[o] for o in advanced.chunk(len(scenes))]

        again = Again(self.blocks, glue, scenes, call.sighting, timestep, lambda: self._answered(call)[1], parts_of)
        try:
            dispatch, result, outputs = dispatched()
        except NotFiniteError as error:  # of a router, which reads what a block before it gave
            origin = again.at_full_width()
            if not origin:
                raise
            raise NotFiniteError(f"{error}. NaN or infinity arises{origin}") from error
        except InnerShapeError:  # the model's own Python calls a block with other arguments, known only now
            if grow is None or glue.file is not None:
                raise
            grow()
            for scene, length in zip(scenes, already, strict=True):
                scene.branch.clear()
                scene.trace.shorten(length)
            dispatch, result, outputs = dispatched()
        if any(scene.trace not in self._told for scene in scenes) and not all_finite(outputs):
            self._told.update(scene.trace for scene in again.explain(outputs))
        advanced = advanced_of(glue, outputs)
        if advanced is not None:
            for request, part, own in zip(requests, seen, advanced.chunk(len(requests)), strict=True):
                request.note(part, own)
        self._count(glue, work(dispatch.answered, self.costs[glue.id]), dispatch.rows)
        return result

    def _answered(self, call: Call) -> tuple[object, Sequence[Any]]:
        """What the model gives, and the tensors in it."""
        if call.glue.file is not None:
            outputs = self.graph(call.glue)(*(call.tensors[given.name] for given in call.glue.inputs))
            return _named(call.glue, outputs, call.given), outputs
        if self._host is None:
            raise EditError("this program is hosted: it runs inside the model it was compiled from")
        with self._lock:  # a trace swaps the model's weights and forwards for its own
            result = self._host(**call.given)
        return result, tensors_of(result)

    def _check_weights(self, glue: Glue, begins: bool) -> None:
        """Refuse, or warn once as a generation `begins`, where the model is another than was compiled."""
        asked = glue.file is None or (begins and not self._said_changed)
        if self.tracer is None or not asked:
            return
        with self._lock:  # not while another thread traces, as above
            name = self.tracer.changed()
        if name is None:
            return
        told = f"weights or attributes of the model have changed since it was compiled (first: {name})"
        if glue.file is None:
            raise EditError(f"{told}, and parts of it run beside the compiled blocks: compile it anew")
        self._said_changed = True
        warnings.warn(f"{told}: what runs is the model as it was; compile it anew", RuntimeWarning, stacklevel=2)

    def _count(self, glue: Glue, done: Counters, rows: int) -> None:
        own = rows * glue.flops
        with self._counting:
            self.counters = self.counters + done + Counters(flops=own, dense_flops=own)

    def _say(self, reason: str | None) -> None:
        if reason is not None and reason != self._note:
            self._note = reason
            log.warning("decisions are taken on the host: %s", reason)


def _scene(request: Request, seen: Sighting, policy: Decider) -> Scene:
    branch = request.enter(seen)
    return Scene(branch, request.step, request.traced, seen.times, of_branch(policy, branch.name))


def _named(glue: Glue, outputs: Sequence[Tensor], given: Mapping[str, object]) -> object:
    """What the model gives, from the glue's outputs and the arguments of the call."""
    if not glue.outputs:
        return outputs[0]
    named = arguments.unflatten(dict(zip(glue.outputs, outputs, strict=True)))
    plain = all(name.isdigit() for name in named)
    return tuple(named.values()) if plain or not given.get("return_dict", True) else Output(named.items())


def _explained(call: Call, error: Exception) -> EditError | None:
    """What a user can make of `error`; None where that says it itself."""
    if not isinstance(error, (ValueError, IndexError, RuntimeError)):
        return None
    if len(set(call.rows.values())) > 1:
        told = ", ".join(f"{name} {count}" for name, count in call.rows.items())
        return InputError(f"the inputs hold different numbers of rows ({told}): {error}")
    if call.glue.sized_by:
        names = ", ".join(call.glue.sized_by)
        return ShapeError(f"not compiled for sizes as the values of {names} tell here, compile with such, too: {error}")
    return None
