"""The list of passes: it is what runs, it can be looked into, shortened and added to, and never gives a wrong graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import edit_compile
from passes.block_passes import GroupPass
from passes.graphs.graph import Refusal, Report
from passes.pipeline import PASSES, Passes, run_passes
from passes.program.check import CheckError
from passes.program.compilation import Compilation, Group, PassError, Refused
from passes.program.memory import Memory
from tests.models import noise, randomised

pytestmark = pytest.mark.filterwarnings("ignore:.*has no routers:UserWarning")
ORDER = [
    "discover",
    "dedupe",
    "states",
    "export",
    "real",
    "heads",
    "growth",
    "mlp",
    "streams",
    "layout",
    "widths",
    "plans",
    "guards",
    "assemble",
    "lower",
]
ATEN = torch.ops.aten


class Block(nn.Module):
    """Attention without heads, and an MLP; rotates by complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.out = nn.Linear(8, 24), nn.Linear(24, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        turned = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)
        x = x + self.down(nn.functional.gelu(self.up(x)))
        return x + self.out(nn.functional.scaled_dot_product_attention(turned, turned, x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x = x + timestep[:, None, None].cos()
        turn = torch.polar(torch.ones(4), torch.arange(4.0))
        for layer in self.layers:
            x = layer(x, turn)
        return x


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return randomised(Model())


def given(rows: int = 2, tokens: int = 5) -> dict[str, Tensor]:
    return {"x": noise(rows, tokens, 8), "timestep": torch.linspace(0.1, 0.9, rows)}


def compiled(model: nn.Module, **options: Any) -> Any:
    return edit_compile.compile(model, [0.5, 1], inputs=given(), engine="torch", **options)


class Seen:
    """Notes what there is when it runs."""

    def __init__(self, name: str = "seen", look: Callable[[Compilation], Any] = lambda compilation: None) -> None:
        self.name, self.look, self.found = name, look, []

    def run(self, compilation: Compilation) -> Compilation:
        self.found.append(self.look(compilation))
        return compilation


class Changed:
    """Puts another operator in the place of one, in the graphs that `pick` gives, and may leave the code as it was."""

    name = "changed"

    def __init__(self, pick: Callable[[Compilation], list[fx.GraphModule]], *swap: Any, recompile: bool = True) -> None:
        self.pick, self.swap, self.recompile = pick, swap, recompile

    def run(self, compilation: Compilation) -> Compilation:
        for module in self.pick(compilation):
            for node in module.graph.find_nodes(op="call_function", target=self.swap[0]):
                node.target, node.kwargs = self.swap[1], {}
            if self.recompile:
                module.recompile()
        return compilation


def test_what_runs_is_the_list_in_its_order(model: nn.Module, tmp_path: Path) -> None:
    assert [one.name for one in edit_compile.PASSES] == ORDER
    seen = Seen("last", lambda compilation: dict(compilation.seconds))
    compiled(model, passes=[*edit_compile.PASSES, seen])
    assert list(seen.found[0]) == ORDER
    assert all(seconds >= 0 for seconds in seen.found[0].values())
    assert list(compiled(model, dry_run=True).passes) == ORDER


def test_the_list_prints_a_line_for_each_pass() -> None:
    lines = str(edit_compile.PASSES).splitlines()
    assert [line.split()[0] for line in lines] == ORDER
    assert lines[5].split(maxsplit=1)[1] == "Give attention without heads a dimension for one, which engines need."
    assert all(len(line.split()) > 4 for line in lines)
    assert repr(edit_compile.PASSES) == str(edit_compile.PASSES)


def test_a_pass_can_be_left_out(model: nn.Module) -> None:
    report = compiled(model, dry_run=True, passes=[one for one in edit_compile.PASSES if one.name != "heads"])
    assert "heads" in {own.name for own in compiled(model, dry_run=True).reports}
    assert "heads" not in {own.name for own in report.reports}
    whole = compiled(model, passes=[one for one in edit_compile.PASSES if one.name != "mlp"])
    assert [len(plan.variants) for plan in whole.program.manifest.plans] == [1]
    torch.testing.assert_close(whole(**given()), model(**given()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["discover", "export", "real", "plans", "assemble", "lower"])
def test_a_pass_that_is_needed_says_so(model: nn.Module, name: str) -> None:
    with pytest.raises(PassError, match=f"the pass '{name}' cannot be left out: there is no program without it"):
        compiled(model, passes=[one for one in edit_compile.PASSES if one.name != name])


def test_routers_that_are_yet_to_be_made_need_their_layout(model: nn.Module) -> None:
    passes = [one for one in edit_compile.PASSES if one.name != "layout"]
    assert compiled(model, dry_run=True, passes=passes).blocks == 2
    with pytest.raises(PassError, match="'layout' cannot be left out"):
        compiled(edit_compile.elasticize(model), passes=passes)


def test_a_list_that_cannot_run_is_refused(model: nn.Module) -> None:
    start = Compilation(model, given())
    with pytest.raises(PassError, match="two passes are called 'seen'"):
        run_passes(start, [*PASSES, Seen(), Seen()])
    with pytest.raises(PassError, match="in another order"):
        run_passes(start, PASSES[::-1])
    with pytest.raises(PassError, match="no pass 'nothing' to stand behind"):
        PASSES.with_pass(Seen(), after="nothing")
    with pytest.raises(PassError, match="no pass 'nothing' to stop after"):
        run_passes(start, until="nothing")
    with pytest.raises(PassError, match="'discover' has not run"):
        run_passes(start, [Seen("early", lambda compilation: compilation.discovery), *PASSES], until="early")


def test_a_run_goes_on_where_it_stopped(model: nn.Module) -> None:
    found = run_passes(Compilation(model, given(), widths=(0.5, 1.0)), until="states")
    assert list(found.seconds) == ORDER[:3]
    with pytest.raises(PassError, match=r"graph of layers\.0 is not known: the pass 'export' has not run"):
        _ = found.groups[0].graph
    planned = run_passes(found, until="plans")
    assert planned.found is found.found
    assert [item.plan.kind for item in planned.planned] == ["Block"]


class Scaled(nn.Module):
    """Looks like every other of its class, and computes with a number of its own."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.line, self.scale = nn.Linear(8, 8), scale

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        return x + self.line(x) * self.scale


def test_blocks_that_the_first_ones_graph_is_wrong_for_are_groups_of_their_own() -> None:
    model = Model()
    model.layers = nn.ModuleList(map(Scaled, (1.0, 2.0, 1.0, 3.0, 2.0)))
    made = run_passes(Compilation(randomised(model), given()), until="streams")
    assert [[int(site.name[-1]) for site in group.blocks] for group in made.groups] == [[0, 2], [1, 4], [3]]
    assert made.group_of == (0, 1, 0, 2, 1)
    assert [report.name for report in made.reports].count("export") == 3


def test_a_dry_run_stops_before_a_program_is_made(model: nn.Module, tmp_path: Path) -> None:
    seen = Seen("last")
    report = compiled(model, dry_run=True, dump=tmp_path, passes=[*edit_compile.PASSES, seen])
    assert report.standalone and report.passes == (*ORDER, "last")
    assert seen.found == []
    assert sorted(path.name for path in tmp_path.glob("*.txt"))[-1] == "13-guards.txt"


def test_a_pass_of_ones_own_sees_the_graphs(model: nn.Module) -> None:
    operators = Seen(look=lambda made: [len(group.graph.module.graph.nodes) for group in made.groups])
    compiled(model, dry_run=True, passes=edit_compile.PASSES.with_pass(operators, after="heads"))
    assert len(operators.found) == 1 and operators.found[0][0] > 10


def exact(_: Compilation, group: Group) -> tuple[Group, Report]:
    """Write each gelu by its formula."""
    graph = group.graph.module.graph
    for node in graph.find_nodes(op="call_function", target=ATEN.gelu.default):
        (value,) = node.args
        with graph.inserting_before(node):
            scaled = graph.call_function(ATEN.mul.Tensor, (value, 0.5**0.5))
            erf = graph.call_function(ATEN.erf.default, (scaled,))
            half = graph.call_function(ATEN.mul.Tensor, (value, 0.5))
            product = graph.call_function(ATEN.mul.Tensor, (half, graph.call_function(ATEN.add.Tensor, (erf, 1.0))))
        for made in (*product.all_input_nodes, scaled, erf, product):
            made.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(product)
        graph.erase_node(node)
    return group.with_graph(fx.GraphModule(group.graph.module, graph)), Report("exact", ("gelu",))


def test_a_pass_of_ones_own_changes_a_graph_of_equal_numbers(model: nn.Module, tmp_path: Path) -> None:
    passes = edit_compile.PASSES.with_pass(GroupPass("exact", exact), after="heads")
    assert "exact     Write each gelu by its formula.\n" in str(passes)
    made = compiled(model, passes=passes, dump=tmp_path)
    assert "torch.ops.aten.erf.default" in (tmp_path / "07-exact.diff").read_text()
    assert "aten.gelu" not in (tmp_path / "12-widths.txt").read_text()
    torch.testing.assert_close(made(**given()), model(**given()), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made(**given(3, 7)), model(**given(3, 7)), rtol=1e-4, atol=1e-5)


def blocks_of(made: Compilation) -> list[fx.GraphModule]:
    return [group.graph.module for group in made.groups]


def narrowest_of(made: Compilation) -> list[fx.GraphModule]:
    return [group.plan_graph.variants[0] for group in made.groups]


def glues_of(made: Compilation) -> list[fx.GraphModule]:
    return [glue.graph.module for glue in made.glues if glue.graph is not None]


@pytest.mark.parametrize("recompile", [True, False])
@pytest.mark.parametrize(
    ("pick", "swap", "after", "said"),
    [
        (
            blocks_of,
            (ATEN.gelu.default, ATEN.relu.default),
            "heads",
            "the pass 'changed' changed what a graph computes",
        ),
        (narrowest_of, (ATEN.gelu.default, ATEN.relu.default), "widths", r"layers\.0 at width 0\.5 differs"),
        (narrowest_of, (ATEN.gelu.default, ATEN.relu.default), "plans", r"plan of layers\.0 was changed after"),
        (glues_of, (ATEN.cos.default, ATEN.sin.default), "guards", "with every gate open differs"),
        (glues_of, (ATEN.cos.default, ATEN.sin.default), "assemble", "glue 0 was changed after"),
        (glues_of, (ATEN.cos.default, ATEN.sin.default), "lower", "glue 0 was changed after"),
    ],
)
def test_a_pass_that_changes_numbers_is_caught(
    model: nn.Module, pick: Any, swap: Any, after: str, said: str, recompile: bool
) -> None:
    passes = edit_compile.PASSES.with_pass(Changed(pick, *swap, recompile=recompile), after=after)
    with pytest.raises((CheckError, PassError), match=said):
        compiled(model, passes=passes)


def test_there_is_one_way_to_refuse(model: nn.Module) -> None:
    class Second:
        """Leave every block but the first alone."""

        name = "second"

        def run(self, compilation: Compilation) -> Compilation:
            def choose(group: Group) -> tuple[Group, None]:
                if group.first.name != "layers.0":
                    raise group.refused("is not the first")
                return group, None

            apart = (Group((site,)) for site in compilation.blocks)
            return compilation.with_groups(apart).each(self.name, choose)

    report = compiled(model, dry_run=True, passes=edit_compile.PASSES.with_pass(Second(), after="dedupe"))
    assert report.blocks == 1
    assert ("second", Refusal("layers.1", "is not the first")) in report.refused
    assert "left alone by second: layers.1: is not the first" in str(report)
    made = compiled(model, passes=edit_compile.PASSES.with_pass(Second(), after="dedupe"))
    assert [block.name for block in made.program.manifest.blocks] == ["layers.0"]
    torch.testing.assert_close(made(**given()), model(**given()), rtol=1e-4, atol=1e-5)
    assert str(Refused(Refusal("layers.1", "is not the first"))) == "layers.1: is not the first"


def test_a_pass_that_raises_leaves_the_memory_as_it_was(model: nn.Module) -> None:
    start = Compilation(model, given(), widths=(1.0,), program=edit_compile.compile(model).program)

    class Failing:
        name = "failing"

        def run(self, compilation: Compilation) -> Compilation:
            assert compilation.memory.ways
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        run_passes(start, PASSES.with_pass(Failing(), after="lower"))
    assert replace(start.memory, ways={}) == Memory()
    assert not any(start.memory.ways.values())
    made = run_passes(start)
    assert made.program is not None and set(made.memory.firsts) == {"layers.0", "layers.1"}


def test_a_list_of_passes_is_a_tuple() -> None:
    assert isinstance(PASSES.with_pass(Seen(), after="lower"), Passes)
    assert PASSES.with_pass(Seen(), after="lower")[-1].name == "seen"
    assert [one.name for one in PASSES] == [name for name in ORDER if name != "layout"]
