"""Recording as a CUDA graph whose switches are conditional nodes.

Unverified: no GPU has run this. What is tested is that the driver's bindings have every name and argument that is used
here, and, with a driver that is imitated on a CPU, what is captured and in which order.

A graph is captured from one stream, the bodies of its switches from another, one after another, so that all bodies
share the scratch that torch's allocator keeps for a stream. Both streams, and the order of calls, are those of all
recorders on a device (`_Lane`): what libraries keep for a stream is then used by one call at a time. Memory comes from
a private pool, the workspaces of libraries among it; what must outlive a replay is the caller's own.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from runtime.base.errors import RecordError
from runtime.device.kernels import Kernels, checked
from runtime.device.recorder import Argument, Condition, Work

NEEDED = 12080
"""CUDA version of the first driver with switches."""

_lanes: dict[torch.device, _Lane] = {}
_lock = threading.Lock()


class _Lane:
    """Where the calls of all recorders on a device go one after another."""

    def __init__(self, device: torch.device) -> None:
        self.turns = threading.Lock()
        self.stream, self.body = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self.last = torch.cuda.Event()


class CudaRecorder:
    """Records on `device`. RecordError where cuda-bindings is missing or the driver is older than CUDA 12.8."""

    def __init__(self, device: torch.device) -> None:
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise RecordError("cuda-bindings is not installed: pip install '.[device-dispatch]'") from error
        self._driver = driver
        version = checked(driver.cuDriverGetVersion())
        if version < NEEDED:
            raise RecordError(f"the driver is for CUDA {version // 1000}.{version % 1000 // 10}: switches need 12.8")
        self._device = device
        self._warming = False
        with torch.cuda.device(device):
            torch.empty(1, device=device)  # a thread without a context of its own gets torch's
            with _lock:
                self._lane = _lanes.get(device) or _lanes.setdefault(device, _Lane(device))
            self._stream, self._body = self._lane.stream, self._lane.body
            self._pool = torch.cuda.MemPool()
            self._kernels = Kernels(device)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """See Recorder. The host is held up for as long as it takes to enqueue a call, not for its work."""
        with self._lane.turns, torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._lane.last)
            try:
                yield
            finally:
                self._lane.last.record(stream)

    def finish(self) -> None:
        """See Recorder."""
        self._lane.last.synchronize()

    def record(self, work: Work) -> Work:
        """See Recorder. `work` runs once as it is, for what libraries set up at first use, and once to be captured."""
        self._stream.wait_stream(torch.cuda.current_stream())
        torch._C._cuda_clearCublasWorkspaces()  # those of earlier owners of our streams: ours belong into the pool
        with torch.cuda.use_mem_pool(self._pool), torch.cuda.stream(self._stream):
            with self._warm():
                work()
            self._stream.synchronize()
            graph, outputs = self._capture(work)
        return self._replay(graph, outputs)

    def launch(self, kernel: str, *arguments: Argument) -> None:
        """See Recorder."""
        if not self._warming:  # a condition can be set inside a graph alone
            self._kernels.launch(kernel, arguments, torch.cuda.current_stream().cuda_stream)

    def condition(self) -> Condition:
        """See Recorder."""
        if self._warming:
            return Condition(0)
        _, _, graph, *_ = checked(self._driver.cuStreamGetCaptureInfo(self._handle(self._stream)))
        return Condition(int(checked(self._driver.cuGraphConditionalHandleCreate(graph, self._context(), 0, 0))))

    def switch(self, condition: Condition, bodies: Sequence[Callable[[], None]]) -> None:
        """See Recorder."""
        if self._warming:
            self._run_all(bodies)
            return
        for graph, body in zip(self._add_switch(condition, len(bodies)), bodies, strict=True):
            with self._capturing_body(graph), torch.cuda.stream(self._body):
                body()

    @contextmanager
    def _warm(self) -> Iterator[None]:
        self._warming = True
        try:
            yield
        finally:
            self._warming = False

    def _run_all(self, bodies: Sequence[Callable[[], None]]) -> None:
        self._body.wait_stream(self._stream)
        with torch.cuda.stream(self._body):
            for body in bodies:
                body()
        self._stream.wait_stream(self._body)

    def _capture(self, work: Work) -> tuple[Any, Sequence[Tensor]]:
        driver, stream = self._driver, self._handle(self._stream)
        checked(driver.cuStreamBeginCapture(stream, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED))
        try:
            outputs = work()
        except BaseException:
            _, graph = driver.cuStreamEndCapture(stream)
            driver.cuGraphDestroy(graph)
            raise
        return checked(driver.cuStreamEndCapture(stream)), outputs

    def _add_switch(self, condition: Condition, bodies: int) -> list[Any]:
        """The empty graphs of the bodies of a switch that what is captured now comes to."""
        driver, stream = self._driver, self._handle(self._stream)
        params = driver.CUgraphNodeParams()
        params.type = driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
        params.conditional.handle = driver.CUgraphConditionalHandle(condition.handle)
        params.conditional.type = driver.CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_SWITCH
        params.conditional.size = bodies
        params.conditional.ctx = self._context()
        _, _, graph, before, edges, count = checked(driver.cuStreamGetCaptureInfo(stream))
        node = checked(driver.cuGraphAddNode(graph, before, edges, count, params))
        flag = driver.CUstreamUpdateCaptureDependencies_flags.CU_STREAM_SET_CAPTURE_DEPENDENCIES
        checked(driver.cuStreamUpdateCaptureDependencies(stream, [node], None, 1, flag))
        return list(params.conditional.phGraph_out)[:bodies]

    @contextmanager
    def _capturing_body(self, graph: Any) -> Iterator[None]:
        driver, stream = self._driver, self._handle(self._body)
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        checked(driver.cuStreamBeginCaptureToGraph(stream, graph, None, None, 0, mode))
        try:
            yield
        except BaseException:
            driver.cuStreamEndCapture(stream)
            raise
        checked(driver.cuStreamEndCapture(stream))

    def _replay(self, graph: Any, outputs: Sequence[Tensor]) -> Work:
        driver = self._driver
        try:
            executable = checked(driver.cuGraphInstantiate(graph, 0))
        except RecordError:
            driver.cuGraphDestroy(graph)
            raise

        def replay() -> Sequence[Tensor]:
            checked(driver.cuGraphLaunch(executable, self._handle(torch.cuda.current_stream())))
            return outputs

        weakref.finalize(replay, _destroy, driver, executable, graph).atexit = False
        return replay

    def _context(self) -> Any:
        return checked(self._driver.cuCtxGetCurrent())

    def _handle(self, stream: torch.cuda.Stream) -> Any:
        return self._driver.CUstream(stream.cuda_stream)


def _destroy(driver: Any, executable: Any, graph: Any) -> None:
    driver.cuGraphExecDestroy(executable)
    driver.cuGraphDestroy(graph)
