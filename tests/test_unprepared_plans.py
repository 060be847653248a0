"""Where values set sizes, or the model's own Python is the glue, a plan is not chosen by shapes that two plans take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import edit_compile
from tests.unprepared import DIM, UNTRAINED, Block, Net, close, inputs

pytestmark = [*UNTRAINED, pytest.mark.filterwarnings("ignore:.*has no routers:UserWarning")]


class Told(Net):
    """Adds as many tokens as a mask tells, and gives its blocks a number."""

    class block(Block):
        def forward(self, x: Tensor, c: Tensor, gain: float) -> Tensor:
            return x + gain * self.mlp(x + self.attend(x + c[:, None]))

    def length(self, mask: Tensor) -> int:
        return max(mask.sum(1).tolist())

    def gain(self, gain: float, mask: Tensor) -> float:
        return gain

    def forward(self, x: Tensor, t: Tensor, mask: Tensor, gain: float = 1.0) -> Tensor:
        y, c = self.start(x, t)
        length = self.length(mask)
        y = torch.cat([y, torch.ones(len(y), length, DIM)], 1)
        for block in self.blocks:
            y = block(y, c, self.gain(gain, mask))
        return self.head(y[:, : y.shape[1] - length])


class Plainly(Told):
    """In its own Python."""

    def length(self, mask: Tensor) -> int:
        length = int(mask.sum(1).max())
        return length if length < 100 else 0


class ByValue(Plainly):
    """The number follows from an argument's values."""

    def gain(self, gain: float, mask: Tensor) -> float:
        return gain if int(mask.sum()) % 2 else 2 * gain


def told(length: int, gain: float = 1.0, first: int = 2) -> dict[str, Any]:
    mask = (torch.arange(6)[None] < torch.tensor([first, length])[:, None]).long()
    return inputs() | {"mask": mask, "gain": gain}


@pytest.mark.parametrize("make", [Told, Plainly, ByValue])
def test_a_plan_with_another_number_of_the_same_shapes_is_not_chosen(make: Any) -> None:
    with torch.no_grad():
        model = make().eval()
        compiled = edit_compile.compile(model, inputs=told(4), engine="torch")
        for given in (told(4), told(4, 2.0), told(4), told(5), told(5, 2.0), told(5, first=1), told(4, 2.0), told(3)):
            close(compiled(**given), model(**given))
