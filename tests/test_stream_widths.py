"""Blocks with streams of different widths: routers read those as wide as the first, in training and when compiled."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import edit_compile
from edit_compile import RoutingPolicy
from runtime.bundle.spec import RouterConfig
from runtime.routing.folded import FoldedRouter
from runtime.routing.router import Router, read_streams
from tests.models import noise, randomised

VIDEO, AUDIO, TIME = 16, 6, 10


class Block(nn.Module):
    """A video stream, an audio stream that is less wide, and text as wide as the video; each sees the audio's mean."""

    def __init__(self) -> None:
        super().__init__()
        self.across = nn.Linear(AUDIO, VIDEO)
        self.modulate = nn.Linear(TIME, AUDIO)
        self.up, self.down = nn.Linear(VIDEO, 32), nn.Linear(32, VIDEO)
        self.audio_up, self.audio_down = nn.Linear(AUDIO, 12), nn.Linear(12, AUDIO)

    def forward(self, video: Tensor, audio: Tensor, text: Tensor, vector: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heard = self.across(audio.mean(1, keepdim=True) * self.modulate(vector)[:, None])
        video, text = (x + self.down(F.gelu(self.up(x + heard))) for x in (video, text))
        return video, audio + self.audio_down(F.gelu(self.audio_up(audio))), text


class Film(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, video: Tensor, audio: Tensor, text: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        vector = (t[:, None] * torch.arange(1, TIME + 1)).cos()
        for layer in self.layers:
            video, audio, text = layer(video, audio, text, vector)
        return video, audio, text


def inputs() -> dict[str, Tensor]:
    return {
        "video": noise(3, 7, VIDEO),
        "audio": noise(3, 4, AUDIO, seed=2),
        "text": noise(3, 5, VIDEO, seed=3),
        "t": torch.tensor([0.9, 0.5, 0.1]),
    }


@pytest.mark.parametrize(
    ("widths", "read"), [((8, 8), [0, 1]), ((8, 6), [0]), ((8, 6, 8), [0, 2]), ((6, 8, 8), [0])], ids=str
)
def test_streams_as_wide_as_the_first_are_read(widths: Sequence[int], read: Sequence[int]) -> None:
    states = [noise(2, 3 + at, width, seed=at) for at, width in enumerate(widths)]
    assert [stream.data_ptr() for stream in read_streams(states)] == [states[at].data_ptr() for at in read]


def test_both_forms_of_a_router_read_the_same() -> None:
    config = RouterConfig(hidden=8)
    router = randomised(Router(config, VIDEO, TIME))
    states, time = list(inputs().values())[:3], noise(3, TIME)
    with torch.no_grad():
        gate, width = router(states, time)
        expected = router([states[0], states[2]], time)
        folded = FoldedRouter(config, router.state_dict())(states, time)
    torch.testing.assert_close((gate, width), expected)
    torch.testing.assert_close(folded, torch.cat([gate[:, None], width], 1), rtol=1e-4, atol=1e-5)


def test_what_is_compiled_decides_as_what_was_trained() -> None:
    model, given = randomised(Film()), inputs()
    elastic = edit_compile.elasticize(model, given, config=RouterConfig(hidden=8))
    assert [(block.dim, len(block.states)) for block in elastic.layout.blocks] == [(VIDEO, 3)] * 2
    with torch.no_grad():
        for seed, router in enumerate(elastic.routers):
            randomised(router, seed + 3)
            router.gate.weight.mul_(40)
        expected = elastic(**given)
    compiled = edit_compile.compile(
        elastic, inputs=given, engine="torch", policy=RoutingPolicy(margin=0.0, max_reuse=0)
    )
    torch.testing.assert_close(compiled(**given), expected, rtol=1e-4, atol=1e-4)
    gates = elastic.routing.gate
    assert 0 < gates.sum() < gates.numel()  # some are skipped, some are not
