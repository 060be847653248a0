"""Ways to sample the dense model with less compute: what tiers are measured beside, and what they are made of.

Fewer steps; the caches of diffusers; those of cache-dit, where it is installed; reuse by rule, and blocks left out.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from examples.fashion_mnist.contestant import Contestant, Draw
from examples.fashion_mnist.contestants_cache_dit import dual_block_cache, dynamic_pruning
from examples.fashion_mnist.contestants_compiled import Bundles, elastic_reuse, pruned, reuse_by_rule
from examples.fashion_mnist.contestants_hooks import faster_cache, first_block_cache, mag_cache, taylor_seer
from examples.fashion_mnist.model import load_model
from examples.fashion_mnist.sample import sample_patches


def everyone(dense: str, bundles: Bundles) -> Iterator[Contestant]:
    """All settings that are tried; `dense` names the model (see `load_model`)."""
    yield from fewer_steps(dense)
    yield from first_block_cache(dense)
    yield from taylor_seer(dense)
    yield from mag_cache(dense)
    yield from faster_cache(dense)
    if importlib.util.find_spec("cache_dit") is not None:
        yield from dual_block_cache(dense)
        yield from dynamic_pruning(dense)
    yield from reuse_by_rule(bundles.dense)
    yield from pruned(bundles.dense)
    yield from elastic_reuse(bundles.elastic)


def fewer_steps(dense: str) -> Iterator[Contestant]:
    """Plain sampling with fewer, longer steps."""

    def prepare(steps: int) -> Draw:
        model = load_model(dense)
        return lambda labels, seed: sample_patches(model, labels, steps=steps, seed=seed)

    for steps in (14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3):
        yield Contestant("fewer steps", f"{steps} steps", lambda steps=steps: prepare(steps))  # type: ignore[misc]
