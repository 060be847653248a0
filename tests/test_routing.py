from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from runtime.bundle.spec import RouterConfig
from runtime.routing.folded import FoldedRouter, Routers
from runtime.routing.router import Router, sinusoid

D, E = 24, 10


def randomised(router: Router, seed: int = 0) -> Router:
    torch.manual_seed(seed)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return router


@pytest.mark.parametrize("modulation", ["full", "low_rank", "none"])
@pytest.mark.parametrize("activation", ["silu", "relu", "gelu"])
@pytest.mark.parametrize("tokens", [(3,), (7, 40), (300,)])
@pytest.mark.parametrize("rows", [1, 3])
def test_folded_equals_the_router(modulation: str, activation: str, tokens: tuple[int, ...], rows: int) -> None:
    config = RouterConfig(hidden=16, activation=activation, modulation=modulation, rank=4)
    router = randomised(Router(config, D, E))
    states = [torch.randn(rows, n, D) * 3 + 1 for n in tokens]
    for time in (torch.randn(rows, E), torch.randn(1, E)):
        with torch.no_grad():
            gate, width = router(states, time)
            logits = FoldedRouter(config, router.state_dict())(states, time)
        torch.testing.assert_close(logits, torch.cat([gate[:, None], width], 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("modulation", ["full", "low_rank"])
def test_the_time_embedding_goes_through_its_activation(modulation: str) -> None:
    plain = RouterConfig(hidden=16, modulation=modulation, rank=4)
    config = replace(plain, time_activation="relu")
    router = randomised(Router(config, D, E))
    states, time = [torch.randn(2, 30, D)], torch.randn(2, E)
    with torch.no_grad():
        gate, width = router(states, time)
        folded, of_relu = FoldedRouter(config, router.state_dict()), FoldedRouter(plain, router.state_dict())
        torch.testing.assert_close(folded(states, time), torch.cat([gate[:, None], width], 1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(folded(states, time), of_relu(states, time.clamp(min=0)))
        assert not torch.allclose(folded(states, time), of_relu(states, time), rtol=1e-2)


def test_strided_states_are_read_as_they_are() -> None:
    config = RouterConfig(hidden=16)
    router = randomised(Router(config, D, E))
    joined, time = torch.randn(2, 30, D), torch.randn(2, E)
    parts = [joined[:, :10], joined[:, 10:]]
    with torch.no_grad():
        gate, _ = router([joined], time)
        logits = FoldedRouter(config, router.state_dict())(parts, time)
    torch.testing.assert_close(logits[:, 0], gate, rtol=1e-4, atol=1e-5)


def test_dimensions_between_rows_and_channels_are_tokens() -> None:
    config = RouterConfig(hidden=16)
    router = randomised(Router(config, D, E))
    tall, flat, time = torch.randn(2, 3, 4, D), torch.randn(2, 5, D), torch.randn(2, E)
    with torch.no_grad():
        expected = router([tall.flatten(1, 2), flat], time)
        gate, width = router([tall, flat], time)
        logits = FoldedRouter(config, router.state_dict())([tall, flat], time)
    torch.testing.assert_close(gate, expected[0])
    torch.testing.assert_close(logits, torch.cat([gate[:, None], width], 1), rtol=1e-4, atol=1e-5)


def test_bfloat16_stays_near_float32() -> None:
    config = RouterConfig(hidden=64)
    router = randomised(Router(config, D, E))
    states, time = [torch.randn(2, 100, D)], torch.randn(2, E)
    half = {name: tensor.bfloat16() for name, tensor in router.state_dict().items()}
    with torch.no_grad():
        gate, _ = router(states, time)
        logits = FoldedRouter(config, half)([s.bfloat16() for s in states], time.bfloat16())
    torch.testing.assert_close(logits[:, 0].float(), gate, rtol=0.05, atol=0.1)


def test_many_tokens_do_not_overflow_half_precision() -> None:
    config = RouterConfig(hidden=8, modulation="none")
    own = {name: tensor.half() for name, tensor in randomised(Router(config, D, E)).state_dict().items()}
    own["hidden.bias"].fill_(100.0)
    with torch.no_grad():
        logits = FoldedRouter(config, own)([torch.randn(1, 2000, D).half()], torch.zeros(1, E).half())
    assert logits.dtype == torch.float16
    assert torch.isfinite(logits).all()


def test_routers_belong_to_their_blocks() -> None:
    config = RouterConfig(hidden=8, time_dim=6)
    routers = [randomised(Router(config, D, 6), seed) for seed in range(12)]
    parameters = {f"{i}.{name}": t for i, r in enumerate(routers) for name, t in r.state_dict().items()}
    folded = Routers(config, 12, parameters)
    states, timestep = [torch.randn(2, 5, D)], torch.tensor([0.7, 0.3])
    torch.testing.assert_close(folded.embed(timestep, 2), sinusoid(timestep, 6))
    for index in (1, 10, 11):
        with torch.no_grad():
            gate, _ = routers[index](states, folded.embed(timestep, 2))
            logits = folded(index, states, folded.embed(timestep, 2))
        torch.testing.assert_close(logits[:, 0], gate, rtol=1e-4, atol=1e-5)
