"""Doubling a batch: where it may be, in what order it is guessed, and that the run decides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from passes.graphs.batch_layout import Samples
from passes.graphs.graph import Discovery
from passes.observe.batch_probe import batches_of, double, doublings, opaque, told_by
from passes.observe.discover import DiscoveryError, discover
from tests.models import noise, randomised

DIM = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, extra: Tensor) -> Tensor:
        return x + self.inner(x + extra)


class Model(nn.Module):
    """Adds what `read` makes of its other arguments to every token of x (B, L, D)."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block()])

    def forward(self, x: Tensor, timestep: Tensor, **others: Any) -> Tensor:
        extra = self.read(x, **others) + timestep.float().mean() * 0
        return self.blocks[0](x, extra)


def discovered(model: nn.Module, step: Tensor | None = None, **inputs: Any) -> Discovery:
    steps = torch.tensor([0.8, 0.3]) if step is None else step
    return discover(randomised(model), {"x": noise(2, 5, DIM), "timestep": steps} | inputs)[0]


def test_a_batch_in_a_later_dimension() -> None:
    class Layers(Model):
        def read(self, x: Tensor, layers: Tensor) -> Tensor:
            return layers.sum(0).reshape(x.shape)

    found = discovered(Layers(), layers=noise(3, 2, 5, DIM))
    assert found.runs[1].kwargs["layers"].shape == (3, 4, 5, DIM)
    assert found.blocks[0].batch_dims == {0: 0, 1: 0}
    assert found.samples == Samples(("x",), 0)


def test_a_first_dimension_that_equals_the_batch_by_accident() -> None:
    class Pair(Model):
        def read(self, x: Tensor, cache: dict[int, Tensor], sizes: list[int]) -> Tensor:
            first, second = cache[0].unbind(0)
            one, other = sizes
            return first * one + second * other

    found = discovered(Pair(), cache={0: noise(2, 2, 5, DIM)}, sizes=[1, 3])
    assert found.runs[1].kwargs["cache"][0].shape == (2, 4, 5, DIM)
    assert found.runs[1].kwargs["sizes"] == [1, 3]


def test_tuples_in_a_list_as_long_as_the_batch() -> None:
    class Listed(Model):
        def read(self, x: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
            return sum(value * mask[..., None] for value, mask in pairs)

    pair = (noise(2, 5, DIM), torch.ones(2, 5))
    found = discovered(Listed(), pairs=[pair, pair])
    assert [tuple(leaf.shape) for leaf in found.runs[1].kwargs["pairs"][1]] == [(4, 5, DIM), (4, 5)]


def test_a_timestep_that_holds_levels_of_noise() -> None:
    class Levels(Model):
        def forward(self, x: Tensor, timestep: Tensor, index: Tensor) -> Tensor:
            return self.blocks[0](x, timestep[index, None].expand(-1, DIM))

    found = discovered(Levels(), torch.tensor([0.9, 0.4, 0.1]), index=torch.tensor([0, 0, 1, 2, 2]))
    assert [run.batch for run in found.runs] == [2, 4]
    assert found.runs[1].kwargs["timestep"].shape == (3,)
    assert found.blocks[0].batch_dims == {0: 0}
    assert found.blocks[0].time is None


def test_levels_as_many_as_samples_by_accident() -> None:
    class Levels(Model):
        def forward(self, x: Tensor, timestep: Tensor, index: Tensor) -> Tensor:
            return self.blocks[0](x, timestep.reshape(2)[index, None].expand(-1, DIM))

    found = discovered(Levels(), torch.tensor([0.9, 0.4]), index=torch.tensor([0, 0, 1, 1, 1]))
    assert found.runs[1].kwargs["timestep"].shape == (2,)
    assert found.runs[1].kwargs["x"].shape[0] == 4


def test_samples_folded_into_an_argument() -> None:
    class Frames(Model):
        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            x = x.unflatten(0, (timestep.shape[0], -1)).flatten(1, 2)
            return self.blocks[0](x, timestep[:, None, None].expand(-1, 1, DIM)).reshape(-1, 5, DIM)

    found = discovered(Frames(), x=noise(6, 5, DIM))
    assert found.runs[1].kwargs["x"].shape == (12, 5, DIM)
    assert found.blocks[0].calls[1].leaves[0].shape == (4, 15, DIM)
    assert found.samples == Samples(("timestep",), 0)


def test_a_batch_that_nothing_doubles_names_what_stood_in_the_way() -> None:
    class Cache:
        def __init__(self) -> None:
            self.value = noise(2, 5, DIM)

    class Cached(Model):
        def read(self, x: Tensor, cache: Cache) -> Tensor:
            return cache.value

    with pytest.raises(DiscoveryError, match=r"batch of 2 could not be doubled .*size.*cache holds a Cache"):
        discovered(Cached(), cache=Cache())


def test_the_likeliest_guess_comes_first_and_none_twice() -> None:
    inputs = {"x": noise(2, 5, DIM), "timestep": torch.tensor([0.8, 0.3]), "table": noise(7, 2), "n": 3}
    shapes = [
        (len(way["x"]), tuple(way["table"].shape), len(way["timestep"])) for way in doublings(inputs, "timestep", 2)
    ]
    assert shapes[:2] == [(4, (7, 2), 4), (4, (7, 4), 4)]
    assert len(set(shapes)) == len(shapes)
    assert list(doublings({"timestep": 3, "n": 1}, "timestep", 2)) == [{"timestep": 3, "n": 1}]


def test_candidates_for_the_batch() -> None:
    inputs = {"x": noise(2, 5), "ids": torch.ones(9, 3, dtype=torch.long), "t": torch.tensor([0.1, 0.2, 0.3])}
    assert batches_of(inputs, "t") == [3, 2]
    assert batches_of(inputs | {"t": 0.5}, "t") == [2]
    assert batches_of({"t": torch.tensor(0.5)}, "t") == []


def test_lists_of_lists_are_left_to_their_entries() -> None:
    assert double([[1, 2]], 2) == [[1, 2]]
    assert double([[1, 2], [3, 4]], 2) == [[1, 2], [3, 4], [1, 2], [3, 4]]
    assert double((1, 2), 2) == (1, 2)


def test_where_the_batch_is_told() -> None:
    given = {"n": 2, "x": noise(2, 3), "rows": [noise(3), noise(3)], "tree": {"a": (noise(4, 2),)}}
    doubled = {"n": 2, "x": noise(4, 3), "rows": [noise(3)] * 4, "tree": {"a": (noise(4, 4),)}}
    places = list(told_by(given, doubled, 2))
    assert places == [Samples(("x",), 0), Samples(("rows",), None), Samples(("tree", "a", 0), 1)]
    assert [place.count(doubled) for place in places] == [4, 4, 4]
    assert list(told_by(given, given, 2)) == []


def test_what_cannot_be_doubled() -> None:
    assert list(opaque({"x": noise(2), "y": [None, 3, "text"], "z": {"k": object()}})) == ["z holds a object"]
