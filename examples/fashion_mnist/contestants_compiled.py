"""What compiled models do: tiers, fewer steps, reuse by rule, blocks left out, the distilled elastic model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

import edit_compile
from examples.fashion_mnist.contestant import Contestant, Draw
from examples.fashion_mnist.data import CLASSES
from examples.fashion_mnist.sample import FEW_STEPS, STEPS, sample_patches
from runtime.routing.policy import SKIP, Decider

COMPILED = (STEPS, 14, 10, 8, 7, 5, 4)
"""Numbers of steps in which the dense model is drawn from compiled, and by torch.compile."""


@dataclass(frozen=True)
class Bundles:
    """The compiled models: dense with its tiers, and the elastic one."""

    dense: edit_compile.CompiledTransformer
    elastic: edit_compile.CompiledTransformer


def drawing(compiled: edit_compile.CompiledTransformer, steps: int, policy: Decider | None = None) -> Draw:
    """Samples with `policy`, where there is one, deciding; each call is a request of its own."""

    def draw(labels: torch.Tensor, seed: int) -> torch.Tensor:
        with compiled.request(), compiled.decided_by(policy or compiled.policy):
            return sample_patches(compiled, labels, steps=steps, seed=seed)

    return draw


def of(
    who: str,
    settings: str,
    compiled: edit_compile.CompiledTransformer,
    steps: int,
    policy: Decider | None = None,
    twin: str = "",
) -> Contestant:
    """A contestant that is `compiled` in `steps` steps."""
    return Contestant(who, settings, partial(drawing, compiled, steps, policy), twin, compiled)


def reuse_by_rule(compiled: edit_compile.CompiledTransformer) -> Iterator[Contestant]:
    """Every so-many-th step computed, in 28 steps and in fewer: `ReusePolicy`, nothing tuned."""
    every = itertools.product((STEPS, 14, 8), (1, 2, 3, 4, 6), (0, 1), (1,))
    for steps, reused, order, warmup in every:
        if reused < steps // 3:
            policy = edit_compile.ReusePolicy(reused, warmup_steps=warmup, order=order)
            settings = f"{steps} steps, every {reused + 1}, order {order}, from step {warmup}"
            yield of("reuse at intervals", settings, compiled, steps, policy)


def pruned(compiled: edit_compile.CompiledTransformer, most: int = 3) -> Iterator[Contestant]:
    """Blocks left out in all steps, the next always the one whose loss moves the images of a batch least."""
    blocks, labels = len(compiled.program.manifest.blocks), torch.arange(8) % len(CLASSES)
    target, gone = drawing(compiled, STEPS)(labels, 9000), list[int]()

    def error(without: Sequence[int]) -> float:
        return float((drawing(compiled, STEPS, skipping(without, blocks))(labels, 9000) - target).square().mean())

    while len(gone) < most:
        gone.append(min((b for b in range(blocks) if b not in gone), key=lambda block: error([*gone, block])))
        settings = f"{len(gone)} of {blocks}: {', '.join(map(str, sorted(gone)))}"
        yield of("blocks pruned", settings, compiled, STEPS, skipping(gone, blocks))


def skipping(gone: Sequence[int], blocks: int) -> edit_compile.ScheduledPolicy:
    """All steps computed without the blocks `gone`."""
    table = np.ones((STEPS, blocks))
    table[:, list(gone)] = SKIP
    return edit_compile.ScheduledPolicy(table, routed=False)


def elastic_reuse(elastic: edit_compile.CompiledTransformer) -> Iterator[Contestant]:
    """The distilled model's own decisions, with residuals reused in every second step besides."""
    for steps, order in itertools.product((FEW_STEPS, 14), (0,)):
        policy = edit_compile.ReusePolicy(1, order=order, otherwise=elastic.policy)
        settings = f"{steps} steps, every 2, order {order}"
        yield of("elastic, distilled, and reuse", settings, elastic, steps, policy)


def compiled_ones(bundles: Bundles) -> Iterator[Contestant]:
    """What goes into the final whatever the trials say."""
    for steps in COMPILED:
        yield of("fewer steps, compiled", f"{steps} steps", bundles.dense, steps)
    for name, tier in bundles.dense.tiers.items():
        yield of("tier", name, bundles.dense, tier.steps or STEPS, tier.policy)
    for steps in (FEW_STEPS, 5):
        yield of("elastic, distilled", f"{steps} steps", bundles.elastic, steps)


def other_engines(load_inductor: Callable[[], edit_compile.CompiledTransformer], dense: str) -> Iterator[Contestant]:
    """The same images in other time: the tiers on torch.compile's kernels, and torch.compile of the whole model."""
    from examples.fashion_mnist.model import load_model

    inductor, whole = load_inductor(), torch.compile(load_model(dense))
    for name, tier in inductor.tiers.items():
        yield of("tier, inductor", name, inductor, tier.steps or STEPS, tier.policy, f"tier: {name}")
    for steps in COMPILED:
        twin = f"fewer steps, compiled: {steps} steps"
        yield Contestant("torch.compile, fewer steps", f"{steps} steps", partial(_whole, whole, steps), twin)


def _whole(model: Callable[..., object], steps: int) -> Draw:
    return lambda labels, seed: sample_patches(model, labels, steps=steps, seed=seed)
