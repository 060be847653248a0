"""A model's methods beside forward, as docs/your_model.md says to use them: guidance inside the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import edit_compile
from edit_compile import RoutingPolicy
from runtime.base.errors import EditError
from runtime.bundle.spec import RouterConfig
from tests.conftest import unsettle
from tests.models import PlainBlock, noise, randomised

DIM = 32


class Guided(nn.Module):
    """Like DiT's own code: a batch of [x; x] with labels and no labels, whose halves `forward_with_cfg` combines."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.time, self.label = nn.Linear(4, DIM), nn.Linear(1, DIM), nn.Embedding(11, DIM)
        self.blocks = nn.ModuleList(PlainBlock(DIM, 2) for _ in range(3))
        self.head = nn.Linear(DIM, 8)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        vector, tokens = self.time(t[:, None]) + self.label(y), self.embed(x)
        for block in self.blocks:
            tokens = block(tokens, vector[:, None], vector)
        return self.head(tokens)

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        half = x[: len(x) // 2]
        output = self.forward(torch.cat([half, half]), t, y)
        given, free = output[..., :4].chunk(2)
        guided = free + cfg_scale * (given - free)
        return torch.cat([torch.cat([guided, guided]), output[..., 4:]], -1)

    def forward_with_dpmsolver(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.forward(x, t, y).chunk(2, -1)[0]


class WithCfg(nn.Module):
    """`forward_with_cfg` as a model's forward."""

    def __init__(self, model: Guided) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        return self.model.forward_with_cfg(x, t, y, cfg_scale)


class ForDpmSolver(nn.Module):
    """`forward_with_dpmsolver` as a model's forward."""

    def __init__(self, model: Guided) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.model.forward_with_dpmsolver(x, t, y)


def inputs() -> dict[str, Any]:
    """Two images, with and without their label."""
    x = noise(2, 9, 4)
    return {"x": torch.cat([x, x]), "t": torch.full((4,), 0.5), "y": torch.tensor([1, 2, 10, 10])}


@pytest.fixture(scope="module")
def made() -> tuple[Guided, edit_compile.ElasticTransformer]:
    """A model, and the elastic one with routers that decide differently for each row."""
    model = randomised(Guided())
    elastic = edit_compile.elasticize(randomised(Guided()), inputs(), config=RouterConfig(hidden=16)).eval()
    unsettle(elastic)
    return model, elastic


@torch.no_grad()
def test_a_method_with_forward_inside_runs_routed(made: tuple[Guided, edit_compile.ElasticTransformer]) -> None:
    model, elastic = made
    whole = elastic(**inputs())
    assert not torch.allclose(whole, model(**inputs()))
    found = elastic.forward_with_cfg(**inputs(), cfg_scale=4.0)
    given, free = whole[..., :4].chunk(2)
    torch.testing.assert_close(found[:2, :, :4], free + 4.0 * (given - free))
    dense = elastic.model.forward_with_cfg(**inputs(), cfg_scale=4.0)
    assert torch.equal(dense, model.forward_with_cfg(**inputs(), cfg_scale=4.0))


@torch.no_grad()
def test_the_class_runs_its_method_on_what_was_compiled(made: tuple[Guided, edit_compile.ElasticTransformer]) -> None:
    _, elastic = made
    compiled = edit_compile.compile(elastic, engine="torch", policy=RoutingPolicy(margin=0.0))
    found = Guided.forward_with_cfg(compiled, **inputs(), cfg_scale=4.0)
    torch.testing.assert_close(found, elastic.forward_with_cfg(**inputs(), cfg_scale=4.0), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_method_that_keeps_samples_apart_can_be_the_forward() -> None:
    model = ForDpmSolver(randomised(Guided()))
    elastic = edit_compile.elasticize(model, inputs(), config=RouterConfig(hidden=16)).eval()
    compiled = edit_compile.compile(elastic, inputs=inputs(), engine="torch")
    torch.testing.assert_close(compiled(**inputs()), model(**inputs()), rtol=1e-4, atol=1e-4)


def test_one_that_combines_samples_cannot() -> None:
    with pytest.raises(EditError, match="rows of one sample changed"):
        edit_compile.elasticize(WithCfg(randomised(Guided())), inputs() | {"cfg_scale": 4.0})
