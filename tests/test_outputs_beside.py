"""Models that give what is no float beside their latents."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import edit_compile
from tests.unprepared import UNTRAINED, Net, inputs

pytestmark = [*UNTRAINED, pytest.mark.filterwarnings("ignore:.*has no routers:UserWarning")]


class Telling(Net):
    """Says of each row whether it is done, and how many tokens are large."""

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        out: Tensor = super().forward(x, t)
        return out, out.mean((1, 2)) > 0, (out.abs().amax(2) > 0.5).sum(1)


@torch.no_grad()
def test_bools_and_whole_numbers_come_as_the_model_gives_them() -> None:
    model = Telling().eval()
    compiled = edit_compile.compile(model, inputs=inputs(2), engine="torch")
    given = inputs(6, seed=3)
    latents, done, count = compiled(**given)
    expected = model(**given)
    torch.testing.assert_close(latents, expected[0])
    assert done.dtype == torch.bool and done.any() and not done.all() and torch.equal(done, expected[1])
    assert torch.equal(count, expected[2])
