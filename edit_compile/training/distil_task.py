"""The task that distillation trains: rollouts of recorded generations, and a budget that narrows as it goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from edit_compile.calls.generations import CallsError, Generation, Recording
from edit_compile.calls.recorded_model import check_arguments
from edit_compile.calls.sampler import Sampler, warn_of_unexplained
from edit_compile.elastic.straight_through import Routing
from edit_compile.elastic.transformer import ElasticTransformer
from edit_compile.training.flops import flops_share
from edit_compile.training.losses import Budget, gate_loss, width_loss
from edit_compile.training.rollout import Window, roll_out
from runtime.routing.policy import RoutingPolicy


@dataclass(frozen=True)
class Distillation:
    """Settings of a distillation.

    Rollouts are of `rollout` steps; residuals can be reused from the second of them on. Each step is as long as
    `stride` recorded ones: more than 1 teaches a sampler of so many times fewer steps to end where that which was
    recorded ended. `weight` is lambda, the factor of (share - budget)^2. In the first `narrowing` of the run (a share
    of it) the budget falls from all compute to what is asked for. Up to `quiet` of it, logits are drawn with `noise`
    (see `BankedRule`). `rank` is that of the adapters.
    """

    rollout: int = 2
    stride: int = 1
    weight: float = 10.0
    narrowing: float = 0.3
    noise: float = 1.0
    quiet: float = 0.7
    rank: int = 16

    def __post_init__(self) -> None:
        for name in ("rollout", "stride", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1")
        for name in ("narrowing", "quiet"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: a share of the run, between 0 and 1")


class DistilTask:
    """Distillation as a task of `train`."""

    def __init__(
        self,
        elastic: ElasticTransformer,
        windows: Windows,
        budget: float | Budget,
        shares: Tensor,
        policy: RoutingPolicy,
        settings: Distillation,
        identity: str,
    ) -> None:
        self.elastic, self.windows, self.budget, self.shares = elastic, windows, budget, shares
        self.policy, self.settings, self.identity = policy, settings, identity
        self._done = 0.0

    def model(self) -> nn.Module:
        """The elastic model."""
        return self.elastic

    def dataset(self) -> Windows:
        """Where rollouts may begin."""
        return self.windows

    def begin_step(self, step: int, steps: int) -> None:
        """Where the run is: what the budget and the noise go by."""
        self._done = step / steps

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mean error of the batch's rollouts, and the budget's loss over all their calls."""
        pairs = zip(batch["generation"].tolist(), batch["start"].tolist(), strict=True)
        rolled = [roll_out(self.elastic, self.windows.window(*pair), self.policy, self._noise()) for pair in pairs]
        error = torch.stack([one for rollout in rolled for one in rollout.errors]).mean()
        routing = joined([one for rollout in rolled for one in rollout.routing])
        share = flops_share(routing, self.shares)
        off = self._off(routing, share)
        gates = routing.gate.detach()
        shown = torch.tensor([0.1, 0.5, 0.9], device=gates.device)
        return {
            "loss": error + self.settings.weight * off,
            "error": error.detach(),
            "flops_share": share.detach(),
            "gate_rate": gates.mean(),
            "mean_width": (gates * routing.width.detach()).sum() / gates.sum().clamp(min=1),
            "reused": torch.stack([one for rollout in rolled for one in rollout.reused]).mean(),
            "block_gate_rate": gates.mean(0),
            "probability_10_50_90": routing.probability.detach().float().quantile(shown),
        }

    def _off(self, routing: Routing, share: Tensor) -> Tensor:
        """Squared distance from what the budget is at this step."""
        fallen = min(1.0, self._done / self.settings.narrowing) if self.settings.narrowing else 1.0
        if isinstance(self.budget, Budget):
            gate, width = (1 - fallen * (1 - part) for part in (self.budget.gate, self.budget.width))
            now = replace(self.budget, gate=gate, width=width)
            return self.budget.weight * (gate_loss(routing, now) + width_loss(routing, now))
        return (share - (1 - fallen * (1 - self.budget))) ** 2

    def _noise(self) -> float:
        left = 1.0 if self._done < self.settings.quiet else 0.0
        return self.settings.noise * left


def joined(routings: Sequence[Routing]) -> Routing:
    """The decisions of several calls as of one batch."""
    names = "probability", "gate", "width_probability", "choice"
    probability, gate, width_probability, choice = (
        torch.cat([getattr(one, name) for one in routings]) for name in names
    )
    return Routing(probability, gate, width_probability, choice, routings[0].widths)


class Windows(Dataset[dict[str, int]]):
    """Where rollouts of `length` steps, of `stride` recorded ones each, may begin: (generation, step) pairs.

    All generations are read once. CallsError where there is none, `elastic` does not take their arguments, their steps
    differ in number, there are fewer than a rollout has, or the sampler makes no sense of steps as long as several.
    """

    def __init__(
        self, elastic: ElasticTransformer, calls: Sequence[Generation] | Recording, length: int, stride: int = 1
    ) -> None:
        self.calls, self.length, self.stride = calls, length, stride
        self.samplers: list[Sampler] = []
        reaches_back = ended = False
        for number, generation in enumerate(calls):
            check_arguments(elastic, generation)
            sampler = Sampler.fit(generation)
            self.samplers.append(sampler)
            reaches_back = reaches_back or (stride > 1 and _reaches_back(generation, sampler))
            ended = generation.result is not None
            if len(sampler.steps) != self.steps:
                raise CallsError(
                    f"calls[{number}] has {len(sampler.steps)} steps, calls[0] {self.steps}: record one number"
                )
        if not self.samplers:
            raise CallsError("calls: there is no generation")
        if self.steps % stride:
            known = "" if ended else " (without a result, the last step leads nowhere)"
            raise CallsError(f"stride={stride}: it does not divide the {self.steps} steps that were recorded{known}")
        if self.steps // stride < length:
            raise CallsError(f"rollout={length}: there are {self.steps // stride} steps in a recorded generation")
        if reaches_back:
            raise CallsError(
                f"stride={stride}: the sampler looks back at earlier steps, so what a longer step does is not known"
            )
        warn_of_unexplained(self.samplers)

    @property
    def steps(self) -> int:
        """How often each generation leads from latents to the next."""
        return len(self.samplers[0].steps)

    def __len__(self) -> int:
        return len(self.samplers) * self._starts

    @property
    def _starts(self) -> int:
        return self.steps // self.stride - self.length + 1

    def __getitem__(self, index: int) -> dict[str, int]:
        number, start = divmod(index, self._starts)
        return {"generation": number, "start": start * self.stride}

    def window(self, number: int, start: int) -> Window:
        """That of generation `number` from step `start` on."""
        return Window(self.calls[number], self.samplers[number], start, self.length, self.stride)


def _reaches_back(generation: Generation, sampler: Sampler) -> bool:
    """Whether latents are made of calls before those of the last step."""
    stages = sampler.stages_of(generation)
    return any(
        term.call not in stages[number].calls
        for number, step in enumerate(sampler.steps)
        for terms in step.groups
        for term in terms
    )
