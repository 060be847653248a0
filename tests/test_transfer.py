"""What goes to the host and how, with the GPU's events and pinned memory played on the CPU."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from runtime.base import transfer
from runtime.face.transformer import CompiledTransformer
from runtime.requests.trace import COMPUTED, REUSED, SKIPPED
from runtime.routing.policy import RoutingPolicy
from tests import programs

done: list[object] = []
real_pinned = transfer._pinned


class Remote(Tensor):
    """A tensor that says it is on a GPU."""

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def tolist(self) -> list[object]:
        raise AssertionError("read where it lies")


class Host(Tensor):
    """Pinned memory."""

    def copy_(self, source: Tensor, non_blocking: bool = False) -> Tensor:
        done.append(("copy", non_blocking))
        return super().copy_(source.as_subclass(Tensor))

    def tolist(self) -> list[object]:
        done.append("read")
        return self.as_subclass(Tensor).tolist()


class Event:
    def record(self, stream: object) -> None:
        done.append(("record", stream))

    def synchronize(self) -> None:
        done.append("wait")


def pinned(like: Tensor) -> Tensor:
    """The real one, of memory that is not."""
    with pytest.MonkeyPatch.context() as patch:
        empty = torch.empty
        patch.setattr(torch, "empty", lambda *args, pin_memory, **kwargs: empty(*args, **kwargs))
        return real_pinned(like).as_subclass(Host)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    done.clear()
    monkeypatch.setattr(transfer, "_kept", threading.local())
    monkeypatch.setattr(transfer, "_pinned", pinned)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "torch's")


def test_on_a_cpu_it_is_read_where_it_lies() -> None:
    assert transfer.to_host(torch.tensor([[1.0, 2.0]])) == [[1.0, 2.0]]
    assert not done


def test_from_a_gpu_it_is_one_copy_and_a_wait_for_it() -> None:
    assert transfer.to_host(torch.tensor([[1.0, 2.0]]).as_subclass(Remote)) == [[1.0, 2.0]]
    assert done == [("copy", True), ("record", "torch's"), "wait", "read"]


def test_the_pinned_memory_is_used_again_by_its_thread_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.Size] = []
    pinned = transfer._pinned
    monkeypatch.setattr(transfer, "_pinned", lambda like: made.append(like.shape) or pinned(like))

    def read() -> None:
        for rows in (1, 3, 1, 3):
            numbers = torch.rand(rows, 5)
            assert transfer.to_host(numbers.as_subclass(Remote)) == numbers.tolist()

    read()
    assert made == [(1, 5), (3, 5)]
    other = threading.Thread(target=read)
    other.start()
    other.join()
    assert len(made) == 4


def test_what_is_kept_in_inference_mode_serves_outside_of_it() -> None:
    transfer.row_index.cache_clear()
    with torch.inference_mode():
        transfer.to_host(torch.rand(2, 5).as_subclass(Remote))
        assert not transfer.row_index((1,), torch.device("cpu")).is_inference()
    numbers = torch.rand(2, 5)
    assert transfer.to_host(numbers.as_subclass(Remote)) == numbers.tolist()


def test_row_numbers_are_made_once_for_each_device() -> None:
    cpu = torch.device("cpu")
    assert transfer.row_index((0, 2), cpu).tolist() == [0, 2]
    assert transfer.row_index((0, 2), cpu) is transfer.row_index((0, 2), cpu)
    assert transfer.row_index((0, 2), torch.device("meta")).is_meta


def test_a_regrouping_that_was_seen_before_makes_no_row_numbers() -> None:
    program = programs.make(("double", "single"), seed=3)
    compiled = CompiledTransformer(program, "torch", RoutingPolicy(threshold=0.35, margin=0.4, max_reuse=2))
    transfer.row_index.cache_clear()
    for _ in range(2):
        made = transfer.row_index.cache_info().misses
        with compiled.request(), compiled.cache_context("any prompt"):
            for step in range(6):
                compiled(**programs.inputs(4, seed=step, timestep=1 - step / 6))
        assert set(compiled.trace[-1].arrays()["done"]) == {SKIPPED, REUSED, COMPUTED}
    assert transfer.row_index.cache_info().misses == made
    assert transfer.row_index.cache_info().hits > 0
