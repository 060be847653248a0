"""The router against equations 4-6, written out."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from runtime.bundle.spec import RouterConfig
from runtime.routing.router import Router, rows_of_steps, sinusoid


def random_router(config: RouterConfig, dim: int = 24, time_dim: int = 10) -> Router:
    torch.manual_seed(0)
    router = Router(config, dim, time_dim)
    for parameter in router.parameters():
        parameter.data.normal_(std=0.5)
    return router


@pytest.mark.parametrize("modulation", ["full", "low_rank", "none"])
@pytest.mark.parametrize("tokens", [(3, 4), (40,), (50, 30)])
def test_logits_follow_the_equations(modulation, tokens):
    router = random_router(RouterConfig(hidden=16, modulation=modulation, activation="relu", rank=3))
    states = [torch.randn(2, length, 24) for length in tokens]
    time = torch.randn(2, 10)
    gate_logit, width_logits = router(states, time)
    for row in range(2):
        x = torch.cat([state[row] for state in states])
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + 1e-6).sqrt()
        if router.modulation is not None:
            gamma, delta = router.modulation(time[row]).chunk(2)
            x = (1 + gamma) * x + delta
        h = F.relu(x @ router.hidden.weight.T + router.hidden.bias)
        per_token_gate = h @ router.gate.weight.T + router.gate.bias
        per_token_width = h @ router.width.weight.T + router.width.bias
        torch.testing.assert_close(gate_logit[row], per_token_gate.mean(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(width_logits[row], per_token_width.mean(0), rtol=1e-4, atol=1e-4)


def test_shapes_and_names():
    router = Router(RouterConfig(), dim=32, time_dim=20)
    shapes = {name: tuple(parameter.shape) for name, parameter in router.named_parameters()}
    assert shapes == {
        "modulation.weight": (64, 20),
        "modulation.bias": (64,),
        "hidden.weight": (128, 32),
        "hidden.bias": (128,),
        "gate.weight": (1, 128),
        "gate.bias": (1,),
        "width.weight": (4, 128),
        "width.bias": (4,),
    }


def test_a_new_router_is_open_at_full_width_for_any_input():
    router = Router(RouterConfig(), dim=16, time_dim=8)
    gate_logit, width_logits = router([100 * torch.randn(32, 5, 16)], 100 * torch.randn(32, 8))
    assert (torch.sigmoid(gate_logit) > 0.8).all()
    assert (width_logits.argmax(1) == 3).all()


def test_one_time_embedding_serves_all_rows():
    router = random_router(RouterConfig())
    state, time = torch.randn(3, 200, 24), torch.randn(1, 10)
    torch.testing.assert_close(router([state], time), router([state], time.expand(3, -1)))


@pytest.mark.parametrize("tokens", [1, 3, 200])
def test_every_so_many_tokens_are_read(tokens: int):
    router, one = random_router(RouterConfig(token_stride=4)), random_router(RouterConfig())
    states, time = [torch.randn(2, tokens, 24), torch.randn(2, 9, 24)], torch.randn(2, 10)
    torch.testing.assert_close(router(states, time), one([state[:, ::4] for state in states], time))


def test_rows_do_not_see_each_other():
    router = random_router(RouterConfig())
    state, time = torch.randn(4, 7, 24), torch.randn(4, 10)
    both, alone = router([state], time), router([state[2:3]], time[2:3])
    torch.testing.assert_close(both[0][2], alone[0][0])


def test_sinusoid_is_distinct_and_bounded():
    embedding = sinusoid(torch.tensor([0.0, 1.0, 999.0]), 64)
    assert embedding.shape == (3, 64)
    assert embedding[0].tolist() == [1.0] * 32 + [0.0] * 32
    assert (embedding[1] - embedding[2]).norm() > 1


def test_a_timestep_for_every_row():
    assert rows_of_steps(torch.tensor([3, 1]), 2).tolist() == [3, 1]
    assert rows_of_steps(torch.tensor([[3.0, 1.0], [0.0, 4.0]]), 2).tolist() == [2, 2]
    assert rows_of_steps(torch.tensor([9.0, 3.0, 0.0]), 2).tolist() == [4]
    assert rows_of_steps(torch.tensor(5), 2).tolist() == [5]


@pytest.mark.parametrize(
    "change",
    [{"modulation": "film"}, {"activation": "no_such"}, {"time_activation": "none_such"}, {"token_stride": 0}],
)
def test_unknown_forms_are_refused(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))} is .*{next(iter(change.values()))}"):
        Router(RouterConfig(**change), 8, 8)


def test_odd_embedding_width_is_refused():
    with pytest.raises(ValueError, match="even"):
        sinusoid(torch.zeros(1), 7)
