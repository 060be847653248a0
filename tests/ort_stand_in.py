"""ONNX Runtime's CUDA provider played by its CPU provider: every call is made on the library that is installed.

What the CPU build cannot do is checked and left out: the provider and its options, the arena of a GPU, and that nothing
falls back to the CPU. Streams are noted in `events`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import onnxruntime
import torch

from runtime.engines.ort_library import GPU_BUILD, open_library

CUDA = "CUDAExecutionProvider"


class Session(onnxruntime.InferenceSession):
    """A session on the CPU that says it is on the GPU."""

    opened: list[tuple[str, dict[str, str]]] = []
    events: list[str] = []
    stray = ""
    """A kind of node that the GPU is to have no kernel for."""

    def __init__(
        self, path_or_bytes: bytes, sess_options: Any = None, providers: Any = None, *, enable_fallback: bool = True
    ) -> None:
        assert not enable_fallback  # it would print, and take the CPU
        ((name, options),) = providers
        assert name == CUDA
        strict = "session.disable_cpu_ep_fallback"
        self.opened.append((_entry(sess_options, strict), options))
        if self.stray and _entry(sess_options, strict) == "1":
            raise RuntimeError("nodes that are assigned to the default CPU EP")
        sess_options.add_session_config_entry(strict, "0")
        super().__init__(path_or_bytes, sess_options, providers=["CPUExecutionProvider"])

    def get_providers(self) -> list[str]:
        assert super().get_providers() == ["CPUExecutionProvider"]
        return [CUDA, "CPUExecutionProvider"]

    def get_provider_graph_assignment_info(self) -> Any:
        found = super().get_provider_graph_assignment_info()
        for part in found:
            kinds = [node.op_type for node in part.get_nodes()]
            yield SimpleNamespace(ep_name=part.ep_name if self.stray in kinds else CUDA, get_nodes=part.get_nodes)

    def run_with_iobinding(self, iobinding: Any, run_options: Any = None) -> None:
        assert run_options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        self.events.append("run")
        super().run_with_iobinding(iobinding, run_options)


def library(needed: str) -> Any:
    """The module onnxruntime with such sessions, and an allocator that registers nothing."""

    assert needed == GPU_BUILD

    def register(provider: str, memory: Any, options: dict[str, str], arena: Any) -> None:
        assert provider == CUDA
        assert not options
        assert isinstance(memory, onnxruntime.OrtMemoryInfo)
        assert isinstance(arena, onnxruntime.OrtArenaCfg)

    names = {name: value for name, value in vars(open_library()).items() if not name.startswith("__")}
    made = {"InferenceSession": Session, "create_and_register_allocator_v2": register}
    found = SimpleNamespace(**(names | made), __version__=onnxruntime.__version__, __file__=onnxruntime.__file__)
    found.get_available_providers = lambda: [CUDA, *onnxruntime.get_available_providers()]
    return found


@contextmanager
def in_step(device: torch.device) -> Iterator[int]:
    """In place of our own stream, in step with torch's."""
    Session.events.append("torch's stream waited for")
    yield 77
    Session.events.append("torch's stream waits")


def replacements() -> dict[str, Any]:
    """What to put into runtime.engines.ort so that it runs on the CPU."""
    return {
        "open_library": library,
        "own_stream": lambda device: SimpleNamespace(cuda_stream=77, synchronize=lambda: None),
        "own_stream_in_step": in_step,
    }


def clear() -> None:
    """Forget what was done."""
    Session.opened, Session.events, Session.stray = [], [], ""


def _entry(options: Any, key: str) -> str:
    try:
        return str(options.get_session_config_entry(key))
    except RuntimeError:
        return ""
