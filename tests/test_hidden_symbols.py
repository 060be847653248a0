"""The search for MLPs by torch.export's symbols, on whose figures a decision rests, on MLPs that are known."""

from __future__ import annotations

import pytest
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.hidden_symbols import totals, try_kind
from passes.pipeline import run_passes
from passes.program.compilation import Compilation
from tests.unprepared import DIM, Block, Net, inputs


class Packed(Block):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(DIM, 8 * DIM)

    def mlp(self, x: Tensor) -> Tensor:
        gate, value = self.up(self.norm(x)).chunk(2, -1)
        return self.down(F.silu(gate) * value)


class Written(Packed):
    """The same, but for a size that is written down."""

    def mlp(self, x: Tensor) -> Tensor:
        gate, value = self.up(self.norm(x)).split(4 * DIM, -1)
        return self.down(F.silu(gate) * value)


@pytest.mark.parametrize(
    ("kind", "name", "missed"),
    [
        (Block, "MLP", []),
        (Packed, "packed GLU", []),
        (Written, "packed GLU", ["a model: the hidden size is fixed by the code"]),
    ],
)
def test_what_the_code_leaves_open_is_found_and_computes_what_the_masked_block_does(
    kind: type[Block], name: str, missed: list[str]
) -> None:
    class Model(Net):
        block = kind

    made = run_passes(Compilation(Model().eval(), inputs()), until="mlp")
    rows = [{"name": "a model", "kinds": [try_kind(group) for group in made.groups]}]
    found = totals(rows)["MLPs by kind"]
    assert list(found) == [name]
    assert found[name]["today"] == 1
    assert found[name]["equal and the same"] == 1 - len(missed)
    assert found[name]["missed"] == missed
