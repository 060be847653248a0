"""The optimiser of a run: which parameters it has, and its states by name."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from edit_compile.training.sharding import spread_like

log = logging.getLogger(__name__)


class OptimizerError(ValueError):
    """An optimiser cannot be made or go on: the message says of which parameter, and why."""


class Settings(Protocol):
    """What of a run's settings an optimiser needs."""

    @property
    def lr(self) -> float: ...  # noqa: D102
    @property
    def betas(self) -> tuple[float, float]: ...  # noqa: D102
    @property
    def weight_decay(self) -> float: ...  # noqa: D102
    @property
    def lr_multipliers(self) -> tuple[tuple[str, float], ...]: ...  # noqa: D102


def make_optimizer(module: nn.Module, config: Settings) -> torch.optim.AdamW:
    """AdamW with one parameter group per learning-rate multiplier and weight-decay setting (none on vectors).

    `config` has lr, betas, weight_decay and lr_multipliers. Each group has the "names" of its parameters.

    Raises:
        OptimizerError: no parameter needs a gradient.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    low: list[str] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        multiplier = next((factor for part, factor in config.lr_multipliers if part in name), 1.0)
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        settings = {"params": [], "names": [], "lr_multiplier": multiplier, "weight_decay": decay}
        group = groups.setdefault((multiplier, decay), settings)
        group["params"].append(parameter)
        group["names"].append(name)
        if parameter.dtype in (torch.bfloat16, torch.float16):
            low.append(name)
    if not groups:
        raise OptimizerError("the task's model has no parameter that needs a gradient: there is nothing to train")
    if low:
        log.warning(
            "%d parameters are trained in half precision, which loses updates smaller than 1/256 of a weight "
            '(first: %s): keep what is trained in float32, with precision="bfloat16" to compute in less',
            len(low),
            low[0],
        )
    return torch.optim.AdamW(list(groups.values()), lr=config.lr, betas=config.betas)


def states_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Its states, keyed "<parameter name>/<state name>", each as this process has it."""
    names = [name for group in optimizer.param_groups for name in group["names"]]
    states = optimizer.state_dict()["state"]
    return {f"{names[i]}/{key}": torch.as_tensor(v) for i, state in states.items() for key, v in state.items()}


def load_states(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give the optimiser its states, keyed "<parameter name>/<state name>" and whole.

    Raises:
        OptimizerError: there are states of a parameter that it does not train.
    """
    parameters = {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    }
    position = {name: index for index, name in enumerate(parameters)}
    states: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, state = key.rpartition("/")
        if name not in parameters:
            raise OptimizerError(
                f"the checkpoint has states of {name}, which is frozen or not there now: train in another output "
                "folder, from the checkpoint's weights"
            )
        moved = tensor if state == "step" else spread_like(tensor, parameters[name])
        states.setdefault(position[name], {})[state] = moved
    optimizer.load_state_dict(optimizer.state_dict() | {"state": states})
