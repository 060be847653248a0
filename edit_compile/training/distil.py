"""Distillation: routers, and with them adapters or all weights, learn from the dense model's recorded generations."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from hashlib import sha256

import torch
from torch import Tensor

from edit_compile.calls.generations import Generation, RecordedCall, Recording
from edit_compile.calls.repeated_calls import arguments_for, check_model
from edit_compile.elastic.transformer import ElasticTransformer
from edit_compile.training.checkpoint import load_checkpoint
from edit_compile.training.distil_task import Distillation, DistilTask, Windows
from edit_compile.training.flops import block_shares
from edit_compile.training.lora import adapted
from edit_compile.training.losses import Budget
from edit_compile.training.train import TrainConfig
from edit_compile.training.train import train as run_training
from runtime.routing.policy import RoutingPolicy

DEFAULTS = Distillation()


def distil(
    elastic: ElasticTransformer,
    calls: Sequence[Generation] | Recording,
    budget: float | Budget,
    config: TrainConfig,
    *,
    train: str = "routers",
    policy: RoutingPolicy | None = None,
    settings: Distillation = DEFAULTS,
) -> None:
    """Train `elastic` in place to lead a sampler where the recorded dense model led it, within a budget.

    No images and no labels: the teacher is what was recorded, so that only the elastic model is run. The loss is how
    far its rollouts by Algorithm 1 (`roll_out`) take the latents off those that were recorded, and the budget's.

    Args:
        elastic: of the model that was recorded; left with the averaged weights of the run, in eval mode.
        calls: `Recording(folder)` or generations, of one number of steps: those of the sampler that it will serve.
        budget: share of the dense FLOPs of a call, glue included, in (0, 1); or the paper's two shares.
        config: of the run, whose folder it goes on from where it was stopped; `batch_size` counts rollouts.
        train: "routers" alone, "lora" for adapters on the linears of the blocks too, which are merged at the end, or
            "all" weights.
        policy: Algorithm 1's settings in the rollouts, and from then on `elastic.policy`; default: that, else
            `RoutingPolicy()`. Its `max_reuse` is cut to what a rollout can hold, ``settings.rollout - 1``.

    Reuse costs nothing, and the first step of a rollout cannot reuse: a generation of many steps, which reuses more,
    costs less than the budget.

    Raises:
        CallsError: calls of another model, of different numbers of steps, or of fewer than a rollout has.
        ValueError: no TrainConfig; a budget outside (0, 1), or less than what is not in blocks costs; trained
            parameters in half precision; several processes.
        TrainingError: `config.output` holds a run of another model, of other calls or settings.
    """
    if train not in ("routers", "lora", "all"):
        raise ValueError(f"train={train!r}: use 'routers', 'lora' or 'all'")
    if not isinstance(config, TrainConfig):
        raise ValueError(f"config={config!r}: a TrainConfig, which tells the run's folder, steps and batch size")
    if config.shard or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("distil trains in one process: leave out shard and torchrun")
    check_model(elastic.model, calls)
    windows = Windows(elastic, calls, settings.rollout, settings.stride)
    first = calls[0].calls[0]
    inputs = arguments_for(elastic, first)
    if elastic.layout is None:
        with torch.no_grad():
            elastic(**inputs)
    policy = _trained_policy(policy or elastic.policy or RoutingPolicy(), settings)
    shares = block_shares(elastic, inputs)
    check_budget(budget, shares)
    identity = _identity(elastic, first, (len(calls), train, budget, policy, settings))
    with trained(elastic, train, settings.rank):
        task = DistilTask(elastic, windows, budget, shares, policy, settings, identity)
        last = load_checkpoint(run_training(task, config))
        elastic.load_state_dict({**last.model, **last.ema})
    elastic.policy = policy
    elastic.eval()


def _trained_policy(policy: RoutingPolicy, settings: Distillation) -> RoutingPolicy:
    """`policy` with as many reuses on end as a rollout can have: more would be served untrained."""
    return replace(policy, max_reuse=min(policy.max_reuse, settings.rollout - 1))


def _identity(elastic: ElasticTransformer, first: RecordedCall, settings: tuple[object, ...]) -> str:
    """What a run is of: settings, the model that it begins with, the first call; by a few numbers of each tensor."""
    digest = sha256(repr(settings).encode())
    for name, tensor in (*elastic.state_dict().items(), *((str(n), one) for n, one in enumerate(first.outputs))):
        digest.update(repr((name, tuple(tensor.shape), tensor.flatten()[:16].tolist())).encode())
    return digest.hexdigest()


def check_budget(budget: float | Budget, shares: Tensor) -> None:
    """ValueError for a share of FLOPs that cannot be reached."""
    if isinstance(budget, Budget):
        return
    if not 0 < budget < 1:
        raise ValueError(f"budget={budget!r}: a share of the dense FLOPs between 0 and 1, or a Budget")
    least = 1 - float(shares[:, -1].sum())
    if budget <= least:
        raise ValueError(f"budget={budget:.0%}: what is not in blocks takes {least:.1%} of the dense FLOPs by itself")


@contextmanager
def trained(elastic: ElasticTransformer, train: str, rank: int) -> Iterator[None]:
    """Inside the ``with`` block only what is to be trained wants gradients; afterwards adapters are merged."""
    wanted = {name: parameter.requires_grad for name, parameter in elastic.named_parameters()}
    for name, parameter in elastic.named_parameters():
        parameter.requires_grad_(train == "all" or name.startswith("routers."))
    halves = [name for name, p in elastic.named_parameters() if p.requires_grad and p.dtype is not torch.float32]
    try:
        if halves:
            raise ValueError(
                f"{halves[0]} is of half precision, in which small steps are lost: elasticize(router_dtype="
                "torch.float32) for routers; for train='all' elastic.float() and TrainConfig(precision='bfloat16')"
            )
        with adapted(elastic, rank) if train == "lora" else nullcontext():
            yield
    finally:
        for name, parameter in elastic.named_parameters():
            parameter.requires_grad_(wanted[name])
