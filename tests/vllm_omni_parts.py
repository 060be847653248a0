"""Parts of an installed vLLM-Omni, read or imported without what it depends on (vLLM, and most of itself)."""

from __future__ import annotations

import ast
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

REAL = (
    "vllm_omni.diffusion.models.diffusers_adapter",
    "vllm_omni.diffusion.models.diffusers_adapter.pipeline_diffusers_adapter",
    "vllm_omni.diffusion.models.diffusers_adapter.pipeline_utils",
    "vllm_omni.diffusion.models.diffusers_adapter.quantization_utils",
    "vllm_omni.diffusion.request",
    "vllm_omni.diffusion.worker.request_batch",
)
"""Modules that are imported as they are; everything else of it, and of vLLM, is stood in for."""


@dataclass
class DiffusionOutput:
    """The field that the adapter for diffusers fills."""

    output: Any = None


class Profiled:
    """In the place of DiffusionPipelineProfilerMixin."""

    def setup_diffusion_pipeline_profiler(self, **given: Any) -> None: ...


GIVEN: dict[str, Any] = {
    "DiffusionOutput": DiffusionOutput,
    "DiffusionPipelineProfilerMixin": Profiled,
    "get_local_device": lambda: torch.device("cpu"),
    "resolve_diffusers_pipeline_class": lambda _: None,
}


def folder() -> Path | None:
    """Where it is installed; nothing of it is imported."""
    spec = importlib.machinery.PathFinder.find_spec("vllm_omni")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def parsed(name: str) -> ast.Module:
    """The file `name` of it."""
    found = folder()
    assert found is not None
    return ast.parse((found / name).read_text())


def definition(tree: ast.AST, name: str) -> Any:
    """The class or function `name` in `tree`."""
    kinds = (ast.ClassDef, ast.FunctionDef)
    return next(node for node in ast.walk(tree) if isinstance(node, kinds) and node.name == name)


def fields(tree: ast.AST, name: str) -> set[str]:
    """What the class `name` annotates."""
    targets = (node.target for node in definition(tree, name).body if isinstance(node, ast.AnnAssign))
    return {target.id for target in targets if isinstance(target, ast.Name)}


@contextmanager
def imported() -> Iterator[None]:
    """Let `REAL` be imported, among stand-ins; afterwards nothing of it is."""
    before = set(sys.modules)
    sys.meta_path.insert(0, finder := _Finder())
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in ("vllm", "vllm_omni") or name == "examples.serve.vllm_omni_pipeline":
                del sys.modules[name]


class _StandIn(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return GIVEN.get(name) or type(name, (), {})


class _Finder:
    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> Any:
        if name.partition(".")[0] not in ("vllm", "vllm_omni"):
            return None
        if name in REAL:
            found = folder()
            assert found is not None
            file = found.joinpath(*name.split(".")[1:])
            package = file.is_dir()
            place = file / "__init__.py" if package else file.with_suffix(".py")
            return importlib.util.spec_from_file_location(
                name, place, submodule_search_locations=[str(file)] if package else None
            )
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None: ...
