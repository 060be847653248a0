"""A compiled model in memory: what `bundle` writes and reads, and what the runtime runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from runtime.bundle.spec import Manifest


@dataclass(frozen=True)
class Program:
    """Manifest, one copy of the weights, the routers' state and the files of plans and glue.

    `weights` maps keys of `Block.weights` and `Glue.weights` to tensors in the layout of
    `Variant.rows`. `routers` maps ``<block index>.<parameter>`` to tensors; empty when the model
    has none. `files` maps names inside the bundle to their bytes. `folder` is the bundle that it was read from, where
    engines built for it are, and `digest` its digest there (runtime.bundle.digest); None for a program that was
    compiled in this process.
    """

    manifest: Manifest
    weights: Mapping[str, Tensor]
    routers: Mapping[str, Tensor]
    files: Mapping[str, bytes]
    folder: Path | None = None
    digest: str | None = None
