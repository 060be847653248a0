"""CUDA imitated on a CPU as far as `runtime.device.cuda_graph` goes: streams, capture, conditional nodes, launches.

Operators go to the graph that torch's current stream captures into, as on a GPU; names and signatures of the driver's
functions are checked against the real bindings elsewhere. Everything else of the driver (enums) is the real one.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from runtime.base.guard import _guard as answer_guard
from runtime.base.guard import guard
from runtime.device.recorder import Argument
from tests.emulator import call_kernel, record_operator

OK = 0


class Graph:
    """Nodes in the order of capture; `after` are those that the next has to wait for."""

    def __init__(self) -> None:
        self.nodes: list[Callable[[], None]] = []
        self.after: list[int] = []
        self.edges: list[tuple[list[int], int]] = []

    def add(self, run: Callable[[], None], after: Sequence[int]) -> int:
        self.nodes.append(run)
        self.edges.append((list(after), len(self.nodes) - 1))
        return len(self.nodes) - 1


class Stream:
    """A stream whose work is done at once; `log` is what was waited for, by all streams, in order."""

    handles = itertools.count(1)
    log: list[tuple[str, int, int]] = []

    def __init__(self, device: Any = None) -> None:
        self.cuda_stream = next(self.handles)

    def wait_stream(self, other: Stream) -> None:
        self.log.append(("stream", self.cuda_stream, other.cuda_stream))

    def wait_event(self, event: Event) -> None:
        self.log.append(("event", self.cuda_stream, event.handle))

    def synchronize(self) -> None:
        self.log.append(("host", 0, self.cuda_stream))


class Event:
    handles = itertools.count(1)

    def __init__(self) -> None:
        self.handle = next(self.handles)

    def record(self, stream: Stream) -> None:
        Stream.log.append(("record", stream.cuda_stream, self.handle))

    def synchronize(self) -> None:
        Stream.log.append(("host event", 0, self.handle))


class FakeCuda(TorchDispatchMode):
    """The driver and torch.cuda; `calls` are the names of the driver's functions called, in order."""

    def __init__(self, version: int = 13000) -> None:
        super().__init__()
        self.version = version
        self.calls: list[str] = []
        self.capturing: dict[int, Graph] = {}
        self.conditions: dict[int, ctypes.c_uint] = {}
        Stream.log.clear()
        self.current = Stream()
        self.destroyed: list[Any] = []
        self.devices = self.pools = 0
        self.launched_on: list[int] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let torch and the recorder see this instead of CUDA."""
        import cuda.bindings

        from runtime.device import cuda_graph

        monkeypatch.setattr(cuda.bindings, "driver", self, raising=False)
        monkeypatch.setattr(cuda_graph, "Kernels", lambda device: SimpleNamespace(launch=self.launch))
        fakes = {
            "Stream": Stream,
            "Event": Event,
            "MemPool": self.pool,
            "use_mem_pool": lambda pool: self.within("pools"),
            "device": lambda device: self.within("devices"),
            "stream": self.on_stream,
            "current_stream": lambda device=None: self.current,
        }
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
        monkeypatch.setattr(cuda_graph, "_lanes", {})
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    @contextmanager
    def within(self, what: str) -> Iterator[None]:
        setattr(self, what, getattr(self, what) + 1)
        try:
            yield
        finally:
            setattr(self, what, getattr(self, what) - 1)

    def pool(self) -> object:
        assert self.devices, "the pool would be another GPU's"
        return object()

    @contextmanager
    def on_stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def launch(self, kernel: str, arguments: Sequence[Argument], stream: int) -> None:
        assert self.devices, "another GPU may be current"
        assert stream == self.current.cuda_stream
        self._enqueue(stream, lambda: call_kernel(kernel, arguments))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is guard:
            with self:
                return answer_guard(*args, **kwargs or {})
        if self.current.cuda_stream not in self.capturing:
            return func(*args, **kwargs or {})
        result, run = record_operator(func, args, kwargs or {})
        self._enqueue(self.current.cuda_stream, run)
        return result

    def _enqueue(self, stream: int, run: Callable[[], None]) -> None:
        graph = self.capturing.get(stream)
        if graph is None:
            run()
        else:
            graph.after = [graph.add(run, graph.after)]

    def __getattr__(self, name: str) -> Any:
        import importlib

        return getattr(importlib.import_module("cuda.bindings.driver"), name)

    CUstream = staticmethod(int)
    CUgraphConditionalHandle = staticmethod(int)

    def CUgraphNodeParams(self) -> Any:
        return SimpleNamespace(type=None, conditional=SimpleNamespace(phGraph_out=[]))

    def cuDriverGetVersion(self) -> tuple[int, int]:
        return OK, self.version

    def cuCtxGetCurrent(self) -> tuple[int, str]:
        return OK, "context"

    def cuStreamBeginCapture(self, hStream: int, mode: Any) -> tuple[int]:
        assert "RELAXED" in mode.name
        return self._begin(hStream, Graph(), "cuStreamBeginCapture")

    def cuStreamBeginCaptureToGraph(
        self, hStream: int, hGraph: Graph, dependencies: None, dependencyData: None, numDependencies: int, mode: Any
    ) -> tuple[int]:
        assert "RELAXED" in mode.name
        return self._begin(hStream, hGraph, "cuStreamBeginCaptureToGraph")

    def _begin(self, stream: int, graph: Graph, name: str) -> tuple[int]:
        assert stream not in self.capturing, "the stream is capturing already"
        assert self.pools and self.devices, "memory of the graph would be anybody's"
        self.calls.append(name)
        self.capturing[stream] = graph
        return (OK,)

    def cuStreamEndCapture(self, hStream: int) -> tuple[int, Graph]:
        self.calls.append("cuStreamEndCapture")
        return OK, self.capturing.pop(hStream)

    def cuStreamGetCaptureInfo(self, hStream: int) -> tuple[Any, ...]:
        graph = self.capturing[hStream]
        return OK, 1, 7, graph, list(graph.after), None, len(graph.after)

    def cuGraphConditionalHandleCreate(
        self, hGraph: Graph, ctx: str, defaultLaunchValue: int, flags: int
    ) -> tuple[int, int]:
        assert ctx == "context"
        value = ctypes.c_uint(99)
        self.conditions[ctypes.addressof(value)] = value
        return OK, ctypes.addressof(value)

    def cuGraphAddNode(
        self, hGraph: Graph, dependencies: list[int], dependencyData: None, numDependencies: int, nodeParams: Any
    ) -> tuple[int, int]:
        assert numDependencies == len(dependencies)
        self.calls.append("cuGraphAddNode")
        given = nodeParams.conditional
        assert given.ctx == "context"
        assert (nodeParams.type.name, given.type.name) == (
            "CU_GRAPH_NODE_TYPE_CONDITIONAL",
            "CU_GRAPH_COND_TYPE_SWITCH",
        )
        given.phGraph_out = [Graph() for _ in range(given.size)]

        def run() -> None:
            chosen = self.conditions[given.handle].value
            for each in given.phGraph_out[chosen].nodes if chosen < given.size else []:
                each()

        return OK, hGraph.add(run, dependencies)

    def cuStreamUpdateCaptureDependencies(
        self, hStream: int, dependencies: list[int], dependencyData: None, numDependencies: int, flags: Any
    ) -> tuple[int]:
        assert "SET" in flags.name
        self.capturing[hStream].after = list(dependencies)
        return (OK,)

    def cuGraphInstantiate(self, hGraph: Graph, flags: int) -> tuple[int, Graph]:
        for before, node in hGraph.edges:  # one after another: nothing may overtake
            assert before == ([node - 1] if node else [])
        return OK, hGraph

    def cuGraphLaunch(self, hGraphExec: Graph, hStream: int) -> tuple[int]:
        self.calls.append("cuGraphLaunch")
        assert self.devices and hStream == self.current.cuda_stream
        self.launched_on.append(len(Stream.log))
        for node in hGraphExec.nodes:
            node()
        return (OK,)

    def cuGraphExecDestroy(self, hGraphExec: Graph) -> tuple[int]:
        self.destroyed.append(hGraphExec)
        return (OK,)

    def cuGraphDestroy(self, hGraph: Graph) -> tuple[int]:
        return (OK,)
