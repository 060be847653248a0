"""DBCache and DBPrune of cache-dit, on models of their own (`pip install --no-deps cache-dit pyyaml`)."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from examples.fashion_mnist.contestant import Contestant, Draw
from examples.fashion_mnist.contestants_hooks import FEWER, in_steps
from examples.fashion_mnist.model import load_model
from examples.fashion_mnist.sample import STEPS, sample_patches


def dual_block_cache(dense: str) -> Iterator[Contestant]:
    """cache-dit's DBCache, with and without its TaylorSeer."""
    many = [
        (STEPS, *one) for one in itertools.product((0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.8), (None, 1, 2), (1, 3))
    ]
    few = list(itertools.product(FEWER, (0.3, 0.5), (None,), (1,)))
    for steps, threshold, order, warmup in many + few:
        settings = f"{in_steps(steps)}F1, threshold {threshold}, Taylor {order}, warm-up {warmup}"
        yield Contestant("DBCache", settings, partial(_dual, dense, steps, threshold, order, warmup))


def dynamic_pruning(dense: str) -> Iterator[Contestant]:
    """cache-dit's DBPrune: single blocks are left out while what they add changes little."""
    for threshold, warmup in itertools.product((0.1, 0.15, 0.2, 0.3, 0.5), (1, 3)):
        settings = f"F1, threshold {threshold}, warm-up {warmup}"
        yield Contestant("DBPrune", settings, partial(_prune, dense, threshold, warmup))


def _prune(dense: str, threshold: float, warmup: int) -> Draw:
    from cache_dit import DBPruneConfig

    return _enabled(load_model(dense), STEPS, DBPruneConfig(**_common(STEPS, threshold, warmup)), None)


def _dual(dense: str, steps: int, threshold: float, order: int | None, warmup: int) -> Draw:
    from cache_dit import DBCacheConfig, TaylorSeerCalibratorConfig

    calibrator = None if order is None else TaylorSeerCalibratorConfig(taylorseer_order=order)
    return _enabled(load_model(dense), steps, DBCacheConfig(**_common(steps, threshold, warmup)), calibrator)


def _common(steps: int, threshold: float, warmup: int) -> dict[str, Any]:
    return {
        "Fn_compute_blocks": 1,
        "Bn_compute_blocks": 0,
        "residual_diff_threshold": threshold,
        "max_warmup_steps": warmup,
        "enable_separate_cfg": True,
        "num_inference_steps": steps,
    }


def _enabled(model: nn.Module, steps: int, config: Any, calibrator: Any) -> Draw:
    import cache_dit

    logging.getLogger("CACHE_DIT").setLevel(logging.ERROR)
    pattern = cache_dit.ForwardPattern.Pattern_1
    adapter = cache_dit.BlockAdapter(
        transformer=model,
        blocks=[model.transformer_blocks, model.single_transformer_blocks],
        forward_pattern=[pattern, pattern],
        has_separate_cfg=True,
    )
    cache_dit.enable_cache(adapter, cache_config=config, calibrator_config=calibrator)
    return lambda labels, seed: sample_patches(model, labels, steps=steps, seed=seed)
