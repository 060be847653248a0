"""ONNX Runtime's GPU build: its CUDA provider loaded, or what keeps it from that.

Unverified: no GPU has run anything in this file; what it says where libraries are missing was tried without one.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import threading
import warnings
from pathlib import Path
from typing import Any

import torch

from runtime.base.errors import EngineError
from runtime.engines.ort_library import CUDA, GPU_BUILD, open_library

_SAME_AS_REQUESTED = 1
_arenas: set[int] = set()
_lock = threading.Lock()


def open_cuda_library() -> Any:
    """The onnxruntime module of the GPU build; EngineError, saying how to get it, where it is not what is installed."""
    ort = open_library(GPU_BUILD)
    if CUDA not in ort.get_available_providers():
        raise EngineError(f"onnxruntime {ort.__version__} was built without CUDA: pip install '.[gpu]'")
    return ort


def share_arena(ort: Any, index: int) -> None:
    """Let all sessions on GPU `index` have their scratch in one arena; this loads the provider.

    Once per process. EngineError where the provider does not load.
    """
    with _lock:
        if index in _arenas:
            return
        try:
            _register_arena(ort, index)
        except Exception:
            # torch has loaded the libraries of its own CUDA; those of another may lie among Python's packages
            with contextlib.redirect_stdout(io.StringIO()):
                ort.preload_dlls()
            _register_arena_or_say_why(ort, index)
        _arenas.add(index)


def provider_missing(ort: Any) -> str:
    """Why the CUDA provider does not load, in the words of the linker that ONNX Runtime writes to its log.

    To be asked after ONNX Runtime has tried: the provider must not be loaded before that.
    """
    library = Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    try:
        ctypes.CDLL(str(library))
        why = "its own log has the reason"
    except OSError as error:
        why = str(error)
    return (
        f"onnxruntime-gpu {ort.__version__} cannot load its CUDA provider ({why}): it was built for CUDA "
        f"{ort.cuda_version or 'unknown'} and cuDNN 9, torch {torch.__version__} for CUDA "
        f"{torch.version.cuda or 'none'}; install a torch of that CUDA, or pip install 'onnxruntime-gpu[cuda,cudnn]'"
    )


def _register_arena(ort: Any, index: int) -> None:
    kind = ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR
    memory = ort.OrtMemoryInfo("Cuda", kind, index, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator_v2(CUDA, memory, {}, ort.OrtArenaCfg(0, _SAME_AS_REQUESTED, -1, -1))


def _register_arena_or_say_why(ort: Any, index: int) -> None:
    try:
        _register_arena(ort, index)
    except Exception as error:
        if "not available" in str(error):
            raise EngineError(provider_missing(ort)) from error
        # as where the application has registered one: sessions then take that, or one each
        warnings.warn(f"onnxruntime does not take our arena for GPU {index}: {error}", stacklevel=2)
