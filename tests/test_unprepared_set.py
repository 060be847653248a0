"""What a model's forward sets on its blocks, or on what they are given, from its arguments is never baked in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import edit_compile
from tests.unprepared import DIM, UNTRAINED, Block, Net, guarded, inputs, reasons

pytestmark = [*UNTRAINED, pytest.mark.filterwarnings("ignore:.*has no routers:UserWarning")]


def given(value: Any = 1.0, batch: int = 2) -> dict[str, Any]:
    return inputs(batch) | {"s": torch.tensor(value)}


class Slotted:
    """Holds what it does without a dictionary, in a module whose name begins as torch's does."""

    __module__ = "torch_like"
    __slots__ = ("scale",)

    def __init__(self, scale: float) -> None:
        self.scale = scale


def _number(scale: Any) -> Any:
    if isinstance(scale, Slotted):
        return scale.scale
    return float(scale[0]) if isinstance(scale, np.ndarray) else scale[0] if isinstance(scale, tuple) else scale


class Rope(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.ones(64, DIM))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table[: x.shape[1]]


class Roped(Net):
    """Gives blocks a module, and writes its table when an argument's value is another than before."""

    class block(Block):
        def forward(self, x: Tensor, c: Tensor, rope: nn.Module) -> Tensor:
            return x + self.mlp(rope(x) + self.attend(x + c[:, None]))

    def __init__(self) -> None:
        super().__init__()
        self.rope, self.last = Rope(), 1.0

    def set(self, s: Tensor) -> None:
        if float(s) != self.last:
            self.last = float(s)
            self.rope.table.fill_(self.last)

    def forward(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        y, c = self.start(x, t)
        self.set(s)
        for block in self.blocks:
            y = block(y, c, self.rope)
        return self.head(y)


class Same(Roped):
    """Writes the same numbers in every call, and reads the argument for nothing."""

    def set(self, s: Tensor) -> None:
        float(s)
        self.rope.table.fill_(0.5)


def test_a_table_that_is_written_when_an_argument_changes_is_not_baked_in() -> None:
    told = reasons(Roped(), given())
    assert any("argument 'rope' is a Rope whose table changes from call to call" in one for one in told)


def test_a_table_that_is_always_written_alike_is_fine() -> None:
    guarded(Same(), given(), given(2.0), given(2.0, batch=3))


class Scaled(Net):
    """Sets a number of its blocks from an argument."""

    class block(Block):
        def __init__(self) -> None:
            super().__init__()
            self.scale: Any = 1.0
            self.register_buffer("gain", torch.ones(1))

        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            x = x + self.attend(x + c[:, None])
            return x + self.mlp(x) * self.gain * _number(self.scale)

    def set(self, block: Any, s: Tensor, size: int) -> None:
        block.scale = float(s)

    def forward(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        y, c = self.start(x, t)
        for block in self.blocks:
            self.set(block, s, x.shape[1])
            y = block(y, c)
            self.unset(block)
        return self.head(y)

    def unset(self, block: Any) -> None:
        pass


class Listed(Scaled):
    """In a tuple."""

    def set(self, block: Any, s: Tensor, size: int) -> None:
        block.scale = (float(s), size)


class Held(Scaled):
    """As a tensor that is no buffer."""

    def set(self, block: Any, s: Tensor, size: int) -> None:
        block.scale = s


class InAnArray(Scaled):
    """In an array of numpy's."""

    def set(self, block: Any, s: Tensor, size: int) -> None:
        block.scale = np.full(1, float(s), dtype=np.float32)


class InSlots(Scaled):
    """In an object that has slots."""

    def set(self, block: Any, s: Tensor, size: int) -> None:
        block.scale = Slotted(float(s))


class ForAWhile(Scaled):
    """Takes it back after the block's call."""

    def unset(self, block: Any) -> None:
        block.scale = 1.0


class Gain(Scaled):
    """Writes into a buffer that the block computes with."""

    def set(self, block: Any, s: Tensor, size: int) -> None:
        block.gain.copy_(s)


@pytest.mark.parametrize("make", [Scaled, Listed, Held, InAnArray, InSlots, ForAWhile, Gain])
def test_an_attribute_that_follows_from_an_argument_is_not_baked_in(make: Any) -> None:
    told = reasons(make(), given())
    name = "gain" if make is Gain else "scale"
    assert all(f"its {name} changes from call to call: pass what" in one for one in told if one.startswith("blocks."))


class Constant(Scaled):
    """Sets the same in every call."""

    def set(self, block: Any, s: Tensor, size: int) -> None:
        block.scale = 0.5


class OfShapes(Scaled):
    """Sets what is made of shapes alone."""

    def set(self, block: Any, s: Tensor, size: int) -> None:
        block.scale = (1.0 / size, size)


class Unread(Scaled):
    """Sets what no block reads."""

    def set(self, block: Any, s: Tensor, size: int) -> None:
        block.seen = float(s)


@pytest.mark.parametrize("make", [Constant, OfShapes, Unread])
def test_an_attribute_that_no_argument_sets_is_fine(make: Any) -> None:
    guarded(make(), given(), given(3.0), given(3.0, batch=3))


def test_an_attribute_of_shapes_is_another_in_another_form() -> None:
    with torch.no_grad():
        model = OfShapes().eval()
        compiled = edit_compile.compile(model, inputs=given(), engine="torch")
        for tokens in (9, 5, 9):
            other = inputs(2, tokens) | {"s": torch.tensor(1.0)}
            torch.testing.assert_close(compiled(**other), model(**other), rtol=1e-4, atol=1e-5)


class Stepped(Scaled):
    """Sets something else beyond a threshold, which no recorded value is."""

    def set(self, block: Any, s: Tensor, size: int) -> None:
        block.scale = 3.0 if float(s) > 100 else 1.0


def test_an_attribute_that_is_another_beyond_a_threshold_is_looked_at_in_every_call() -> None:
    with torch.no_grad():
        model = Stepped().eval()
        compiled = edit_compile.compile(model, inputs=given(), engine="torch")
        for value in (1.0, 200.0, 1.0, 300.0):
            torch.testing.assert_close(compiled(**given(value)), model(**given(value)), rtol=1e-4, atol=1e-5)
        assert len(compiled.program.manifest.plans) == 2


class OwnSize(Net):
    """Blocks set an attribute and read it."""

    class block(Block):
        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            self.rows, self.size = x.shape[:2]
            return self.inner(x + self.attend(x + c[:, None]))

        def inner(self, x: Tensor) -> Tensor:
            return x + self.mlp(x) * self.size / x.reshape(self.rows, -1).shape[1]


def test_an_attribute_that_a_block_sets_before_it_reads_it_is_fine() -> None:
    guarded(OwnSize(), inputs(), inputs(3))


class Bounded(Block):
    """Clamps at a bound of its own that what is recorded does not reach."""

    bound: Any = 1e4

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + self.attend(x + c[:, None])
        return self.mlp(x) + x.clamp(max=self.upper())

    def upper(self) -> float:
        return self.bound


class BoundOfBuffer(Bounded):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("most", torch.tensor(1e4))

    def upper(self) -> float:
        return float(self.most)


class BoundInAList(Bounded):
    def upper(self) -> float:
        return self.bounds["max"][0]


def of_number(block: Any, value: float) -> None:
    block.bound = value


def of_buffer(block: Any, value: float) -> None:
    block.most.fill_(value)


def of_list(block: Any, value: float) -> None:
    block.bounds = {"max": [value]}


def of_tensor(block: Any, value: float) -> None:
    block.bound = torch.tensor(value)


@pytest.mark.parametrize(
    ("make", "change"),
    [(Bounded, of_number), (BoundOfBuffer, of_buffer), (BoundInAList, of_list), (Bounded, of_tensor)],
)
def test_blocks_with_other_numbers_share_no_baked_in_one(make: Any, change: Any) -> None:
    class Two(Net):
        block = make

    model, large = Two().eval(), inputs() | {"x": 1e5 * inputs()["x"]}
    for block, bound in zip(model.blocks, (1e4, 1e3), strict=True):
        change(block, bound)
    compiled = edit_compile.compile(model, inputs=inputs(), engine="torch")
    with torch.no_grad():
        for kwargs in (inputs(), large):
            torch.testing.assert_close(compiled(**kwargs), model(**kwargs), rtol=1e-4, atol=1e-4)


class Numbered(Net):
    """Blocks know their place, and do not go by it."""

    def __init__(self) -> None:
        super().__init__()
        for index, block in enumerate(self.blocks):
            block.index = index


def test_a_number_that_no_block_reads_makes_no_group_of_its_own() -> None:
    compiled = edit_compile.compile(Numbered().eval(), inputs=inputs(), engine="torch")
    assert len(compiled.program.manifest.plans) == 1
