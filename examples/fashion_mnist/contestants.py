"""Ways to sample the dense model with less compute, each on a model of its own: what tiers are measured beside.

Fewer steps; FirstBlockCache and TaylorSeerCache of diffusers; DBCache of cache-dit, with and without its TaylorSeer
(`pip install --no-deps cache-dit pyyaml`; left out where it is not installed).
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig
from torch import Tensor, nn

from examples.fashion_mnist.model import load_model
from examples.fashion_mnist.sample import STEPS, sample_patches

Draw = Callable[[Tensor, int], Tensor]
"""Gives what the sampler ends with (B, tokens, channels), for labels (B,) and a seed."""


@dataclass(frozen=True)
class Contestant:
    """A way to sample, by whom it is, and its settings in words; `prepare` makes what draws."""

    who: str
    settings: str
    prepare: Callable[[], Draw]

    @property
    def name(self) -> str:
        """By whom, and how."""
        return f"{self.who}: {self.settings}"


def everyone(dense: str) -> Iterator[Contestant]:
    """All settings that are tried; `dense` names the model (see `load_model`)."""
    yield from fewer_steps(dense)
    yield from first_block_cache(dense)
    yield from taylor_seer(dense)
    if importlib.util.find_spec("cache_dit") is not None:
        yield from dual_block_cache(dense)


def fewer_steps(dense: str) -> Iterator[Contestant]:
    """Plain sampling with fewer, longer steps."""

    def prepare(steps: int) -> Draw:
        model = load_model(dense)
        return lambda labels, seed: sample_patches(model, labels, steps=steps, seed=seed)

    for steps in (14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4):
        yield Contestant("fewer steps", f"{steps} steps", lambda steps=steps: prepare(steps))  # type: ignore[misc]


def first_block_cache(dense: str) -> Iterator[Contestant]:
    """diffusers' FirstBlockCache."""
    for threshold in (0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.12, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7):
        config = FirstBlockCacheConfig(threshold=threshold)
        yield Contestant("FirstBlockCache", f"threshold {threshold}", lambda config=config: _cached(dense, config))  # type: ignore[misc]


def taylor_seer(dense: str) -> Iterator[Contestant]:
    """diffusers' TaylorSeerCache of whole blocks; of attentions alone, as it comes, it saves less than half."""
    for interval, order, first in itertools.product((2, 3, 4, 5, 7, 9), (0, 1, 2), (1, 3)):
        config = TaylorSeerCacheConfig(
            cache_interval=interval,
            max_order=order,
            disable_cache_before_step=first,
            taylor_factors_dtype=torch.float32,
            cache_identifiers=[r"(single_)?transformer_blocks\.\d+"],
        )
        settings = f"every {interval}, order {order}, from step {first}"
        yield Contestant("TaylorSeer", settings, lambda config=config: _cached(dense, config))  # type: ignore[misc]


def _cached(dense: str, config: object) -> Draw:
    model = load_model(dense)
    model.enable_cache(config)

    def draw(labels: Tensor, seed: int) -> Tensor:
        model._reset_stateful_cache()
        return sample_patches(model, labels, seed=seed)

    return draw


def dual_block_cache(dense: str) -> Iterator[Contestant]:
    """cache-dit's DBCache."""
    for threshold, order, warmup in itertools.product(
        (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.8), (None, 1, 2), (1, 3)
    ):
        settings = f"F1, threshold {threshold}, Taylor {order}, warm-up {warmup}"
        yield Contestant(
            "DBCache",
            settings,
            lambda given=(threshold, order, warmup): _dual(load_model(dense), *given),  # type: ignore[misc]
        )


def _dual(model: nn.Module, threshold: float, order: int | None, warmup: int) -> Draw:
    import cache_dit

    logging.getLogger("CACHE_DIT").setLevel(logging.ERROR)
    pattern = cache_dit.ForwardPattern.Pattern_1
    cache_dit.enable_cache(
        cache_dit.BlockAdapter(
            transformer=model,
            blocks=[model.transformer_blocks, model.single_transformer_blocks],
            forward_pattern=[pattern, pattern],
            has_separate_cfg=True,
        ),
        cache_config=cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            residual_diff_threshold=threshold,
            max_warmup_steps=warmup,
            enable_separate_cfg=True,
            num_inference_steps=STEPS,
        ),
        calibrator_config=None if order is None else cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order),
    )
    return lambda labels, seed: sample_patches(model, labels, seed=seed)
