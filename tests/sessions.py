"""ONNX Runtime sessions for tests, in the process-wide thread pool that the runtime sets up."""

from __future__ import annotations

import onnxruntime

from runtime import engines


def open_session(model: bytes) -> onnxruntime.InferenceSession:
    """A session on the CPU; a session with threads of its own would be refused once the runtime has been used."""
    engines.make("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
