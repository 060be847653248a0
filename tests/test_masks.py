"""Channels are masked per sample wherever an MLP's input holds the batch, and not where that cannot be told."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from torch import Tensor, nn

from edit_compile.elastic.layout import Layout
from edit_compile.elastic.transformer import ElasticTransformer, elasticize
from runtime.bundle.spec import RouterConfig
from tests.models import noise, randomised

DIM, HIDDEN, FRAMES = 8, 24, 3


class Block(nn.Module):
    """An MLP on tokens (B, FRAMES * S, DIM) seen as frames of all samples, those of a sample together or apart."""

    def __init__(self, by_sample: bool) -> None:
        super().__init__()
        self.by_sample = by_sample
        self.up, self.down = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM)

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        frames = (x + vector[:, None]).unflatten(1, (-1, 5))
        rows = frames if self.by_sample else frames.transpose(0, 1)
        out = self.down(torch.nn.functional.gelu(self.up(rows.flatten(0, 1)))).unflatten(0, rows.shape[:2])
        return x + (out if self.by_sample else out.transpose(0, 1)).flatten(1, 2)


class ByMean(nn.Module):
    """Stands in for a router: open, and the narrowest width for samples below zero, the full one for those above."""

    def forward(self, states: list[Tensor], time: Tensor) -> tuple[Tensor, Tensor]:
        mean = states[0].mean((1, 2))
        return torch.full_like(mean, 9.0), mean[:, None] * torch.tensor([-1.0, 0.0, 0.0, 1.0])


class Model(nn.Module):
    def __init__(self, by_sample: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(by_sample) for _ in range(2))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, timestep[:, None].cos().expand(-1, DIM))
        return x


def inputs(rows: int = 4, frames: int = FRAMES) -> dict[str, Tensor]:
    x = noise(rows, frames * 5, DIM) + 3 * noise(rows, 1, 1, seed=5)
    return {"x": x, "timestep": torch.linspace(0.1, 0.9, rows)}


def elastic(by_sample: bool = True) -> ElasticTransformer:
    made = elasticize(randomised(Model(by_sample)), inputs(), config=RouterConfig(hidden=8)).eval()
    made.routers = nn.ModuleList(ByMean() for _ in made.routers)
    return made


@pytest.mark.parametrize("by_sample", [True, False])
@torch.no_grad()
def test_a_sample_has_its_own_width_in_every_frame(by_sample: bool) -> None:
    """Whether the frames of a sample are together, or those of all samples at one time."""
    model, given = elastic(by_sample), inputs()
    (mask,) = model.layout.blocks[0].masks if model.layout else ()
    assert mask.packing.folded
    together = model(**given)
    assert model.routing is not None
    assert set(model.routing.width[:, 0].tolist()) == {0.25, 1.0}, "all samples chose alike: the test shows nothing"
    for row in range(len(together)):
        alone = model(**{name: tensor[row : row + 1] for name, tensor in given.items()})
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_one_frame_in_the_first_shapes_hides_nothing() -> None:
    model = elasticize(randomised(Model()), [inputs(frames=1), inputs()], config=RouterConfig(hidden=8)).eval()
    assert all(mask.packing.folded for block in model.layout.blocks for mask in block.masks)
    for given in (inputs(frames=1), inputs()):
        torch.testing.assert_close(model(**given), model.model(**given))


def test_a_layout_survives_json() -> None:
    layout = elastic().layout
    assert layout is not None
    assert Layout.from_json(json.loads(json.dumps(asdict(layout)))) == layout
