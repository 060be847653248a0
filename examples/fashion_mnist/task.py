"""Rectified flow on Fashion-MNIST as tasks for `edit_compile.training.train`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from edit_compile.elastic.transformer import ElasticTransformer
from edit_compile.training.losses import Budget, budget_losses
from examples.fashion_mnist.data import NO_CLASS, Patches
from examples.fashion_mnist.model import dense_model, elastic_model, inputs

LABEL_DROP = 0.1


def noised(batch: Mapping[str, Tensor], uniform: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw noise and times: x_t = (1 - t) x_0 + t noise (B, 49, 16), t (B,), labels (B,), target noise - x_0.

    t is logit-normal, or uniform as the sampler's steps are; one label in ten becomes "no class", for guidance.
    """
    x0, labels = batch["x"], batch["label"]
    noise = torch.randn_like(x0)
    t = torch.sigmoid(torch.randn(len(x0), device=x0.device))
    if uniform:
        t = torch.rand(len(x0), device=x0.device)
    dropped = torch.rand(len(x0), device=x0.device) < LABEL_DROP
    labels = torch.where(dropped, NO_CLASS, labels)
    mix = t[:, None, None]
    return (1 - mix) * x0 + mix * noise, t, labels, noise - x0


class DenseTask:
    """Trains the dense model with the rectified-flow loss, from `dense` on where it is given."""

    uniform_times = False

    def __init__(self, dense: nn.Module | None = None) -> None:
        self.dense = dense

    def model(self) -> nn.Module:
        return self.dense or dense_model()

    def dataset(self) -> Patches:
        return Patches("train")

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        x, t, labels, target = noised(batch, self.uniform_times)
        (velocity,) = model(**inputs(x, t, labels))
        return {"loss": nn.functional.mse_loss(velocity, target)}


class ElasticTask(DenseTask):
    """Goes on from dense weights with routers, under a compute budget.

    With `uniform_times` the budget is an average over the sampler's timesteps: gates open more often near t = 0, which
    a logit-normal t seldom visits.
    """

    def __init__(self, dense: nn.Module, budget: Budget, uniform_times: bool = True) -> None:
        super().__init__(dense)
        self.budget, self.uniform_times = budget, uniform_times

    def model(self) -> ElasticTransformer:
        return elastic_model(super().model())

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        flow = super().loss(model, batch)["loss"]
        elastic = getattr(model, "module", model)
        return budget_losses(elastic.routing, flow, self.budget)
