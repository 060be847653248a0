"""What cannot work is told by name, with what to do: passes of one's own, dumps, names of bundles, constants."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import edit_compile
from passes.block_passes import GroupPass
from passes.dump import DumpError
from passes.program.compilation import Compilation, Group, PassError
from runtime.base.errors import BundleError
from tests.unprepared import Net, close, inputs

pytestmark = pytest.mark.filterwarnings("ignore:.*has no routers:UserWarning")


class Nothing:
    name = "nothing"

    def run(self, compilation: Compilation) -> None:
        pass


class Nameless:
    def run(self, compilation: Compilation) -> Compilation:
        return compilation


def holding(compilation: Compilation, group: Group) -> Any:
    """Add a buffer."""
    module = fx.GraphModule(nn.Module(), group.graph.module.graph)
    module.register_buffer("table", torch.ones(1))
    (output,) = module.graph.find_nodes(op="output")
    with module.graph.inserting_before(output):
        held = module.graph.get_attr("table")
        made = module.graph.call_function(torch.ops.aten.mul.Tensor, (output.args[0][0], held))
        made.meta["val"] = output.args[0][0].meta["val"]
    output.args = ((made, *output.args[0][1:]),)
    return group.with_graph(module), None


@pytest.mark.parametrize(
    ("one", "said"),
    [
        (Nothing(), "the pass 'nothing' in passes= gave NoneType: return the compilation"),
        (Nameless(), r"passes\[1\] \(Nameless\) is no pass: give an object with a name"),
        (holding, r"passes\[1\] \(holding\) is no pass"),
        (GroupPass("unmade", lambda compilation, group: group), r"'unmade' gave no \(group, report\) for blocks\.0"),
        (GroupPass("holding", holding), "the pass 'holding' put 'table' into the graph of blocks.0"),
    ],
)
def test_a_pass_that_is_none(one: Any, said: str) -> None:
    after = 6 if isinstance(one, GroupPass) else 1
    passes = [*edit_compile.PASSES[:after], one, *edit_compile.PASSES[after:]]
    with pytest.raises(PassError, match=said):
        edit_compile.compile(Net().eval(), inputs=inputs(), engine="torch", passes=passes)


def test_a_dump_that_cannot_be_written_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DumpError, match=r"dump='.*file/inside' \(or EDIT_COMPILE_DUMP\) cannot be written to"):
        edit_compile.compile(Net().eval(), engine="torch", dump=tmp_path / "file" / "inside")
    monkeypatch.setenv("EDIT_COMPILE_DUMP", str(tmp_path / "file"))
    with pytest.raises(DumpError, match="give another folder"):
        edit_compile.compile(Net().eval(), engine="torch")


def test_a_dump_that_fails_while_serving_is_warned_of_once(tmp_path: Path) -> None:
    model, folder = Net().eval(), tmp_path / "dump"
    compiled = edit_compile.compile(model, inputs=inputs(), engine="torch", dump=folder)
    for number in range(2, 9):
        (folder / f"run-{number}").touch()
    with torch.no_grad():
        with pytest.warns(UserWarning, match="nothing more is dumped"):
            close(compiled(**inputs(2, 5)), model(**inputs(2, 5)))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            close(compiled(**inputs(2, 6)), model(**inputs(2, 6)))


def test_names_that_no_bundle_can_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    compiled = edit_compile.compile(Net().eval(), inputs=inputs(), engine="torch")
    for name, said in (
        (".", "is no name"),
        ("", "is no name"),
        ("x" * 300, "too long"),
        ("a/" + "x" * 250, "too long"),
    ):
        with pytest.raises(BundleError, match=said):
            compiled.save(name)
    assert not list(tmp_path.iterdir())
    compiled.save("x" * 100)
    edit_compile.load("x" * 100)


class Number(Net):
    """Gives its blocks a number, or none."""

    class block(Net.block):  # type: ignore[name-defined, misc]
        def forward(self, x: Tensor, c: Tensor, g: float = 0.0) -> Tensor:
            return super().forward(x, c)

    def __init__(self, gives: bool) -> None:
        super().__init__()
        self.gives = gives

    def forward(self, x: Tensor, t: Tensor, g: float) -> Tensor:
        y, c = self.start(x, t)
        for block in self.blocks:
            y = block(y, c, g if self.gives else 0.0)
        return self.head(y)


@pytest.mark.parametrize("gives", [True, False])
def test_nan_among_the_arguments_is_a_form_like_any_other(gives: bool) -> None:
    model, given = Number(gives).eval(), inputs() | {"g": float("nan")}
    compiled = edit_compile.compile(model, inputs=given, engine="torch")
    for one in (given, given | {"g": 1.0}):
        torch.testing.assert_close(compiled(**one), model(**one))
    assert len(compiled.program.manifest.glues) == 2
