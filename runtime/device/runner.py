"""A call of a compiled transformer by a recorded step."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from weakref import finalize

import torch
from torch import Tensor

from runtime.base.errors import EditError, RecordError
from runtime.calls.bound import ReadyBlocks
from runtime.calls.tally import Costs, Tally
from runtime.device.reader import Reading
from runtime.device.recorder import Recorder, recorder_for
from runtime.device.requests import DeviceRequest, Shelf
from runtime.device.step import Step
from runtime.requests.state import Place, Requests, Signature, current_context
from runtime.requests.trace import Counters, Trace
from runtime.routing.policy import Decider

log = logging.getLogger(__name__)

Graph = Callable[..., Sequence[Tensor]]
Count = Callable[[Counters, int], None]
"""Takes what one call did, and its rows."""


class DeviceRunner:
    """Runs the program of `blocks` with `recorder`, a recorded step for each context; traces go to `traces`.

    Steps are recorded when first needed, with the shapes of that call, and used again when a request has ended. Shapes
    for which that has failed are refused from then on. What was decided is written down when it has come to the host:
    at a later call, or by `settle`. An error is raised in the next call of the request that came upon it, or by `end`.
    """

    def __init__(self, blocks: ReadyBlocks, recorder: Recorder, traces: Trace) -> None:
        self._blocks = blocks
        self._recorder = recorder
        self._shelf = Shelf()
        self._refused: dict[Signature, str] = {}
        self._readings: deque[tuple[Reading, Count]] = deque()
        self._writing = threading.Lock()
        self._told = False
        self.requests = Requests(lambda name: DeviceRequest(name, traces, self._shelf))
        finalize(self, recorder.finish).atexit = False  # before what the device may still use is freed

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(
        self,
        name: str,
        graph: Graph,
        inputs: Mapping[str, Tensor],
        timestep: Tensor,
        policy: Decider,
        costs: Costs,
        count: Count,
        place: Place | None = None,
    ) -> list[Tensor]:
        """The outputs of the glue called `name`, newly allocated. A request that has not started goes on from `place`.

        Raises RecordError where the step cannot be recorded, and what an earlier call of this request came upon.
        """
        self._write_down()
        routed = policy.routed and self._blocks.routers is not None
        shapes: Signature = (name, timestep.numel(), _modes(), *(tuple(given.shape) for given in inputs.values()))
        if shapes in self._refused:
            raise RecordError(self._refused[shapes])
        context = current_context()

        def make() -> Step:
            try:
                return Step(self._recorder, self._blocks, graph, inputs, timestep, routed)
            except Exception as error:  # of torch, of the engine, of CUDA: whatever is done that cannot be recorded
                self._refused[shapes] = f"a step could not be recorded: {error}"
                raise RecordError(self._refused[shapes]) from error

        with self.requests.held() as request:
            if request.error is not None:
                raise request.error
            with self._recorder.turn():
                step, clock = request.step(context, shapes, routed, timestep.numel(), place, make)
                outputs = step.run(
                    tuple(inputs.values()),
                    timestep,
                    policy,
                    lambda: clock.advance(self._recorder, step, context is not None),
                )
                reading = Reading.begin(step, context, request, Tally(costs))
        self._readings.append((reading, count))
        return outputs

    def settle(self) -> None:
        """Wait for the device, and write down what was decided in all calls so far."""
        for reading, _ in tuple(self._readings):
            reading.wait()
        self._write_down()

    def end(self) -> None:
        """End the current request; raises the error that it came upon, if any. Waits for the device."""
        self.settle()
        request = self.requests.existing()
        self.requests.drop()
        if request is not None and request.error is not None:
            raise request.error

    def leave(self) -> Place | None:
        """End the current request, to go on elsewhere; where it is. Waits for the device."""
        self.settle()
        request = self.requests.existing()
        self.requests.drop()
        return None if request is None else request.place

    def _write_down(self) -> None:
        with self._writing:
            while self._readings and self._readings[0][0].arrived():
                reading, count = self._readings.popleft()
                if reading.ledger.closed:
                    continue
                try:
                    untold = reading.write_down()
                except EditError as error:
                    self._fail(reading, error)
                    continue
                count(reading.tally.counters(), reading.step.rows)
                self._tell(untold)

    @staticmethod
    def _fail(reading: Reading, error: EditError) -> None:
        reading.ledger.close()
        log.error("request %r: %s", reading.ledger.name, error)
        request = reading.request()
        if request is not None and request.ledger is reading.ledger:
            request.error = error

    def _tell(self, untold: bool) -> None:
        if untold and not self._told:
            self._told = True
            log.warning(
                "there were two calls at one timestep without a cache context: branches of guidance cannot be told "
                "apart on the device, so nothing is reused; call each inside compiled.cache_context(name)"
            )


def make_runner(blocks: ReadyBlocks, device: torch.device, traces: Trace) -> DeviceRunner:
    """What runs the program of `blocks` on `device`; RecordError where steps cannot be recorded there."""
    if device.type != "cuda" and not blocks.engine.recordable:
        recorder_for(device)
    if not blocks.engine.recordable:
        raise RecordError(
            f"what engine {blocks.engine.name!r} does cannot be recorded: use 'torch', 'inductor' or 'tensorrt'"
        )
    return DeviceRunner(blocks, recorder_for(device), traces)


def _modes() -> tuple[object, ...]:
    """What of torch's settings a recording holds on to."""
    casts = tuple((kind, torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind))
    return (*casts, torch.get_float32_matmul_precision())
