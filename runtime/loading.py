"""From a bundle on disk to a callable transformer; all that a machine without model code needs."""

from __future__ import annotations

from pathlib import Path

from runtime import bundle
from runtime.policy import Decider
from runtime.transformer import CompiledTransformer


def load(path: str | Path, engine: str = "onnxruntime", policy: Decider | None = None) -> CompiledTransformer:
    """The compiled transformer of the bundle at `path`.

    `engine` runs its plans, "onnxruntime" or "torch"; `policy` replaces the bundle's own. Raises BundleError where
    the bundle is damaged or foreign, EngineError where the engine cannot run it here.
    """
    return CompiledTransformer(bundle.load(path), engine=engine, policy=policy)
