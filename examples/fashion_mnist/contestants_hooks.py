"""The caches of diffusers, each on a model of its own: FirstBlockCache, TaylorSeer, MagCache, FasterCache.

Beside 28 steps they are tried in 14 and 8, since a cache in fewer steps may beat one in many.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import re
from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    TaylorSeerCacheConfig,
    apply_faster_cache,
)
from diffusers.utils import logging
from torch import Tensor, nn

from examples.fashion_mnist.contestant import Contestant, Draw
from examples.fashion_mnist.data import CLASSES, NO_CLASS, from_patches, to_patches
from examples.fashion_mnist.model import inputs, load_model
from examples.fashion_mnist.sample import STEPS, sample_patches

FEWER = (14, 8)
BOTH = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")


def in_steps(steps: int) -> str:
    """What stands before the settings where steps are not 28."""
    return "" if steps == STEPS else f"{steps} steps, "


def first_block_cache(dense: str) -> Iterator[Contestant]:
    """diffusers' FirstBlockCache."""
    many = (0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.12, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7)
    pairs = [(STEPS, one) for one in many] + list(itertools.product(FEWER, (0.3, 0.5, 0.7)))
    for steps, threshold in pairs:
        config = FirstBlockCacheConfig(threshold=threshold)
        settings = f"{in_steps(steps)}threshold {threshold}"
        yield Contestant("FirstBlockCache", settings, partial(_cached, dense, config, steps))


def taylor_seer(dense: str, compiled: bool = False) -> Iterator[Contestant]:
    """diffusers' TaylorSeerCache of whole blocks; of attentions alone, as it comes, it saves less than half."""
    many = [(STEPS, *one) for one in itertools.product((2, 3, 4, 5, 7, 9), (0, 1, 2), (1, 3))]
    few = list(itertools.product(FEWER, (2, 3), (0, 1), (1,)))
    for steps, interval, order, first in many + few:
        config = TaylorSeerCacheConfig(
            cache_interval=interval,
            max_order=order,
            disable_cache_before_step=first,
            taylor_factors_dtype=torch.float32,
            cache_identifiers=[r"(single_)?transformer_blocks\.\d+"],
        )
        settings = f"{in_steps(steps)}every {interval}, order {order}, from step {first}"
        yield Contestant("TaylorSeer", settings, partial(_cached, dense, config, steps, compiled))


def mag_cache(dense: str, compiled: bool = False) -> Iterator[Contestant]:
    """diffusers' MagCache, calibrated on one batch as its documentation says, for each number of steps."""
    many = [(STEPS, *one) for one in itertools.product((0.06, 1.0), (1, 2, 3, 5), (0.05,))]
    few = list(itertools.product(FEWER, (1.0,), (1, 2), (0.1,)))
    for steps, threshold, skipped, kept in many + few:
        given = {"threshold": threshold, "max_skip_steps": skipped, "retention_ratio": kept}
        settings = f"{in_steps(steps)}threshold {threshold}, at most {skipped} on end, {kept:.0%} kept"
        yield Contestant("MagCache", settings, partial(_mag, dense, steps, given, compiled))


def _mag(dense: str, steps: int, given: dict[str, Any], compiled: bool) -> Draw:
    config = MagCacheConfig(num_inference_steps=steps, mag_ratios=_ratios(dense, steps), **given)
    return _cached(dense, config, steps, compiled)


@cache
def _ratios(dense: str, steps: int) -> list[float]:
    """The branch with a label's, as calibration prints them."""
    draw = _cached(dense, MagCacheConfig(num_inference_steps=steps, calibrate=True), steps)
    with contextlib.redirect_stdout(io.StringIO()) as told:
        draw(torch.arange(8) % len(CLASSES), 9000)
    found = re.findall(r"^\[[^a-z]*\]$", told.getvalue(), re.M)
    ratios: list[float] = json.loads(found[0])
    assert len(ratios) == steps
    return ratios


def on_compiled_blocks(dense: str, finalists: Collection[str]) -> Iterator[Contestant]:
    """TaylorSeer and MagCache over blocks compiled by torch.compile, with the settings of `finalists` by name."""
    for one in (*taylor_seer(dense, compiled=True), *mag_cache(dense, compiled=True)):
        if one.name in finalists:
            yield replace(one, who=f"{one.who}, torch.compile", same_as=one.name)


def _cached(dense: str, config: object, steps: int = STEPS, compiled: bool = False) -> Draw:
    model = load_model(dense)
    for block in (*model.transformer_blocks, *model.single_transformer_blocks) if compiled else ():
        block.forward = torch.compile(block.forward)  # below the hooks, at which torch.compile would break off
    model.enable_cache(config)

    def draw(labels: Tensor, seed: int) -> Tensor:
        model._reset_stateful_cache()
        return sample_patches(model, labels, steps=steps, seed=seed)

    return draw


def faster_cache(dense: str) -> Iterator[Contestant]:
    """diffusers' FasterCache: attention reused and, of the branch without a label, all but every so-many-th step."""
    for attention, branch, until, alpha in itertools.product((3,), (2, 5), (681, 961), (1.0, 1.1)):
        settings = f"attention every {attention}, second branch every {branch}, below {until}, alpha {alpha}"
        yield Contestant("FasterCache", settings, partial(_faster, dense, attention, branch, until, alpha))


def _faster(dense: str, attention: int, branch: int, until: int, alpha: float) -> Draw:
    logging.set_verbosity_error()
    doubled = Doubled(load_model(dense))
    config = FasterCacheConfig(
        spatial_attention_block_skip_range=attention,
        spatial_attention_timestep_skip_range=(-1, until),
        unconditional_batch_skip_range=branch,
        unconditional_batch_timestep_skip_range=(-1, until),
        alpha_low_frequency=alpha,
        alpha_high_frequency=alpha,
        spatial_attention_block_identifiers=(r"transformer_blocks\.\d+\.attn",),
        attention_weight_callback=lambda _: 0.5,
        tensor_format="BCHW",
        current_timestep_callback=lambda: doubled.timestep,  # type: ignore[arg-type, return-value]
        _unconditional_conditional_input_kwargs_identifiers=list(BOTH),
    )
    apply_faster_cache(doubled, config)

    def draw(labels: Tensor, seed: int) -> Tensor:
        doubled._diffusers_hook.reset_stateful_hooks(recurse=True)  # type: ignore[operator, union-attr]
        return sample_patches(Paired(doubled), labels, seed=seed)

    return draw


class Doubled(nn.Module):
    """Both branches in one batch, as FasterCache takes them: without a label first, images (2B, 1, 28, 28) come out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        # FasterCache looks for attentions by names that begin with those of the lists of blocks
        self.transformer_blocks, self.single_transformer_blocks = (
            model.transformer_blocks,
            model.single_transformer_blocks,
        )
        self.model, self.timestep = model, 1000.0

    def forward(self, **kwargs: Any) -> Tensor:
        return from_patches(self.model(**kwargs)[0])[:, None]


class Paired:
    """What the sampler calls once for each branch, the one with labels first, and `Doubled` once for both."""

    def __init__(self, doubled: Doubled) -> None:
        self.doubled = doubled
        self._without: Tensor | None = None

    def __call__(self, **kwargs: Any) -> tuple[Tensor]:
        if self._without is not None:
            found, self._without = self._without, None
            return (found,)
        x, t = kwargs["hidden_states"], kwargs["timestep"]
        without = inputs(x, t, torch.full((len(x),), NO_CLASS))
        self.doubled.timestep = float(t[0]) * 1000
        images = self.doubled(**kwargs | {name: torch.cat([without[name], kwargs[name]]) for name in BOTH})
        self._without, with_label = to_patches(images[:, 0]).chunk(2)
        return (with_label,)
