"""A call of a compiled transformer by a recorded step."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from runtime.blocks import ReadyBlocks
from runtime.device.reader import Reading
from runtime.device.recorder import Recorder, recorder_for
from runtime.device.requests import UNNAMED, DeviceRequest, Shelf
from runtime.device.step import Step
from runtime.errors import EditError, RecordError
from runtime.policy import Decider
from runtime.state import Requests, Signature, current_context
from runtime.tally import Costs, Tally
from runtime.trace import Counters, Trace

log = logging.getLogger(__name__)

Graph = Callable[..., Sequence[Tensor]]
Count = Callable[[Counters, int], None]
"""Takes what one call did, and its rows."""


class DeviceRunner:
    """Runs the program of `blocks` with `recorder`, a recorded step for each context; traces go to `traces`.

    Steps are recorded when first needed, with the shapes of that call, and used again when a request has ended.
    What was decided is written down when it has come to the host: at a later call, or by `settle`. So are errors.
    """

    def __init__(self, blocks: ReadyBlocks, recorder: Recorder, traces: Trace) -> None:
        self._blocks = blocks
        self._recorder = recorder
        self._shelf = Shelf()
        self._readings: deque[tuple[Reading, Count]] = deque()
        self._writing = threading.Lock()
        self._told = False
        self.requests = Requests(lambda name: DeviceRequest(name, traces, self._shelf.give_back))

    def __call__(
        self,
        name: str,
        graph: Graph,
        inputs: Mapping[str, Tensor],
        timestep: Tensor,
        policy: Decider,
        costs: Costs,
        count: Count,
    ) -> list[Tensor]:
        """The outputs of the glue called `name`, newly allocated.

        Raises RecordError where the step cannot be recorded, and what an earlier call came upon.
        """
        self._write_down(wait=False)
        routed = policy.routed and self._blocks.routers is not None
        signature: Signature = (name, routed, timestep.numel(), *(tuple(given.shape) for given in inputs.values()))
        context = current_context()

        def make() -> Step:
            return Step(self._recorder, self._blocks, graph, inputs, timestep, routed)

        with self.requests.held() as request, self._recorder.turn():
            step = request.step(
                context or UNNAMED, signature, timestep.numel(), lambda: self._shelf.take(signature, make)
            )
            clock = request.clock
            assert clock is not None
            outputs = step.run(
                tuple(inputs.values()),
                timestep,
                policy,
                lambda: clock.advance(self._recorder, step, context is not None),
            )
            reading = Reading.begin(step, context or UNNAMED, request, Tally(costs))
        self._readings.append((reading, count))
        return outputs

    def settle(self) -> None:
        """Wait for the device, and write down what was decided in all calls so far."""
        self._write_down(wait=True)

    def _write_down(self, wait: bool) -> None:
        with self._writing:
            while self._readings and self._readings[0][0].arrived(wait):
                reading, count = self._readings.popleft()
                try:
                    untold = reading.write_down()
                except EditError:
                    if (request := reading.request()) is not None:
                        self.requests.abandon(request)
                    raise
                count(reading.tally.counters(), reading.step.rows)
                self._tell(untold)

    def _tell(self, untold: bool) -> None:
        if untold and not self._told:
            self._told = True
            log.warning(
                "there were two calls at one timestep without a cache context: branches of guidance cannot be told "
                "apart on the device, so nothing is reused; call each inside compiled.cache_context(name)"
            )


def make_runner(blocks: ReadyBlocks, device: torch.device, traces: Trace) -> DeviceRunner:
    """What runs the program of `blocks` on `device`; RecordError where steps cannot be recorded there."""
    if not blocks.engine.recordable:
        raise RecordError(
            f"what engine {blocks.engine.name!r} does cannot be recorded: use a TensorRT engine, or 'torch'"
        )
    return DeviceRunner(blocks, recorder_for(device), traces)
