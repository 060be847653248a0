"""What the engine tells TensorRT to do, on a stand-in that does it on the CPU; the GPU's part is not tested here."""

from __future__ import annotations

import ctypes
import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import runtime.engines.tensorrt.run as engine_module
from runtime import engines
from runtime.base.errors import EngineError
from runtime.engines.tensorrt.jobs import profiles_of
from tests import programs
from tests.test_engine_plans import inputs, weights

NAMES = (*programs.DOUBLE.weights, *(given.name for given in programs.DOUBLE.inputs), "state_0", "state_1")


def at(address: int, shape: tuple[int, ...]) -> Tensor:
    """The float32 numbers at an address."""
    count = torch.Size(shape).numel()
    return torch.frombuffer((ctypes.c_float * count).from_address(address), dtype=torch.float32).reshape(shape)


class Context:
    """An execution context of the double plan that computes when it is told to."""

    active_optimization_profile = 0

    def __init__(self, weights: list[Tensor]) -> None:
        self.weights, self.addresses, self.shapes = weights, {}, {}
        self.memory = (0, 0)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        self.memory = memory, size

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert self.memory[1] >= 1000
        own = [
            at(self.addresses[n], tuple(w.shape)) for n, w in zip(programs.DOUBLE.weights, self.weights, strict=True)
        ]
        given = [at(self.addresses[one.name], self.shapes[one.name]) for one in programs.DOUBLE.inputs]
        for index, state in enumerate(programs.Double()(*own, *given)):
            at(self.addresses[f"state_{index}"], tuple(state.shape)).copy_(state)
        return True


@contextmanager
def on_the_cpu(device: torch.device) -> Iterator[int]:
    yield 1


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(engine_module, "enqueueing", on_the_cpu)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    own = weights(programs.H)
    engine = SimpleNamespace(
        num_io_tensors=len(NAMES),
        get_tensor_name=NAMES.__getitem__,
        device_memory_size_v2=1000,
        create_execution_context=lambda strategy: Context(own),
    )
    api = SimpleNamespace(ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED=2))
    owner: Any = SimpleNamespace(name="tensorrt", library=SimpleNamespace(api=api))
    return engine_module._Bound(owner, engine, profiles_of(programs.DOUBLE), programs.DOUBLE, own)  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [1, 3])
def test_addresses_and_shapes_are_those_of_the_callers_tensors(bound: Any, rows: int) -> None:
    given = inputs(rows)
    given[0] = given[0].transpose(1, 2).contiguous().transpose(1, 2)
    for _ in range(2):
        for got, want in zip(bound(given), programs.Double()(*weights(programs.H), *given), strict=True):
            torch.testing.assert_close(got, want)


def test_results_are_new_each_time(bound: Any) -> None:
    first = bound(inputs(2))
    kept = [state.clone() for state in first]
    bound([tensor * 2 for tensor in inputs(2)])
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


def test_more_rows_than_were_built_for_are_refused(bound: Any) -> None:
    with pytest.raises(EngineError, match=r"built for up to.*--max-batch"):
        bound(inputs(5))


def test_a_plan_that_is_not_enqueued_is_an_error(bound: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Context, "execute_async_v3", lambda self, stream_handle: False)
    with pytest.raises(EngineError, match="could not enqueue plan double"):
        bound(inputs(1))


def test_one_scratch_serves_all_and_grows_to_the_hungriest() -> None:
    device = torch.device("cpu")
    first = engine_module._memory(device, 77, 1000)
    assert engine_module._memory(device, 77, 900) is first
    assert engine_module._memory(device, 77, 2000).numel() == 2000
    assert engine_module._memory(device, 78, 10) is not first


def test_a_scratch_in_a_recorded_step_outlives_a_larger_one() -> None:
    device = torch.device("cpu")
    first = weakref.ref(engine_module._memory(device, 79, 1000))
    recorded = weakref.ref(engine_module._memory(device, 79, 2000, recorded=True))
    engine_module._memory(device, 79, 3000)
    gc.collect()
    assert first() is None and recorded() is not None


@pytest.mark.parametrize(("name", "moved"), [("tensorrt", 13), ("tensorrt-packed", 3), ("torch", 0)])
def test_weights_go_to_the_gpu_unless_engines_hold_them(name: str, moved: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = programs.make()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(Tensor, "cuda", lambda self: self.to("meta"))
    program = engines.placed(name, made)
    assert sum(weight.is_meta for weight in program.weights.values()) == moved
    assert all(weight.is_meta for weight in program.routers.values()) == (name != "torch")
