"""The order in which streams wait for each other, on streams that only tell what they are asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from runtime.engines import streams

DEVICE = torch.device("cuda", 0)
events: list[str] = []


class Stream:
    def __init__(self, name: str, handle: int) -> None:
        self.name, self.cuda_stream = name, handle

    def wait_stream(self, other: Stream) -> None:
        events.append(f"{self.name} waits for {other.name}")


@pytest.fixture(autouse=True)
def cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    events.clear()
    state = SimpleNamespace(current=Stream("torch's", 0), made=0)

    def made(device: torch.device) -> Stream:
        assert device == DEVICE
        state.made += 1
        return Stream("ours", 9)

    monkeypatch.setattr(streams, "_own", {})
    monkeypatch.setattr(torch.cuda, "Stream", made)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: state.current)

    @contextmanager
    def current(device: torch.device) -> Iterator[None]:
        events.append(f"on {device}")
        yield
        events.append("back")

    monkeypatch.setattr(torch.cuda, "device", current)
    return state


def test_on_the_default_stream_ours_is_in_step_with_it(cuda: SimpleNamespace) -> None:
    for _ in range(2):
        with streams.enqueueing(DEVICE) as handle:
            assert handle == 9
            events.append("work")
    assert events == ["on cuda:0", "ours waits for torch's", "work", "torch's waits for ours", "back"] * 2
    assert cuda.made == 1


def test_another_stream_of_torch_is_used_itself(cuda: SimpleNamespace) -> None:
    cuda.current = Stream("torch's", 5)
    with streams.enqueueing(DEVICE) as handle:
        assert handle == 5
    assert events == ["on cuda:0", "back"]


def test_our_own_stream_is_in_step_with_any(cuda: SimpleNamespace) -> None:
    cuda.current = Stream("another", 5)
    with streams.own_stream_in_step(DEVICE) as handle:
        assert handle == streams.own_stream(DEVICE).cuda_stream == 9
    assert events == ["on cuda:0", "ours waits for another", "another waits for ours", "back"]


def test_after_an_error_what_was_enqueued_is_still_waited_for(cuda: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="inside"), streams.own_stream_in_step(DEVICE):
        raise ValueError("inside")
    assert events[-1] == "torch's waits for ours"
