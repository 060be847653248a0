"""How a call of a compiled transformer is run: its decisions taken on the host, or on the device where that can be."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from runtime.base.errors import EditError, InputError, RecordError
from runtime.bundle.spec import Glue
from runtime.calls.host import HostRunner
from runtime.calls.loaded import Loaded, named
from runtime.device.policy import why_not
from runtime.face import arguments
from runtime.requests.state import KEPT
from runtime.requests.trace import Counters, Trace
from runtime.routing.policy import Decider

log = logging.getLogger(__name__)

Host = Callable[..., object]


@dataclass(frozen=True)
class Call:
    """A forward call: its arguments, the tensors among them by name, its timestep (one, or one per row), its glue."""

    glue: Glue
    given: Mapping[str, object]
    tensors: Mapping[str, Tensor]
    timestep: Tensor


class Calls:
    """Runs calls; `traces` hold what was decided.

    `note` is why decisions are taken on the host although they were wanted on the device. A request that goes from one
    to the other keeps its step, but no residuals, which the other has outdated.

    Args:
        dispatch: "host" or "device".
        count: told the work of each call, and its rows.
    """

    def __init__(self, dispatch: str, count: Callable[[Glue, Counters, int], None]) -> None:
        if dispatch not in ("host", "device"):
            raise EditError(f"dispatch is {dispatch!r}: say 'host' or 'device'")
        self.wanted = dispatch
        self.note: str | None = None
        self.traces = Trace(KEPT)
        self.host = HostRunner(self.traces)
        self._count = count

    def run(self, loaded: Loaded, call: Call, policy: Decider, host: Host | None) -> object:
        """The model's output. `host` is the model's forward with guards, for hosted glue."""
        if self.wanted == "device":
            try:
                return self._on_device(loaded, call, policy)
            except RecordError as error:
                self._say(str(error))
            place = None if loaded.started is None else loaded.started.leave()
            if place is not None:
                with self.host.requests.held() as request:
                    request.resume(place)
        return self._on_host(loaded, call, policy, host)

    def look(self, loaded: Loaded | None) -> None:
        """Note why there can be no decisions on the device here, as far as that is known before a call."""
        if self.wanted == "device" and loaded is not None and self.note is None:
            try:
                loaded.runner(self.traces)
            except RecordError as error:
                self.note = str(error)

    def settle(self, loaded: Loaded | None) -> None:
        """Wait for the device, so that traces and counters hold all calls."""
        if loaded is not None and loaded.started is not None:
            loaded.started.settle()

    def end(self, loaded: Loaded | None) -> None:
        """End the current request; raises what the device came upon in it."""
        self.host.requests.drop()
        if loaded is not None and loaded.started is not None:
            loaded.started.end()

    def replaced(self, loaded: Loaded | None) -> None:
        """End all requests: `loaded` is run no more."""
        self.settle(loaded)
        self.host.requests.clear()
        self.note = None

    def _on_device(self, loaded: Loaded, call: Call, policy: Decider) -> object:
        reason = "the model's own Python runs between its blocks" if call.glue.file is None else why_not(policy)
        if reason is not None:
            raise RecordError(reason)
        before = self.host.requests.existing()
        outputs = loaded.runner(self.traces)(
            call.glue.id,
            loaded.glue(call.glue),
            {given.name: call.tensors[given.name] for given in call.glue.inputs},
            call.timestep,
            policy,
            loaded.costs[call.glue.id],
            partial(self._count, call.glue),
            None if before is None else before.place,
        )
        self.note = None
        self.host.requests.drop()
        return named(call.glue, outputs, call.given)

    def _on_host(self, loaded: Loaded, call: Call, policy: Decider, host: Host | None) -> object:
        arguments.check_finite(call.glue, call.tensors)

        def run() -> object:
            if call.glue.file is not None:
                inputs = (call.tensors[given.name] for given in call.glue.inputs)
                return named(call.glue, loaded.glue(call.glue)(*inputs), call.given)
            if host is None:
                raise EditError("this program is hosted: it runs inside the model it was compiled from")
            return host(**call.given)

        shapes = tuple(tuple(tensor.shape) for tensor in call.tensors.values())
        try:
            return self.host(loaded, call.glue, shapes, call.timestep, policy, run, partial(self._count, call.glue))
        except (ValueError, IndexError, RuntimeError) as error:
            rows = arguments.rows(call.glue, call.tensors)
            agree = len(set(rows.values())) < 2 and 0 not in rows.values()
            if agree or isinstance(error, (EditError, torch.OutOfMemoryError)):
                raise
            told = ", ".join(f"{name} {count}" for name, count in rows.items())
            raise InputError(f"the inputs hold different numbers of rows ({told}): {error}") from error

    def _say(self, reason: str) -> None:
        if reason != self.note:
            self.note = reason
            log.warning("decisions are taken on the host: %s", reason)
