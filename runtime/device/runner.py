"""A call of a compiled transformer by a recorded step."""

from __future__ import annotations

import logging
import threading
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from weakref import finalize

import torch
from torch import Tensor

from runtime.base.errors import EditError, RecordError
from runtime.bundle.spec import Glue
from runtime.calls.bound import BoundBlocks
from runtime.device.reader import Reading
from runtime.device.recorder import Recorder, absent, recorder_for
from runtime.device.state import DeviceState, Recorded, Shelf
from runtime.device.step import Step
from runtime.requests.request import IN_DOUBT, Request
from runtime.requests.rule import Verdict
from runtime.requests.sighting import Sighting
from runtime.requests.trace import Costs, Counters, Trace
from runtime.routing.policy import Decider

log = logging.getLogger(__name__)

Graph = Callable[..., Sequence[Tensor]]
Count = Callable[[Glue, Counters, int], None]
"""Takes what one call did, and its rows."""


class DeviceRunner:
    """Runs the program of `blocks` with `recorder`, a recorded step for each branch; traces go to `traces`.

    Steps are recorded when first needed, with the shapes of that call, and used again when a request has ended. Shapes
    for which that has failed are refused from then on. What was decided is written down when it has come to the host:
    at a later call, or by `settle`. An error is raised in the next call of the request that came upon it, or by `end`.
    """

    def __init__(self, blocks: BoundBlocks, recorder: Recorder, traces: Trace, count: Count) -> None:
        self._blocks = blocks
        self._recorder = recorder
        self._traces, self._count = traces, count
        self._shelf = Shelf()
        self._refused: dict[Recorded, str] = {}
        self._readings: deque[tuple[Reading, Glue]] = deque()
        self._writing = threading.Lock()
        finalize(self, recorder.finish).atexit = False  # before what the device may still use is freed

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(
        self,
        request: Request,
        glue: Glue,
        graph: Graph,
        inputs: Mapping[str, Tensor],
        call: Sighting,
        policy: Decider,
        costs: Costs,
        latents: Callable[[Sequence[Tensor]], Tensor | None],
    ) -> list[Tensor]:
        """The outputs of the glue, newly allocated; `latents` finds among them what the sampler advances latents by.

        Raises RecordError where the step cannot be recorded or the host has to say what the call is to the request, and
        what an earlier call of this request came upon.
        """
        self._write_down()
        routed = policy.routed and self._blocks.routers is not None
        recorded: Recorded = (
            glue.id,
            call.timestep.numel(),
            torch.get_float32_matmul_precision(),
            *(tuple(given.shape) for given in inputs.values()),
            routed,
        )
        if request.resized(call):
            raise RecordError("the shape of the latents changed within a request")
        if recorded in self._refused:
            raise RecordError(self._refused[recorded])
        state = self._state(request)
        if state.error is not None:
            raise state.error

        def make() -> Step:
            try:
                return Step(self._recorder, self._blocks, graph, inputs, call.timestep, routed)
            except torch.OutOfMemoryError as error:  # there may be room the next time
                raise RecordError(f"a step could not be recorded: {error}") from error
            except Exception as error:  # of torch, of the engine, of CUDA: whatever is done that cannot be recorded
                self._refused[recorded] = f"a step could not be recorded: {error}"
                raise RecordError(self._refused[recorded]) from error

        with self._recorder.turn():
            branch = request.branch_at_once(call)
            if branch is None:  # the conditioning is in other tensors: only there does the host look at the call
                request.catch_up(state.place, state.seen())
                branch = request.branch(request.look(call))
            told, changed = request.compare(branch, call)
            step, clock = state.step(branch.number, recorded, call, make)
            if changed:
                step.empty()
            chain = request.chain(call.shape)
            sample: list[Tensor | None] = []
            outputs = step.run(
                tuple(inputs.values()),
                call.timestep,
                policy,
                lambda: sample.append(clock.advance(self._recorder, step, call, chain, told, request.trusted)),
            )
            advanced = latents(outputs)
            if advanced is not None:
                request.note(replace(call, sample=sample[0]), advanced, clock.new)
            reading = Reading.begin(step, branch.name, state, costs)
        self._readings.append((reading, glue))
        return outputs

    def settle(self) -> None:
        """Wait for the device, and write down what was decided in all calls so far."""
        for reading, _ in tuple(self._readings):
            reading.wait()
        self._write_down()

    def leave(self, request: Request) -> None:
        """Let the host go on where the device was in `request`, without its residuals. Synchronises with the device.

        Raises what the device came upon in it.
        """
        state = request.elsewhere
        if isinstance(state, DeviceState):
            self.settle()
            if state.error is not None:
                raise state.error
            request.catch_up(state.place, state.seen())
            request.come_back()

    def _state(self, request: Request) -> DeviceState:
        """What `request` has on the device, from where the host was if that had it last."""
        if isinstance(request.elsewhere, DeviceState):
            return request.elsewhere
        state = DeviceState(request, self._traces, self._shelf)
        request.go_elsewhere(state)
        return state

    def _write_down(self) -> None:
        with self._writing:
            while self._readings and self._readings[0][0].arrived():
                reading, glue = self._readings.popleft()
                if reading.ledger.closed:
                    continue
                try:
                    verdict, done = reading.write_down()
                except EditError as error:
                    self._fail(reading, error)
                    continue
                if verdict is Verdict.IN_DOUBT:
                    warnings.warn(IN_DOUBT, RuntimeWarning, stacklevel=2)
                self._count(glue, done, reading.step.rows)

    @staticmethod
    def _fail(reading: Reading, error: EditError) -> None:
        reading.ledger.close()
        log.error("request %r: %s", reading.ledger.name, error)
        state = reading.state()
        if state is not None:
            state.error = error


def why_not_here(blocks: BoundBlocks, device: torch.device) -> str | None:
    """Why steps cannot be recorded on `device`, as far as that is known without trying; None where they may be."""
    reason = absent(device)
    if reason is None and not blocks.engine.recordable:
        reason = f"what engine {blocks.engine.name!r} does cannot be recorded: use 'torch', 'inductor' or 'tensorrt'"
    return reason


def make_runner(blocks: BoundBlocks, device: torch.device, traces: Trace, count: Count) -> DeviceRunner:
    """What runs the program of `blocks` on `device`; RecordError where steps cannot be recorded there."""
    reason = why_not_here(blocks, device)
    if reason is not None:
        raise RecordError(reason)
    return DeviceRunner(blocks, recorder_for(device), traces, count)
