"""What a model's forward writes to the modules in it is not the same in every call, and is never baked in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import edit_compile
from edit_compile.compiling.tracer import CompileError
from tests.unprepared import DIM, UNTRAINED, Block, Net, inputs, reasons

pytestmark = [*UNTRAINED, pytest.mark.filterwarnings("ignore:.*has no routers:UserWarning")]


class Counted(Block):
    """Reads a number out of a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("n", torch.tensor(3))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + self.attend(x + c[:, None])
        return x + self.mlp(x) * (1.0 if int(self.n) == 3 else 0.1 * int(self.n))


class Written(Net):
    """Writes into the buffers, from an argument."""

    block = Counted

    def forward(self, x: Tensor, t: Tensor, k: Tensor) -> Tensor:
        y, c = self.start(x, t)
        for block in self.blocks:
            block.n.copy_(k)
            y = block(y, c)
        return self.head(y)


class Replaced(Written):
    """Puts the argument in the place of the buffers."""

    def forward(self, x: Tensor, t: Tensor, k: Tensor) -> Tensor:
        y, c = self.start(x, t)
        for block in self.blocks:
            block.n = k
            y = block(y, c)
        return self.head(y)


@pytest.mark.parametrize("make", [Written, Replaced])
def test_a_buffer_that_the_model_writes_is_not_read_once_and_for_all(make: Any) -> None:
    with pytest.raises(CompileError, match="reads numbers of its n"):
        edit_compile.compile(make().eval(), inputs=inputs() | {"k": torch.tensor(3)}, engine="torch")


class Rope(nn.Module):
    """A table, and a plain number beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(64, DIM, generator=torch.Generator().manual_seed(1)))
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.table[: x.shape[1]]


class Scaled(Net):
    """Sets the number from an argument, and gives blocks the module."""

    class block(Block):
        def forward(self, x: Tensor, c: Tensor, rope: nn.Module) -> Tensor:
            x = x + self.attend(rope(x) + c[:, None])
            return x + self.mlp(x)

    def __init__(self) -> None:
        super().__init__()
        self.rope = Rope()

    def forward(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        y, c = self.start(x, t)
        self.rope.scale = float(s)
        for block in self.blocks:
            y = block(y, c, self.rope)
        return self.head(y)


def test_a_module_with_a_number_that_the_model_sets_is_refused_by_its_name() -> None:
    told = reasons(Scaled(), inputs() | {"s": torch.tensor(1.0)})
    assert any("argument 'rope' is a Rope whose scale changes from call to call" in one for one in told)


def test_a_dump_leaves_the_files_of_others(tmp_path: Path) -> None:
    (tmp_path / "01-prompts.txt").write_text("a prompt")
    for _ in range(2):
        edit_compile.compile(Net().eval(), inputs=inputs(), dry_run=True, dump=tmp_path)
    assert (tmp_path / "01-prompts.txt").read_text() == "a prompt"
    assert (tmp_path / "01-discover.txt").read_text().startswith("after discover: ")
