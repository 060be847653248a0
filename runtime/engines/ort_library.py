"""ONNX Runtime's module: which build is installed, its process-wide parts, and why its CUDA provider does not load.

All sessions of the process share one thread pool (of as many threads as torch has when the first is opened) and one CPU
arena: sessions with pools of their own fight over the cores, and sessions with arenas of their own each keep their
largest scratch. The pool is told to sleep between calls: a pool that spins takes its cores from torch. Sessions on a
GPU share an arena there. Unverified: no GPU has run that; what is said where libraries are missing was tried.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import threading
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from runtime.base.errors import EngineError

CPU_BUILD, GPU_BUILD = "onnxruntime", "onnxruntime-gpu"
"""Names of the packages; both install the module onnxruntime."""

CUDA = "CUDAExecutionProvider"
_SAME_AS_REQUESTED = 1
_FOLDED = 64 << 20
"""Bytes of what a graph computes from numbers of its own, to be computed as a session is opened."""

_lock = threading.Lock()
_library: Any = None
_arenas: set[int] = set()


def open_library(needed: str = "") -> Any:
    """The onnxruntime module, its thread pool and arena set up once per process.

    EngineError where it is not installed, where both builds are, or where the build is not the one `needed`.
    """
    global _library
    with _lock:
        _check_installed(needed)
        if _library is None:
            try:
                import onnxruntime
                import threadpoolctl  # noqa: F401  which the engine uses
            except ImportError as error:
                raise EngineError(f"onnxruntime cannot be loaded ({error}): pip install '.[cpu]'") from error
            # fails where the application has already made the pool: then it is used as it is
            with contextlib.suppress(Exception):
                onnxruntime.set_global_thread_pool_sizes(torch.get_num_threads(), 1)
            kind = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR
            arena = onnxruntime.OrtMemoryInfo("Cpu", kind, 0, onnxruntime.OrtMemType.DEFAULT)
            onnxruntime.create_and_register_allocator(arena, None)
            _library = onnxruntime
        if needed == GPU_BUILD and CUDA not in _library.get_available_providers():
            raise EngineError(f"onnxruntime {_library.__version__} was built without CUDA: pip install '.[gpu]'")
        return _library


def session_options(ort: Any) -> Any:
    """Options of a session in the shared pool and arena, with every optimisation."""
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # what was checked is ONNX: onnxruntime would take bytes that are also of its own format for that
    options.add_session_config_entry("session.load_model_format", "ONNX")
    options.add_session_config_entry("optimization.constant_folding_max_output_size_in_bytes", str(_FOLDED))
    return options


def share_arena(ort: Any, index: int) -> None:
    """Let all sessions on GPU `index` have their scratch in one arena, once per process; this loads the provider.

    EngineError where the provider does not load.
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
            try:
                _register_arena(ort, index)
            except Exception as error:
                if "not available" in str(error):
                    raise EngineError(provider_missing(ort)) from error
                # as where the application has registered one: sessions then take that, or one each
                warnings.warn(f"onnxruntime does not take our arena for GPU {index}: {error}", stacklevel=2)
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
    memory = ort.OrtMemoryInfo("Cuda", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, index, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator_v2(CUDA, memory, {}, ort.OrtArenaCfg(0, _SAME_AS_REQUESTED, -1, -1))


def _check_installed(needed: str) -> None:
    found = [name for name in (CPU_BUILD, GPU_BUILD) if _installed(name)]
    extra = "gpu" if needed == GPU_BUILD else "cpu"
    if len(found) == 2:
        raise EngineError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files: "
            f"uninstall both, then pip install '.[{extra}]'"
        )
    if not found:
        raise EngineError(f"{needed or CPU_BUILD} is not installed: pip install '.[{extra}]', or use engine='torch'")
    if needed and needed not in found:
        raise EngineError(
            f"{found[0]} is installed, which does not run on a GPU: pip uninstall {found[0]}, then pip install "
            f"'.[{extra}]', or use engine='torch'"
        )


def _installed(name: str) -> bool:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return bool(metadata.version(name))
    return False
