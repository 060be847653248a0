"""From a bundle on disk to a callable transformer; all that a machine without model code needs."""

from __future__ import annotations

from pathlib import Path

from runtime.base.errors import BundleError, EngineError
from runtime.bundle import files as bundle
from runtime.engines import entry
from runtime.engines.tensorrt.cache import built
from runtime.engines.tensorrt.library import gpu_here
from runtime.face.transformer import CompiledTransformer
from runtime.routing.policy import Decider


def load(
    path: str | Path,
    engine: str | None = None,
    policy: Decider | None = None,
    dispatch: str = "host",
    tier: str | None = None,
    digest: str | None = None,
) -> CompiledTransformer:
    """The compiled transformer of the bundle at `path`.

    `engine` runs its plans (see CompiledTransformer). Without one it is what the bundle's engines were
    built with, and for a bundle that holds none the fastest here: engines of another GPU are refused rather than
    replaced by a CPU's in silence. `policy` replaces the bundle's own, or `tier` names the one of its tiers that
    decides at first. With `dispatch` "device" decisions are taken on the GPU where that can be done (see
    CompiledTransformer). `digest` (``sha256:...``, printed by `edit-compile inspect`) is that of the only bundle to
    load; engines that were built into it run where it is their digest, too (docs/security.md). Raises BundleError where
    the bundle is damaged, foreign or another, EngineError where the engine cannot run it here, EditError where it has
    no such tier.
    """
    program = bundle.load(path, digest=digest)
    chosen = engine or built_engine(Path(path))
    if chosen is not None and digest == program.digest and entry(chosen).built:
        raise BundleError(
            f"{path} runs engines of {chosen}, which its digest does not cover: give the digest with engines that "
            "`edit-compile inspect` prints, or another engine="
        )
    try:
        return CompiledTransformer(program, chosen, policy, dispatch=dispatch, tier=tier)
    except EngineError as error:
        if engine is not None:
            raise
        holds = "no engines" if chosen is None else f"engines of {chosen}"
        raise EngineError(f"{path} holds {holds}, and no engine was named. {error}") from error


def built_engine(folder: Path) -> str | None:
    """Name of the engine that the bundle's own engines are for, those for the GPU here before others; None of none."""
    here = gpu_here()
    records = sorted(
        (record.key for record in built(folder)),
        key=lambda key: (here is None or key.capability != here.capability, key.weights == "packed", key.library),
    )
    if not records:
        return None
    return records[0].library + ("-packed" if records[0].weights == "packed" else "")
