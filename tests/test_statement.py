"""What a user states of blocks and batch: right where nothing could be found, and an error where numbers disagree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import edit_compile
from edit_compile import BlockStatement, CompileError, ScheduledPolicy, StatementError
from passes.observe.discover import DiscoveryError
from runtime.routing.policy import SKIP
from tests.unprepared import UNTRAINED, Block, Net, close, dry, guarded, inputs

pytestmark = UNTRAINED


class Merge(Block):
    """Goes on from two streams at once."""

    def forward(self, x: Tensor, other: Tensor, c: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x + other, c)


class Merging(Net):
    """Two towers, whose outputs every later block is given: which one it continues is not in the numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.merges = nn.ModuleList([Merge() for _ in range(2)])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y, c = self.start(x, t)
        left, right = (block(y, c) for block in self.blocks)
        for merge in self.merges:
            left = merge(left, right, c)
        return self.head(left)


class Crossed(Net):
    """Takes tokens before samples: x (L, B, 4), text (L', B, 4)."""

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:  # type: ignore[override]
        y, c = self.start(torch.cat([x, text]).transpose(0, 1), t)
        for block in self.blocks:
            y = block(y, c)
        return self.head(y).transpose(0, 1)


ONE = BlockStatement("merges.*", {0: "x"})
ALONG = BlockStatement(batch={"x": 1, "text": 1})


def crossed(batch: int = 2, tokens: int = 2, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    x, text = (torch.randn(tokens, batch, 4, generator=generator) for _ in range(2))
    return {"x": x, "t": torch.rand(batch, generator=generator), "text": text}


def test_a_block_that_goes_on_from_two_streams_is_refused_and_told_what_to_state() -> None:
    report = dry(Merging(), inputs())
    told = {refusal.where: refusal.reason for name, refusal in report.refused if name == "states"}
    assert report.blocks == 2 and told.keys() == {"merges.0", "merges.1"}
    assert "argument 'x' and argument 'other'" in told["merges.0"] and "blocks=" in told["merges.0"]


def test_a_stated_pairing_is_right_at_every_width() -> None:
    compiled = guarded(Merging(), inputs(), inputs(3), inputs(1, seed=7), blocks=ONE)
    assert len(compiled.program.manifest.blocks) == 4


@pytest.mark.parametrize("name", ["x", "other"])
def test_a_skipped_block_gives_the_argument_that_was_stated(name: str) -> None:
    model, given = Merging().eval(), inputs()
    with pytest.warns(UserWarning, match="has no routers"):
        compiled = edit_compile.compile(
            model, inputs=given, engine="torch", blocks=BlockStatement("merges.*", {0: name})
        )
    with torch.no_grad(), compiled.decided_by(ScheduledPolicy(np.array([[1.0, 1.0, SKIP, SKIP]]))):
        y, c = model.start(**given)
        wanted = model.blocks[0 if name == "x" else 1](y, c)
        close(compiled(**given), model.head(wanted))


def test_blocks_of_a_kind_of_which_other_things_are_stated_have_plans_of_their_own() -> None:
    two = [BlockStatement("merges.0", {0: "x"}), BlockStatement("merges.1", {0: "other"})]
    compiled = guarded(Merging(), inputs(), blocks=two)
    assert len({block.plan for block in compiled.program.manifest.blocks}) == 3


def test_a_batch_that_could_not_be_told_is_stated() -> None:
    with pytest.raises(DiscoveryError, match="could not be doubled"):
        dry(Crossed(), crossed())
    guarded(Crossed(), crossed(), crossed(3), crossed(1, seed=7), blocks=ALONG)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        (BlockStatement("blok.*"), r"no module of Net is called 'blok.*'.*lists of blocks are blocks\.\*"),
        (BlockStatement("embed"), "no module called 'embed' can be a block"),
        (BlockStatement("blocks.*", {0: "z"}), r"blocks.0 takes no argument 'z': it takes x, c, seen"),
        (BlockStatement("blocks.*", {0: "seen"}), "argument 'seen' of blocks.0.*is no tensor.*there are x, c"),
        (BlockStatement("blocks.*", {1: "x"}), "blocks.0 returns no output '1'"),
        (BlockStatement("blocks.*", {0: "c"}), "continue argument 'c', but by its numbers it continues 'x'"),
        (BlockStatement(batch={"y": 0}), "Net takes no argument 'y': it takes x, t"),
        (BlockStatement(batch={"x": 3}), "argument 'x' holds tensors of 3 dimensions"),
        (BlockStatement(batch={"x": 1}), "stated to be dimension 1 of 'x', but 9 samples could not be doubled there"),
        (BlockStatement(batch={"x": 1, "t": 0}), "9 in dimension 1 of 'x' and as 2 in dimension 0 of 't'"),
        (BlockStatement(batch={"x": None, "t": 0}), "stated to be not in 'x' and dimension 0 of 't'"),
    ],
)
def test_a_wrong_statement_is_an_error_that_names_the_argument(statement: BlockStatement, message: str) -> None:
    with pytest.raises(StatementError, match=message):
        dry(Net(), inputs(), blocks=statement)
    with pytest.raises(StatementError, match=message):
        edit_compile.elasticize(Net().eval(), inputs(), blocks=statement)


def test_a_pairing_that_is_no_residual_stays_refused() -> None:
    class Mixing(Block):
        def forward(self, x: Tensor, c: Tensor, seen: Tensor | None = None) -> Tensor:
            return self.out(x) + self.mlp(x)

    class Model(Net):
        block = Mixing

    with pytest.raises(StatementError, match="argument 'x', but by its numbers output 0 is not an input plus"):
        dry(Model(), inputs(), blocks=BlockStatement("blocks.*", {0: "x"}))


def test_two_statements_must_not_contradict_each_other() -> None:
    with pytest.raises(StatementError, match=r"output 0 of merges.0 is stated to continue 'x' and 'other'"):
        dry(Merging(), inputs(), blocks=[ONE, BlockStatement("merges.0", {0: "other"})])
    with pytest.raises(StatementError, match="the batch of argument 'x' is stated twice"):
        dry(Net(), inputs(), blocks=[BlockStatement(batch={"x": 0}), BlockStatement(batch={"x": 1})])


def test_outputs_are_named_by_the_keys_that_a_block_returns() -> None:
    class Named(Block):
        def forward(self, x: Tensor, other: Tensor, c: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            x = x + other
            return {"stream": x + self.attend(x + c[:, None]) + self.mlp(x)}

    class Model(Merging):
        def __init__(self) -> None:
            super().__init__()
            self.merges = nn.ModuleList([Named() for _ in range(2)])

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            y, c = self.start(x, t)
            left, right = (block(y, c) for block in self.blocks)
            for merge in self.merges:
                left = merge(left, right, c)["stream"]
            return self.head(left)

    guarded(Model(), inputs(), blocks=BlockStatement("merges.*", {"stream": "x"}))


@torch.no_grad()
def test_a_statement_survives_being_saved(tmp_path: Path) -> None:
    model, given = Merging().eval(), inputs()
    elastic = edit_compile.elasticize(model, given, blocks=ONE)
    elastic.save_pretrained(tmp_path / "elastic")
    again = edit_compile.load_elastic(tmp_path / "elastic", Merging().eval())
    assert again.stated == elastic.stated == (ONE,)
    for router in again.routers:
        router.width.bias.copy_(9.0 * F.one_hot(torch.tensor(1), 4))
    compiled = edit_compile.compile(again, inputs=given, engine="torch", policy=edit_compile.RoutingPolicy())
    close(compiled(**given), again(**given))
    close(compiled(**inputs(3)), again(**inputs(3)))


def test_a_statement_is_used_where_the_routers_are_made_at_the_first_call() -> None:
    elastic = edit_compile.elasticize(Merging().eval(), blocks=ONE)
    elastic(**inputs())
    assert elastic.layout is not None and len(elastic.layout.blocks) == 4


def test_an_elastic_model_saved_before_there_were_statements_is_read(tmp_path: Path) -> None:
    edit_compile.elasticize(Net().eval(), inputs()).save_pretrained(tmp_path / "elastic")
    path = tmp_path / "elastic" / "elastic.json"
    description = json.loads(path.read_text())
    assert description.pop("stated") == []
    path.write_text(json.dumps(description | {"schema": 6}))
    assert edit_compile.load_elastic(tmp_path / "elastic", Net().eval()).stated == ()


def test_what_is_stated_of_an_elastic_model_cannot_be_changed_when_it_is_compiled() -> None:
    elastic = edit_compile.elasticize(Merging().eval(), inputs(), blocks=ONE)
    edit_compile.compile(elastic, inputs=inputs(), dry_run=True, blocks=ONE)
    with pytest.raises(CompileError, match="give blocks= to elasticize"):
        edit_compile.compile(elastic, inputs=inputs(), blocks=BlockStatement("merges.*", {0: "other"}))


def test_names_stand_for_modules_part_by_part() -> None:
    assert BlockStatement("blocks.*").speaks_of("blocks.11") and BlockStatement().speaks_of("anything")
    assert not BlockStatement("blocks.*").speaks_of("blocks.0.attn")
    assert BlockStatement(("a.*", "b.1")).speaks_of("b.1")
