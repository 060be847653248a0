"""What blocks are given beside tensors of tokens: modules, numbers read out of tensors, enums, numbers of numpy."""

from __future__ import annotations

from enum import Enum, IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import edit_compile
from tests.unprepared import DIM, UNTRAINED, Block, Net, close, dry, guarded, inputs, masked, reasons

pytestmark = UNTRAINED


class Rope(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        table = torch.rand(9, DIM, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("cos", table, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.cos[: x.shape[1]]


class Turned(Block):
    def forward(self, x: Tensor, c: Tensor, rope: Any = None) -> Tensor:
        return super().forward(x, c, rope(x))


class Roped(Net):
    block = Turned

    def __init__(self) -> None:
        super().__init__()
        self.rope = Rope()

    def of(self, index: int, x: Tensor) -> Any:
        return self.rope

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y, c = self.start(x, t)
        for index, block in enumerate(self.blocks):
            y = block(y, c, self.of(index, x))
        return self.head(y)


def test_a_module_with_tables_is_baked_in(tmp_path: Path) -> None:
    model = Roped()
    compiled = guarded(model, inputs(), inputs(3), inputs(2, seed=5))
    compiled.save(tmp_path / "bundle")
    close(edit_compile.load(tmp_path / "bundle", engine="torch")(**inputs()), model(**inputs()))


class OneEach(Roped):
    """Gives every block a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.ropes = nn.ModuleList([Rope(1), Rope(2)])

    def of(self, index: int, x: Tensor) -> Any:
        return self.ropes[index]


def test_blocks_with_different_modules_keep_them_apart() -> None:
    guarded(OneEach(), inputs())


class Anew(Roped):
    """Makes a module in each call."""

    def of(self, index: int, x: Tensor) -> Any:
        return Rope(int(x[0, 0, 0] > 0))


class Rewritten(Roped):
    """Writes the argument's numbers into the table."""

    def of(self, index: int, x: Tensor) -> Any:
        if index == 0:
            self.rope.cos = x[0].mean() * torch.ones(9, DIM)
        return self.rope


class WrittenInto(Rewritten):
    def of(self, index: int, x: Tensor) -> Any:
        if index == 0:
            self.rope.cos.fill_(x[0].mean())
        return self.rope


class Learned(Roped):
    def __init__(self) -> None:
        super().__init__()
        self.rope.cos = nn.Parameter(self.rope._buffers.pop("cos"))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (Anew, r"argument 'rope' \(a Rope\) is no tensor and differs between runs"),
        (Rewritten, "argument 'rope' is a Rope whose cos changes from call to call"),
        (WrittenInto, "argument 'rope' is a Rope whose cos changes from call to call"),
        (Learned, "argument 'rope' is a Rope with parameters: hold it in the block, or pass what it gives"),
    ],
)
def test_a_module_that_changes_is_refused_by_its_name(make: Any, said: str) -> None:
    import re

    assert all(re.search(said, reason) for reason in reasons(make(), inputs()))


class OnGrid(Block):
    """Reads the size of each sample's grid in Python."""

    def forward(self, x: Tensor, c: Tensor, grid: Any = None, table: Any = None) -> Tensor:
        rows = []
        for row, (h, w) in enumerate(grid.tolist()):
            place = torch.cat([table[:h, None].expand(h, w, -1), table[None, :w].expand(h, w, -1)], -1)
            rows.append(x[row, : h * w] * (1 + 0.3 * place.reshape(h * w, -1)))
        return super().forward(x, c, torch.stack(rows))


class Read(Block):
    """Reads it as one tensor of all samples."""

    def forward(self, x: Tensor, c: Tensor, grid: Any = None, table: Any = None) -> Tensor:
        h = int(grid[0].max())
        kept = x[:, :h] * table[: int(grid[0, 1]), None].mean()
        return super().forward(x, c, torch.cat([kept, x[:, h:]], 1))


class Gridded(Net):
    block = OnGrid

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.rand(64, DIM // 2, generator=torch.Generator().manual_seed(3))

    def grid(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return torch.tensor([list(x.shape[-2:])] * len(x))

    def forward(self, x: Tensor, t: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        y, c = self.start(x.flatten(2).transpose(1, 2), t)
        grid = self.grid(x, mask)
        for block in self.blocks:
            y = block(y, c, grid, self.table)
        return self.head(y)


class GriddedOnce(Gridded):
    block = Read


def image(batch: int, h: int, w: int, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(batch, 4, h, w, generator=generator), "t": torch.rand(batch, generator=generator)}


@pytest.mark.parametrize("make", [Gridded, GriddedOnce])
def test_sizes_read_from_a_tensor_made_of_shapes_are_folded(make: Any) -> None:
    model = make()
    compiled = guarded(model, image(2, 3, 3), image(2, 3, 3, seed=4))
    with torch.no_grad():  # as many tokens in another form
        for given in (image(2, 9, 1), image(2, 3, 3), image(2, 2, 5)):
            close(compiled(**given), model(**given))


class Hosted(Gridded):
    """Its glue is the model itself, which looks at a number."""

    def forward(self, x: Tensor, t: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(x, t) * (2 if x.sum() > 1e9 else 1)


@torch.no_grad()
def test_folded_sizes_are_told_apart_where_the_model_is_the_glue() -> None:
    model = Hosted()
    compiled = guarded(model, image(2, 3, 3))
    assert compiled.program.manifest.glues[0].file is None
    for given in (image(2, 9, 1), image(2, 3, 3)):
        close(compiled(**given), model(**given))


class OfValues(Gridded):
    """Sizes by the numbers of a mask, which is the same in every run that is made to find the blocks."""

    def grid(self, x: Tensor, mask: Tensor | None) -> Tensor:
        assert mask is not None
        return torch.stack([mask.sum(1), torch.full_like(mask.sum(1), x.shape[-1])], 1)


class Laundered(OfValues):
    """The same by way of Python."""

    def grid(self, x: Tensor, mask: Tensor | None) -> Tensor:
        assert mask is not None
        return torch.tensor([[n, x.shape[-1]] for n in mask.sum(1).tolist()])


class BySize(OfValues):
    """The same by way of the size of what the mask picks."""

    def grid(self, x: Tensor, mask: Tensor | None) -> Tensor:
        assert mask is not None
        return torch.tensor([[len(mask[0].nonzero()), x.shape[-1]]] * len(x))


@pytest.mark.parametrize("make", [OfValues, Laundered, BySize])
def test_sizes_that_an_argument_sets_are_never_folded(make: Any) -> None:
    given = image(2, 3, 3) | {"mask": torch.ones(2, 3, dtype=torch.int64)}
    for reason in reasons(make(), given):
        assert "it reads numbers of argument 'grid' at unprepared_arguments.py:" in reason.replace("test_", "")
        assert "pass them as plain integers, or compute with tensors" in reason


class Windowed(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.tensor([3, 4]))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        first, more = self.window.tolist()
        return super().forward(x, c, torch.cat([x[:, :first] * 1.5, x[:, first:-more], x[:, -more:] * 2], 1))


class InWindows(Net):
    block = Windowed


def test_sizes_in_a_buffer_of_the_block_are_folded_block_by_block() -> None:
    model = InWindows()
    model.blocks[1].window.copy_(torch.tensor([5, 2]))
    assert len(guarded(model, inputs(), inputs(3)).program.manifest.plans) == 2


class Longest(Net):
    """Gives its blocks a number that the mask sets, as a number."""

    class block(Block):
        def forward(self, x: Tensor, c: Tensor, longest: int = 0) -> Tensor:
            return super().forward(x, c, torch.cat([x[:, :longest] * 2, x[:, longest:]], 1))

    def forward(self, x: Tensor, t: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        y, c = self.start(x, t)
        for block in self.blocks:
            y = block(y, c, int(mask.sum(1).max()))
        return self.head(y)


@torch.no_grad()
def test_a_number_that_values_set_is_never_baked_in() -> None:
    model = Longest().eval()
    compiled = edit_compile.compile(
        edit_compile.elasticize(model, masked(2, 7, 5)), inputs=masked(2, 7, 5), engine="torch"
    )
    for lengths in ((7, 5), (5, 7), (6, 2), (9, 2), (7, 1)):
        close(compiled(**masked(2, *lengths)), model(**masked(2, *lengths)))


class Mode(Enum):
    A = 1
    B = 2


class Size(IntEnum):
    SMALL = 1


class Moody(Net):
    def forward(self, x: Tensor, t: Tensor, mode: Any = None, scale: Any = 1.0, size: Any = None) -> Tensor:  # type: ignore[override]
        y = super().forward(x, t) * (2 if mode is Mode.B else 1)
        return y * float(scale) + (1 if size is Size.SMALL else 0)


@torch.no_grad()
def test_enums_and_numbers_of_numpy_are_arguments() -> None:
    model, given = Moody(), inputs() | {"mode": Mode.A, "scale": np.float32(0.5), "size": Size.SMALL}
    compiled = guarded(model, given)
    for other in ({"mode": Mode.B}, {"scale": np.float32(2)}, {"size": None}, {}):
        close(compiled(**{**given, **other}), model(**{**given, **other}))


class Taking(Net):
    class block(Block):
        def forward(self, x: Tensor, c: Tensor, mode: Any = None, scale: Any = 1) -> Tensor:
            return super().forward(x, c, x * float(scale) if mode is Mode.B else None)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y, c = self.start(x, t)
        for block in self.blocks:
            y = block(y, c, mode=Mode.B, scale=np.float32(0.5))
        return self.head(y)


def test_blocks_take_enums_and_numbers_of_numpy() -> None:
    guarded(Taking(), inputs())


class Opaque(Taking):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y, c = self.start(x, t)
        for block in self.blocks:
            y = block(y, c, mode=object())
        return self.head(y)


def test_an_object_is_refused_by_the_argument_that_it_is_given_as() -> None:
    assert reasons(Opaque(), inputs())[0].endswith("argument 'mode' is a object: pass tensors and plain values")
    assert dry(Taking(), inputs()).blocks == 2
