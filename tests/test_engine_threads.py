"""Between onnxruntime's calls torch works alone where there is little to do, and as before elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from runtime import engines


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("engine", "elements", "threads"), [("onnxruntime", 1000, 1), ("onnxruntime", 1 << 24, 2), ("torch", 1000, 2)]
)
def test_a_guard_of_few_elements_is_hosted_by_one_thread(
    two_threads: None, engine: str, elements: int, threads: int
) -> None:
    hosting = engines.make(engine).hosting
    with hosting(elements):
        assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == 2


def test_another_thread_keeps_its_own(two_threads: None) -> None:
    seen: list[int] = []

    def look() -> None:
        torch.set_num_threads(2)
        seen.append(torch.get_num_threads())

    with engines.make("onnxruntime").hosting(10):
        other = threading.Thread(target=look)
        other.start()
        other.join()
        assert torch.get_num_threads() == 1
    assert seen == [2]


def test_an_error_inside_gives_the_threads_back(two_threads: None) -> None:
    with pytest.raises(ValueError, match="inside"), engines.make("onnxruntime").hosting(10):
        raise ValueError("inside")
    assert torch.get_num_threads() == 2
