"""A tiny random-weight model and one call's inputs for every diffusion transformer of diffusers, by class name."""

from __future__ import annotations

import importlib
import pkgutil

from tests.zoo.registry import CASES, LEFT_OUT, Case

for _found in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_found.name}")

__all__ = ["CASES", "LEFT_OUT", "Case"]
