"""Code under torch.compile, blocks in other lists than nn.ModuleList, weights that are no plain tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

import edit_compile
from passes.graphs.uncompiled import uncompiled
from tests.unprepared import DIM, UNTRAINED, Block, Net, close, dry, guarded, inputs, masked, reasons

pytestmark = UNTRAINED


class Fast(Block):
    @torch.compile(backend="eager")
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return Block.forward(self, x, c)


class FastNet(Net):
    block = Fast


def entry_compiled() -> Net:
    model = Net()
    model.blocks = nn.ModuleList([torch.compile(block, backend="eager") for block in model.blocks])
    return model


def in_place() -> Net:
    model = Net()
    for block in model.blocks:
        block.compile(backend="eager")
    return model


def forward_replaced() -> Net:
    model = Net()
    for block in model.blocks:
        block.forward = torch.compile(block.forward, backend="eager")
    return model


@pytest.mark.parametrize("make", [FastNet, entry_compiled, in_place, forward_replaced])
def test_blocks_under_torch_compile_are_guarded_and_masked(make: Any) -> None:
    model = make().eval()
    model(**inputs())  # compiled before any hook is put on
    guarded(model, inputs())


@torch.no_grad()
def test_a_compiled_model_is_taken_as_the_model() -> None:
    plain = Net().eval()
    fast = torch.compile(plain, backend="eager")
    fast(**inputs())
    elastic = edit_compile.elasticize(fast, inputs()).eval()
    for router in elastic.routers:
        router.width.bias.copy_(torch.tensor([9.0, 0, 0, 0]))
    assert not torch.allclose(elastic(**inputs()), plain(**inputs()), atol=1e-4)
    assert dry(torch.compile(Net().eval(), backend="eager"), inputs()).blocks == 2


def test_a_forward_that_does_something_else_is_still_refused() -> None:
    model = Net()
    block = model.blocks[0]
    block.forward = torch.compile(lambda x, c: Block.forward(block, x, c), backend="eager")
    assert any("forward replaced" in refusal.reason for _, refusal in dry(model, inputs()).refused)


def test_what_is_compiled_runs_compiled_again_afterwards() -> None:
    seen = []

    def backend(graph: Any, _: Any) -> Any:
        seen.append(graph)
        return graph.forward

    fast = torch.compile(lambda x: x + 1, backend=backend)
    with uncompiled():
        with uncompiled():
            fast(torch.ones(2))
        fast(torch.ones(2))
    assert not seen
    fast(torch.ones(2))
    assert len(seen) == 1


class Named(Net):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({"first": self.blocks[0], "second": self.blocks[1]})

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y, c = self.start(x, t)
        for block in self.blocks.values():
            y = block(y, c)
        return self.head(y)


class Alone(Block):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x.mean(1))


class InARow(Net):
    block = Alone

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*self.blocks)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y, c = self.start(x, t)
        return self.head(self.blocks(y + c[:, None]))


@pytest.mark.parametrize("make", [Named, InARow])
def test_blocks_in_a_dict_or_a_sequence_are_found(make: Any) -> None:
    guarded(make(), inputs(), inputs(3))


def test_layers_in_a_row_are_not_spoken_of() -> None:
    model = Net()
    model.embed = nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, 16))
    assert not [refusal for name, refusal in dry(model, inputs()).refused if name == "discover"]


class Int8(Tensor):
    """Imitates the weights of a quantised linear."""

    @staticmethod
    def __new__(cls, data: Tensor) -> Int8:
        return Tensor._make_subclass(cls, data)


def test_quantised_weights_are_refused_by_name() -> None:
    model = Net()
    for block in model.blocks:
        block.up.weight = nn.Parameter(Int8(block.up.weight.detach()), requires_grad=False)
    for reason in reasons(model, inputs()):
        assert reason.startswith("up has a weight that is a Int8 (quantised or sharded)")


class Kept(Net):
    """Holds on to its blocks past the attribute that guards replace."""

    def __init__(self) -> None:
        super().__init__()
        blocks = list(self.blocks)
        self.run = lambda y, c: blocks[1](blocks[0](y, c), c)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y, c = self.start(x, t)
        return self.head(self.run(y, c))


def test_a_block_that_is_called_past_its_guard_is_an_error() -> None:
    with pytest.raises(edit_compile.EditError, match=r"blocks\.0 is called past its guard"):
        edit_compile.compile(edit_compile.elasticize(Kept().eval(), inputs()), inputs=inputs(), engine="torch")


class Longest(Net):
    """Hands its blocks a number that a mask sets."""

    def forward(self, x: Tensor, t: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        longest = int(mask.sum(1).max())
        y, c = self.start(x, t)
        y = y[:, :longest]
        for block in self.blocks:
            y = block(y, c)
        return self.head(y)


def test_no_graph_is_printed_where_an_export_stops(capfd: pytest.CaptureFixture[str]) -> None:
    assert dry(Longest(), masked(2, 9, 7)).blocks == 2
    assert "aten" not in capfd.readouterr().err


@torch.no_grad()
def test_other_lengths_are_right() -> None:
    model = Longest().eval()
    elastic = edit_compile.elasticize(model, masked(2, 7, 5))
    compiled = edit_compile.compile(elastic, inputs=masked(2, 7, 5), engine="torch")
    for lengths in ((7, 5), (5, 7), (6, 6), (9, 2)):
        close(compiled(**masked(2, *lengths)), model(**masked(2, *lengths)))


class Refined(Net):
    """Has a block that is understood before the two that give what is no residual."""

    class block(Block):
        def forward(self, x: Tensor, c: Tensor) -> Tensor:  # type: ignore[override]
            return 2 * super().forward(x, c)

    def __init__(self) -> None:
        super().__init__()
        self.refiner = nn.ModuleList([Block()])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y, c = self.start(x, t)
        for block in [*self.refiner, *self.blocks]:
            y = block(y, c)
        return self.head(y)


def test_what_is_left_unguarded_is_said_with_its_share() -> None:
    said = r"guards 3\d% of the FLOPs of Refined; always computed: blocks \(6\d%\): output 0 is not an input"
    model = Refined().eval()
    with pytest.warns(UserWarning, match=f"elasticize {said}"):
        elastic = edit_compile.elasticize(model, inputs())
    with pytest.warns(UserWarning, match=f"compile {said}"):
        edit_compile.compile(elastic, inputs=inputs(), engine="torch")
    report = dry(Refined(), inputs())
    assert report.coverage is not None
    assert [(part.name, part.count) for part in report.coverage.left] == [("blocks", 2)]
    assert "always computed" in str(report)


def test_nothing_is_said_where_all_is_guarded(recwarn: pytest.WarningsRecorder) -> None:
    elastic = edit_compile.elasticize(Net().eval(), inputs())
    edit_compile.compile(elastic, inputs=inputs(), engine="torch")
    assert not [one for one in recwarn if "of the FLOPs" in str(one.message)]


def test_a_dry_run_of_what_is_understood_tells_what_would_be_gained() -> None:
    said = str(dry(Net(), inputs()))
    assert "2 blocks are guarded, 9" in said and "FLOPs left at width 0.25 everywhere: " in said
    assert "left alone" not in said


class Flexed(Block):
    """Flex attention that is given no mask, and so makes one."""

    def attend(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 1, DIM)).permute(2, 0, 3, 1, 4)
        return self.out(flex_attention(q, k, v).transpose(1, 2).flatten(2))


class FlexedNet(Net):
    block = Flexed


def test_flex_attention_without_a_mask_is_attention() -> None:
    guarded(FlexedNet(), inputs(), inputs(3))


class Writing(Net):
    """Writes into a dict that it is given."""

    def forward(self, x: Tensor, t: Tensor, told: dict[str, Any]) -> Tensor:  # type: ignore[override]
        told["tokens"] = x.shape[1] * told["scale"]
        return super().forward(x * told["scale"], t)


def test_what_a_model_writes_into_arguments_is_not_left_in_them() -> None:
    given = inputs() | {"told": {"scale": 2}}
    model = Writing()
    compiled = edit_compile.compile(model.eval(), inputs=given, engine="torch")
    assert given["told"] == {"scale": 2}
    with torch.no_grad():
        close(compiled(**given), model(**given))


class Counting(Net):
    """Reads numbers out of tensors that are made of shapes and plain values, around its blocks."""

    def forward(self, x: Tensor, t: Tensor, scale: int = 2) -> Tensor:
        told = torch.tensor([x.shape[1], scale])
        tokens, scale = (told + torch.arange(2)).tolist()
        return super().forward(x[:, :tokens] * (scale - 1), t)


def test_numbers_made_of_shapes_are_read_around_the_blocks_too() -> None:
    compiled = guarded(Counting(), inputs(), inputs(3), inputs(2, 5), inputs() | {"scale": 3})
    assert all(glue.file is not None for glue in compiled.program.manifest.glues)
