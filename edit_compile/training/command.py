"""`edit-compile distil`: an elastic model from a dense one and its recorded calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch

from edit_compile.calls.beside_bundle import recorded_dtype
from edit_compile.calls.generations import Recording
from edit_compile.elastic.transformer import ElasticTransformer, elasticize
from edit_compile.loading import UserError, load_model, parse_numbers, parse_overrides
from edit_compile.training.distil import distil
from edit_compile.training.distil_task import Distillation
from edit_compile.training.losses import Budget
from edit_compile.training.train import TrainConfig
from edit_compile.widths.channel_order import order_channels
from runtime.routing.policy import RoutingPolicy

ORDERED_BY = 4
"""Generations that hidden channels are put in order by."""


def distil_model(
    model: str,
    calls: Path,
    output: Path,
    run: Path,
    budget: str,
    train: str,
    preset: str | None,
    settings: Sequence[str],
) -> None:
    """Distil `model`, and write the elastic model to `output`; `run` holds what a stopped run goes on from.

    A dense model is made elastic with its hidden channels in order. UserError for settings that are none.
    """
    own = {field.name for field in fields(Distillation)}
    of_run = [one for one in settings if one.partition("=")[0] not in own]
    distillation = parse_overrides(Distillation, [one for one in settings if one not in of_run])
    recording = Recording(calls)
    dtype = recorded_dtype(recording)
    config = parse_overrides(TrainConfig, [*_defaults(train, of_run, dtype), *of_run], output=run)
    loaded = load_model(model, torch.float32 if train == "all" else dtype)
    if not isinstance(loaded, ElasticTransformer):
        order_channels(loaded, [recording[i] for i in range(min(ORDERED_BY, len(recording)))])
        loaded = elasticize(loaded, recording, router_dtype=torch.float32)
    policy = RoutingPolicy.preset(preset) if preset else None
    distil(loaded, recording, parse_budget(budget), config, train=train, policy=policy, settings=distillation)
    loaded.save_pretrained(output)


def _defaults(train: str, given: Sequence[str], dtype: torch.dtype) -> list[str]:
    """Settings of a run where nothing else is said: the rate falls over its second half."""
    steps = next((one.partition("=")[2] for one in given if one.startswith("steps=")), "1000")
    decay = int(steps) // 2 if steps.isdecimal() else 500
    found = ["steps=1000", "batch_size=1", f"decay_steps={decay}", f"warmup_steps={min(50, decay // 5)}"]
    if train == "routers":
        return [*found, "lr=0.002"]
    precision = "bfloat16" if train == "all" and dtype is not torch.float32 else "float32"
    return [*found, "lr=0.0005", 'lr_multipliers=[["routers.", 5.0]]', f"precision={precision}"]


def parse_budget(text: str) -> float | Budget:
    """ ".45" as a share of FLOPs, ".5,.6" as shares of blocks and of their widths; UserError for anything else."""
    numbers = parse_numbers(text)
    if len(numbers) > 2:
        raise UserError(f'--budget {text!r}: a share of the dense FLOPs, or "gate,width"')
    return numbers[0] if len(numbers) == 1 else Budget(numbers[0], numbers[1])
