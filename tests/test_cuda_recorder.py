"""The recorder for CUDA, with a driver that is imitated: what it captures, in which order, and what replays give."""

from __future__ import annotations

import ast
import ctypes
import gc
import inspect
import re
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from runtime.base.errors import RecordError
from runtime.device import cuda_graph, kernels, runner
from runtime.device.reader import Reading
from runtime.device.recorder import Condition
from runtime.engines import pytorch
from runtime.face.transformer import CompiledTransformer
from runtime.requests.trace import COMPUTED, REUSED, SKIPPED
from runtime.routing.policy import RoutingPolicy
from tests import programs
from tests.fake_driver import FakeCuda, Stream
from tests.test_transformer_requests import call

driver = pytest.importorskip("cuda.bindings.driver")
KINDS = ("double", "single", "double")
POLICY = RoutingPolicy(threshold=0.35, margin=0.4, max_reuse=2)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    monkeypatch.setattr(runner, "recorder_for", cuda_graph.CudaRecorder)
    monkeypatch.setattr(runner, "absent", lambda device: None)
    return cuda


@pytest.mark.parametrize("rows", [1, 3])
def test_replays_give_what_the_host_gives(fake: FakeCuda, rows: int) -> None:
    program = programs.make(KINDS, seed=3)
    host = CompiledTransformer(program, "torch", POLICY)
    device = CompiledTransformer(program, "torch", POLICY, dispatch="device")
    for step in range(8):
        for context in ("cond", "uncond"):
            with host.request("one"), host.cache_context(context):
                expected = call(host, 1 - step / 8, seed=step, rows=rows)
            with device.request("one"), device.cache_context(context), fake:
                got = call(device, 1 - step / 8, seed=step, rows=rows)
            torch.testing.assert_close(got, expected)
    assert (device.dispatch, device.dispatch_note) == ("device", None)
    for name, column in host.trace[0].arrays().items():
        np.testing.assert_allclose(device.trace[0].arrays()[name], column)
    assert set(host.trace[0].arrays()["done"]) >= {SKIPPED, COMPUTED} | ({REUSED} if rows > 1 else set())
    assert len(host.trace) == len(device.trace) == 1
    assert fake.calls.count("cuGraphLaunch") == 16
    assert fake.calls.count("cuGraphAddNode") == 2 * len(KINDS) * rows  # one switch for each row of each guard
    bodies = 1 + len(programs.WIDTHS)
    assert fake.calls.count("cuStreamBeginCaptureToGraph") == 2 * len(KINDS) * rows * bodies
    assert not fake.capturing
    mine, (lane,) = fake.current.cuda_stream, cuda_graph._lanes.values()
    for (
        at
    ) in fake.launched_on:  # each call waits for those before, on the stream it is called on, and says when it ends
        waits = [entry for entry in Stream.log[:at] if entry[0] == "event"]
        assert waits[-1] == ("event", mine, lane.last.handle)
    assert Stream.log.count(("record", mine, lane.last.handle)) == 16
    assert not lane.turns.locked()


def test_a_call_has_its_turn_while_it_is_enqueued(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[bool] = []
    launch = FakeCuda.cuGraphLaunch

    def noting(self, hGraphExec, hStream):
        held.append(next(iter(cuda_graph._lanes.values())).turns.locked())
        return launch(self, hGraphExec, hStream)

    monkeypatch.setattr(FakeCuda, "cuGraphLaunch", noting)
    device = CompiledTransformer(programs.make(KINDS, seed=3), "torch", POLICY, dispatch="device")
    with fake:
        call(device, 1.0)
    assert held == [True]


def test_a_reading_is_there_when_its_event_says_so() -> None:
    waited: list[str] = []
    event = SimpleNamespace(query=lambda: bool(waited), synchronize=lambda: waited.append("host"))
    reading = Reading(torch.zeros(1), event, None, None, None, None, None)  # type: ignore[arg-type]
    assert not reading.arrived()
    reading.wait()
    assert reading.arrived()


def test_warming_up_is_over_before_it_is_captured(fake: FakeCuda) -> None:
    device = CompiledTransformer(programs.make(KINDS, seed=3), "torch", POLICY, dispatch="device")
    with fake:
        call(device, 1.0)
    (lane,) = cuda_graph._lanes.values()
    main, body, mine = lane.stream.cuda_stream, lane.body.cuda_stream, fake.current.cuda_stream
    switches = [("stream", body, main), ("stream", main, body)] * len(KINDS)
    log = [entry for entry in Stream.log if entry[0] in ("stream", "host")]
    assert log == [("stream", main, mine), *switches, ("host", 0, main)]


def test_what_cannot_be_captured_leaves_no_capture_open(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[bool] = []

    def fails(graph, name, weights, inputs):
        runs.append(torch.cuda.current_stream().cuda_stream in fake.capturing)
        if runs[-1]:
            raise RuntimeError("operation not permitted when stream is capturing")
        return list(graph(*weights, *inputs))

    device = CompiledTransformer(programs.make(KINDS, seed=3), "torch", POLICY, dispatch="device")
    monkeypatch.setattr(pytorch, "_run", fails)
    with fake:
        sample = call(device, 1.0)
    assert runs[0] is False and runs.index(True) == len(KINDS) * len(programs.WIDTHS)  # it was warmed up first
    assert "not permitted" in device.dispatch_note
    assert not fake.capturing
    torch.testing.assert_close(sample, call(CompiledTransformer(programs.make(KINDS, seed=3), "torch", POLICY), 1.0))


def test_graphs_are_destroyed_with_their_transformer(fake: FakeCuda) -> None:
    device = CompiledTransformer(programs.make(KINDS, seed=3), "torch", POLICY, dispatch="device")
    with fake:
        call(device, 1.0)
    assert not fake.destroyed
    del device
    gc.collect()
    assert len(fake.destroyed) == 1


def test_an_old_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(version=12040).install(monkeypatch)
    with pytest.raises(RecordError, match=r"CUDA 12\.4.*need 12\.8"):
        cuda_graph.CudaRecorder(torch.device("cpu"))


def test_arguments_are_packed_by_their_kind() -> None:
    tensor = torch.zeros(3)
    packed = [kernels._plain(given) for given in (Condition(2**40), tensor, None, 7)]
    assert packed == [
        (2**40, ctypes.c_ulonglong),
        (tensor.data_ptr(), ctypes.c_void_p),
        (0, ctypes.c_void_p),
        (7, ctypes.c_int),
    ]


def test_kernels_are_loaded_and_launched_by_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    import cuda.bindings

    launched = []
    stand_in = SimpleNamespace(
        CUstream=int,
        cuModuleLoadData=lambda cubin: (0, cubin[:4]),
        cuModuleGetFunction=lambda module, name: (0, (module, name)),
        cuLaunchKernel=lambda *given: launched.append(given) or (0,),
    )
    monkeypatch.setattr(cuda.bindings, "driver", stand_in)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    kernels.Kernels(torch.device("cuda", 0)).launch("decide", (Condition(5), 1), 77)
    arguments = ((5, 1), (ctypes.c_ulonglong, ctypes.c_int))
    assert launched == [((b"\x7fELF", b"decide"), 1, 1, 1, 1, 1, 1, 0, 77, arguments, 0)]


def test_a_failing_call_is_named() -> None:
    with pytest.raises(RecordError, match=r"CUDA_ERROR_INVALID_VALUE \(test_a_failing_call_is_named, line"):
        kernels.checked((driver.CUresult.CUDA_ERROR_INVALID_VALUE,))
    assert kernels.checked((driver.CUresult.CUDA_SUCCESS, 1)) == 1
    assert kernels.checked((driver.CUresult.CUDA_SUCCESS, 1, 2)) == [1, 2]


@pytest.mark.parametrize("architecture", ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_the_kernels_compile_without_a_gpu(architecture: str) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    cubin = kernels.compile_source(architecture)
    assert cubin[:4] == b"\x7fELF"
    assert all(name.encode() in cubin for name in (*kernels.KERNELS, "cudaGraphSetConditional"))


def test_what_does_not_compile_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecordError, match="invalid value for --gpu-architecture"):
        kernels.compile_source("sm_1")


def _uses(module) -> list[str]:
    """Names that `module` takes from the driver's bindings, "CUgraphNodeParams.conditional.handle" among them."""
    names = []
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Attribute) and (
            found := re.match(r"(?:self\._)?(driver|nvrtc|params)\.([\w.]+)$", ast.unparse(node))
        ):
            names.append(f"CUgraphNodeParams.{found[2]}" if found[1] == "params" else found[2])
    return names


def _is_there(name: str) -> bool:
    """Whether the real bindings have `name`, a path of attributes."""
    from cuda.bindings import nvrtc

    first, *rest = name.split(".")
    found = getattr(driver, first, None) or getattr(nvrtc, first, None)
    if found is not None and first == "CUgraphNodeParams":
        found = found()
    for part in rest:
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return found is not None


def test_every_name_of_the_driver_is_there() -> None:
    names = {name for module in (cuda_graph, kernels) for name in _uses(module)}
    assert len(names) > 20
    assert [name for name in names if not _is_there(name)] == []
    for name in names:  # the check notices what is misspelt
        assert not _is_there(f"{name}x") and not _is_there(f"{name[:-1]}")


def _parameters(name: str) -> list[str]:
    """Parameters of a function of the bindings, from the first line of its documentation."""
    line = (getattr(driver, name).__doc__ or "").splitlines()[0]
    inside = re.sub(r"\[[^\[\]]*(\[[^\]]*\][^\[\]]*)*\]", "", line[line.index("(") + 1 : line.rindex(")")])
    return [part.split(":")[0].split()[-1] for part in inside.split(",") if part.strip()]


def test_the_imitated_functions_take_what_the_real_ones_take() -> None:
    imitated = [name for name in vars(FakeCuda) if re.match(r"cu[A-Z]", name)]
    assert len(imitated) > 10
    for name in imitated:
        mine = [parameter for parameter in inspect.signature(getattr(FakeCuda, name)).parameters if parameter != "self"]
        assert mine == _parameters(name), name
