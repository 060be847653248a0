"""Elastic diffusion transformers, compiled: routers on every block, engines at several MLP widths.

    elastic = edit_compile.elasticize(transformer)       # trains like any nn.Module
    compiled = edit_compile.compile(elastic)             # drop-in for the pipeline's transformer

Names are imported when first used, so that a process that only loads and runs a bundle never imports the compiler.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edit_compile.calls.generations import CallsError as CallsError
    from edit_compile.calls.generations import Generation as Generation
    from edit_compile.calls.generations import RecordedCall as RecordedCall
    from edit_compile.calls.generations import Recording as Recording
    from edit_compile.calls.place import latents_of as latents_of
    from edit_compile.calls.recorder import Recorder as Recorder
    from edit_compile.calls.recorder import record as record
    from edit_compile.calls.replaying import Replayed as Replayed
    from edit_compile.calls.replaying import replay as replay
    from edit_compile.calls.result_quality import mean_quality as mean_quality
    from edit_compile.calls.result_quality import quality as quality
    from edit_compile.calls.sampler import Sampler as Sampler
    from edit_compile.compiling.compiler import CompileError as CompileError
    from edit_compile.compiling.compiler import compile as compile
    from edit_compile.compiling.dry_run import DryRun as DryRun
    from edit_compile.elastic.layout import PASSES as PASSES
    from edit_compile.elastic.layout import ElasticError as ElasticError
    from edit_compile.elastic.storage import load_elastic as load_elastic
    from edit_compile.elastic.transformer import ElasticTransformer as ElasticTransformer
    from edit_compile.elastic.transformer import elasticize as elasticize
    from edit_compile.measuring.benchmarking import benchmark as benchmark
    from edit_compile.training.distil import distil as distil
    from edit_compile.training.distil_task import Distillation as Distillation
    from edit_compile.training.losses import Budget as Budget
    from edit_compile.training.train import TrainConfig as TrainConfig
    from edit_compile.tuning.frozen import Frozen as Frozen
    from edit_compile.tuning.frozen import freeze as freeze
    from edit_compile.tuning.tune import tune as tune
    from edit_compile.tuning.tuned import Tuned as Tuned
    from edit_compile.widths.channel_order import order_channels as order_channels
    from edit_compile.widths.ordered_mlp import OrderedMlp as OrderedMlp
    from edit_compile.widths.ordered_mlp import OrderError as OrderError
    from passes.observe.statement import BlockStatement as BlockStatement
    from passes.observe.statement import StatementError as StatementError
    from runtime.base.errors import BundleError as BundleError
    from runtime.base.errors import EditError as EditError
    from runtime.base.errors import EngineError as EngineError
    from runtime.base.errors import InputError as InputError
    from runtime.base.errors import PolicyError as PolicyError
    from runtime.base.errors import ShapeError as ShapeError
    from runtime.bundle.files import bundle_digest as bundle_digest
    from runtime.bundle.spec import RouterConfig as RouterConfig
    from runtime.bundle.tiers import Tier as Tier
    from runtime.face.load import load as load
    from runtime.face.transformer import CompiledTransformer as CompiledTransformer
    from runtime.routing.branched import BranchedPolicy as BranchedPolicy
    from runtime.routing.policy import RoutingPolicy as RoutingPolicy
    from runtime.routing.reuse import ReusePolicy as ReusePolicy
    from runtime.routing.schedule import ScheduledPolicy as ScheduledPolicy

_HOMES = {
    "edit_compile.measuring.benchmarking": ("benchmark",),
    "edit_compile.calls.generations": ("CallsError", "Generation", "RecordedCall", "Recording"),
    "edit_compile.widths.channel_order": ("order_channels",),
    "edit_compile.compiling.compiler": ("CompileError", "compile"),
    "edit_compile.compiling.dry_run": ("DryRun",),
    "edit_compile.elastic.transformer": ("ElasticTransformer", "elasticize"),
    "edit_compile.elastic.layout": ("PASSES", "ElasticError"),
    "edit_compile.widths.ordered_mlp": ("OrderError", "OrderedMlp"),
    "edit_compile.calls.place": ("latents_of",),
    "edit_compile.calls.recorder": ("Recorder", "record"),
    "edit_compile.calls.replaying": ("Replayed", "replay"),
    "edit_compile.calls.result_quality": ("mean_quality", "quality"),
    "edit_compile.calls.sampler": ("Sampler",),
    "edit_compile.elastic.storage": ("load_elastic",),
    "edit_compile.training.distil": ("distil",),
    "edit_compile.training.distil_task": ("Distillation",),
    "edit_compile.training.losses": ("Budget",),
    "edit_compile.training.train": ("TrainConfig",),
    "edit_compile.tuning.frozen": ("Frozen", "freeze"),
    "edit_compile.tuning.tune": ("tune",),
    "edit_compile.tuning.tuned": ("Tuned",),
    "passes.observe.statement": ("BlockStatement", "StatementError"),
    "runtime.base.errors": ("BundleError", "EditError", "EngineError", "InputError", "PolicyError", "ShapeError"),
    "runtime.bundle.files": ("bundle_digest",),
    "runtime.face.load": ("load",),
    "runtime.routing.branched": ("BranchedPolicy",),
    "runtime.routing.policy": ("RoutingPolicy",),
    "runtime.routing.reuse": ("ReusePolicy",),
    "runtime.routing.schedule": ("ScheduledPolicy",),
    "runtime.bundle.spec": ("RouterConfig",),
    "runtime.bundle.tiers": ("Tier",),
    "runtime.face.transformer": ("CompiledTransformer",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"edit_compile has no {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *_HOME_OF]


def _check_siblings() -> None:
    """`passes` and `runtime` are common names: make sure that the ones found are this package's own."""
    home = Path(__file__).resolve().parent.parent
    for name in ("passes", "runtime"):
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve().parent if spec is not None and spec.origin else None
        if found is None and not (home / name).is_dir():
            continue
        if found != home / name:
            raise ImportError(
                f"edit_compile needs its own package {name!r} in {home}, but Python found {found} first: "
                "rename or move that folder, or take it off sys.path"
            )


_check_siblings()
