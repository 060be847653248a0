"""A small elastic task, run in several processes by test_train_size.py."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset

from edit_compile.elastic.layout import Layout, find_layout
from edit_compile.elastic.transformer import ElasticTransformer, elasticize
from edit_compile.training.losses import Budget, budget_losses
from edit_compile.training.train import TrainConfig, train
from runtime.bundle.spec import RouterConfig
from tests.models import noise, randomised, tiny_flux


class Latents(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": noise(16, 8, seed=index), "text": noise(6, 24, seed=index + 100), "vector": noise(20, seed=index)}


class FluxTask:
    """Rectified flow on noise; the same loss however many processes share a batch, as it draws nothing."""

    budget = Budget(gate=0.6, width=0.6)
    router_dtype: torch.dtype | None = None
    layout: Layout | None = None  # found once in a process

    def model(self) -> ElasticTransformer:
        model, inputs = tiny_flux(double=1, single=1)
        if FluxTask.layout is None:
            FluxTask.layout = find_layout(randomised(model), dict(inputs), time_dim=256)
        elastic = elasticize(
            self.prepared(randomised(model)), config=RouterConfig(hidden=16), router_dtype=self.router_dtype
        )
        elastic.attach(FluxTask.layout)
        self.positions = {name: inputs[name] for name in ("img_ids", "txt_ids")}
        elastic.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False))
        return elastic

    def prepared(self, model: nn.Module) -> nn.Module:
        return model

    def dataset(self) -> Latents:
        return Latents()

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        t = torch.sigmoid(batch["vector"].sum(1))
        inputs = {"encoder_hidden_states": batch["text"], "pooled_projections": batch["vector"], "timestep": t}
        (velocity,) = model(hidden_states=batch["x"], **inputs, **self.positions, return_dict=False)
        flow = (velocity.float() - batch["x"]).square().mean()
        return budget_losses(getattr(model, "module", model).routing, flow, self.budget)


def config_for(folder: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {"steps": 6, "batch_size": 2, "warmup_steps": 0, "decay_steps": 0, "log_every": 1}
    return TrainConfig(folder, cpu=True, **settings | {"lr": 1e-3, "checkpoint_every": 3} | changes)


if __name__ == "__main__":
    torch.set_num_threads(1)
    Accelerator.end_training = lambda self: None  # it would leave the group, which the next run needs
    for folder, changes in json.loads(sys.argv[1]):
        train(FluxTask(), config_for(Path(folder), **changes))
    torch.distributed.destroy_process_group()
