"""Every output of a block is tied to the input that it continues, or the block is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from passes.graphs.graph import BlockSite
from passes.observe.discover import discover
from passes.observe.residuals import find_states, leaf_paths
from tests.models import noise, randomised, tiny_dit, tiny_flux, tiny_plain, tiny_sd3

DIM = 8


class Two(nn.Module):
    """Two streams; `merge` makes what it returns of them."""

    def __init__(self, merge: Callable[..., object]) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.merge = merge

    def forward(self, a: Tensor, b: Tensor, vector: Tensor) -> object:
        return self.merge(self, a, b, vector[:, None])


class Pair(nn.Module):
    """Runs its blocks on two streams of equal shape."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, a: Tensor, b: Tensor, timestep: Tensor) -> Tensor:
        vector = timestep[:, None].cos().expand(-1, DIM)
        for block in self.blocks:
            block(a, b, vector)
        return a + b


def sites(*merges: Callable[..., object]) -> tuple[BlockSite, ...]:
    model = randomised(Pair(*(Two(merge) for merge in merges)))
    inputs = {"a": noise(2, 5, DIM), "b": noise(2, 5, DIM, seed=5), "timestep": torch.tensor([0.8, 0.3])}
    found, _ = discover(model, inputs)
    assert len(found.blocks) == len(merges)
    return found.blocks


def pairs(merge: Callable[..., object]) -> tuple[tuple[int, int], ...]:
    states, report = find_states(sites(merge)[0])
    assert bool(report.done) == bool(states.pairs) != bool(report.refused)
    return states.pairs


def refusal(merge: Callable[..., object]) -> str:
    states, report = find_states(sites(merge)[0])
    assert states.pairs == ()
    return report.refused[0].reason


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (tiny_flux, [((0, 1), (1, 0))] * 4),
        (tiny_dit, [((0, 0),)] * 3),
        (tiny_sd3, [((0, 1), (1, 0))] * 2 + [((1, 0),)]),
        (tiny_plain, [((0, 0),)] * 3),
    ],
)
def test_states_of_a_transformer(make: Callable, expected: list) -> None:
    found, _ = discover(*make(1))
    assert [find_states(site)[0].pairs for site in found.blocks] == expected


def test_order_of_outputs_is_followed() -> None:
    assert pairs(lambda m, a, b, v: (a + m.left(b) * v, b + m.right(a))) == ((0, 0), (1, 1))
    assert pairs(lambda m, a, b, v: (b + m.left(b) * v, a + m.right(a))) == ((0, 1), (1, 0))
    assert pairs(lambda m, a, b, v: {"late": b + m.left(a * v), "early": None}) == ((0, 1),)


def test_a_constant_shift_of_the_stream_is_still_a_residual() -> None:
    assert pairs(lambda m, a, b, v: (a + b) + m.left(a) * v) == ()
    assert pairs(lambda m, a, b, v: (a + v) + m.left(a)) == ((0, 0),)


def test_outputs_that_continue_nothing_are_refused() -> None:
    assert "vanishes" in refusal(lambda m, a, b, v: m.left(a) * v)
    assert "vanishes" in refusal(lambda m, a, b, v: (a + m.left(b), m.right(a)))
    assert "vanishes" in refusal(lambda m, a, b, v: nn.functional.layer_norm(a + m.left(b), (DIM,)))
    assert "same input" in refusal(lambda m, a, b, v: (a + m.left(b), a + m.right(b)))
    assert "no tensor" in refusal(lambda m, a, b, v: (a + m.left(b), 3))


def test_sum_of_two_streams_is_refused() -> None:
    assert "more than one input" in refusal(lambda m, a, b, v: a + b + m.left(a))


class Chain(nn.Module):
    """Runs its blocks one after the other; the second argument is the same for all."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, a: Tensor, b: Tensor, timestep: Tensor) -> Tensor:
        vector = timestep[:, None].cos().expand(-1, DIM)
        for block in self.blocks:
            a = block(a, b, vector)
        return a


def chain(merge: Callable[..., object], count: int = 2) -> tuple[BlockSite, ...]:
    model = randomised(Chain(*(Two(merge) for _ in range(count))))
    inputs = {"a": noise(2, 5, DIM), "b": noise(2, 5, DIM, seed=5), "timestep": torch.tensor([0.8, 0.3])}
    return discover(model, inputs)[0].blocks


def both(m: Two, a: Tensor, b: Tensor, v: Tensor) -> Tensor:
    a = a + b
    return a + m.left(a) * v


def test_of_two_inputs_that_pass_the_state_is_what_another_block_made() -> None:
    first, second = chain(both)
    assert find_states(second, (first, second))[0].pairs == ((0, 0),)
    assert find_states(first, (first, second))[0].pairs == ((0, 0),), "as the class agrees"


def test_of_two_inputs_that_no_block_made_neither_is_the_state() -> None:
    (alone,) = chain(both, 1)
    assert find_states(alone, (alone,))[0].pairs == ()
    first, second = sites(both, both)  # each is called with the same two inputs
    assert find_states(second, (first, second))[0].pairs == ()


def test_of_two_inputs_that_other_blocks_made_neither_is_the_state() -> None:
    class Cross(Chain):
        def forward(self, a: Tensor, b: Tensor, timestep: Tensor) -> Tensor:
            one, two, three = self.blocks
            vector = timestep[:, None].cos().expand(-1, DIM)
            return three(one(a, a, vector), two(b, b, vector), vector)

    class Other(Two):
        pass

    plain = [Other(lambda m, a, b, v: a + m.left(b) * v) for _ in range(2)]
    model = randomised(Cross(*plain, Two(both)))
    inputs = {"a": noise(2, 5, DIM), "b": noise(2, 5, DIM, seed=5), "timestep": torch.tensor([0.8, 0.3])}
    blocks = discover(model, inputs)[0].blocks
    assert "more than one" in find_states(blocks[2], blocks)[1].refused[0].reason


class Masked(Chain):
    """Pads the streams with zeros, as its blocks do again."""

    def forward(self, a: Tensor, b: Tensor, timestep: Tensor) -> Tensor:
        mask = torch.ones(len(a), a.shape[1], DIM)
        mask[:, -2:] = 0
        return super().forward(a * mask, mask, timestep)


def masked_pairs(merge: Callable[..., object]) -> tuple[tuple[int, int], ...]:
    model = randomised(Masked(Two(merge), Two(merge)))
    inputs = {"a": noise(2, 5, DIM), "b": noise(2, 5, DIM, seed=5), "timestep": torch.tensor([0.8, 0.3])}
    return find_states(discover(model, inputs)[0].blocks[0])[0].pairs


def test_a_residual_under_a_mask_is_shown_by_its_recorded_inputs() -> None:
    assert masked_pairs(lambda m, a, b, v: (a + m.left(a) * v) * b) == ((0, 0),)


def test_a_product_with_what_does_not_mask_its_input_is_no_residual() -> None:
    assert masked_pairs(lambda m, a, b, v: (a + m.left(a)) * b * v) == ()
    assert masked_pairs(lambda m, a, b, v: m.left(a) * b) == ()
    assert masked_pairs(lambda m, a, b, v: (b + m.left(a)) * b * b) == ((0, 1),)


def test_an_input_that_is_all_zero_is_shown_by_nothing() -> None:
    class Zero(Chain):
        def forward(self, a: Tensor, b: Tensor, timestep: Tensor) -> Tensor:
            return super().forward(a, 0 * b, timestep)

    model = randomised(Zero(Two(lambda m, a, b, v: m.left(a) * v)))
    inputs = {"a": noise(2, 5, DIM), "b": noise(2, 5, DIM, seed=5), "timestep": torch.tensor([0.8, 0.3])}
    assert find_states(discover(model, inputs)[0].blocks[0])[0].pairs == ()


def test_parameters_are_left_alone() -> None:
    (site,) = sites(lambda m, a, b, v: a + m.left(b))
    before = {name: value.clone() for name, value in site.module.state_dict().items()}
    find_states(site)
    for name, value in site.module.state_dict().items():
        assert torch.equal(value, before[name])


def skip(m: Two, a: Tensor, b: Tensor, v: Tensor) -> Tensor:
    a = m.right(a + b)
    return a + m.left(a) * v


def test_a_skip_block_borrows_the_proof_of_its_class() -> None:
    plain, mixing = sites(lambda m, a, b, v: a + m.left(a) * v, skip)
    assert find_states(mixing)[0].pairs == ()
    states, report = find_states(mixing, (plain, mixing))
    assert states.pairs == ((0, 0),)
    assert plain.name in report.done[0]


def test_no_proof_is_borrowed_from_another_class() -> None:
    class Other(Two):
        pass

    model = randomised(Pair(Other(lambda m, a, b, v: a + m.left(a)), Two(skip)))
    found, _ = discover(
        model, {"a": noise(2, 5, DIM), "b": noise(2, 5, DIM, seed=5), "timestep": torch.tensor([0.8, 0.3])}
    )
    assert find_states(found.blocks[1], found.blocks)[0].pairs == ()


def test_no_proof_is_borrowed_for_another_structure() -> None:
    plain, mixing = sites(lambda m, a, b, v: (a + m.left(a), b), skip)
    assert find_states(plain)[0].pairs == ((0, 0), (1, 1))
    assert find_states(mixing, (plain,))[0].pairs == ()


def test_paths_name_the_arguments() -> None:
    found, _ = discover(*tiny_flux(1))
    assert leaf_paths(found.blocks[0].calls[0])[:3] == [
        "[1]['hidden_states']",
        "[1]['encoder_hidden_states']",
        "[1]['temb']",
    ]
