"""What a model has to satisfy, docs/your_model.md: a dry run names the module and the condition that it misses."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from torch import nn

import edit_compile
from passes.observe.discover import DiscoveryError
from tests import conditions as c
from tests.conditions import of

PAGE = Path(__file__).parents[1] / "docs" / "your_model.md"

MISSED = {
    "blocks in no list": (c.Sequential, "Sequential", "has no nn.ModuleList"),
    "called twice": (c.Repeating, "layers.1", "called 2 times in one forward"),
    "not called": (c.Idle, "layers.1", "was not called"),
    "tokens change shape": (c.Shrunk, "layers.0", "returns no tensor of tokens shaped like an input"),
    "no tokens but vectors": (c.Pooled, "layers.0", "returns no tokens that carry the batch"),
    "no parameters": (lambda: of(c.Empty), "layers.0", "has no parameters"),
    "a single layer": (c.Layer, "layers.1", "is a single layer"),
    "writes into its input": (lambda: of(c.Writing), "layers.0", "writes into its inputs"),
    "forward hooks": (c.hooked, "layers.0", "up carries forward hooks"),
    "forward replaced": (c.replaced, "layers.0", "has had its forward replaced"),
    "an adapter": (lambda: of(c.Adapted), "layers.0", "up is an adapter layer: merge the adapter"),
    "called in several ways": (c.Late, "layers.1", "is called with other arguments in another run"),
    "no residual": (lambda: of(c.NoResidual), "layers.0", "is not an input plus something that vanishes"),
    "returns a number": (c.Counted, "layers.0", "returns something that is no tensor"),
    "code of the data": (lambda: of(c.Looking), "layers.0", "torch.export cannot follow its code"),
    "hidden channels mixed": (lambda: of(c.NormedHidden), "layers.0.down.weight", "meets layer_norm"),
    "no activation": (lambda: of(c.Straight), "layers.0.down.weight", "no activation acts on the channels"),
    "glue of the data": (c.Moody, "glue", "hosted by the model, since the glue of Moody does not export"),
}


def dry(model: nn.Module) -> edit_compile.DryRun:
    return edit_compile.compile(model.eval(), [0.5, 1], inputs=c.inputs(), dry_run=True)


def test_a_model_that_satisfies_them_all_is_standalone_with_an_mlp_per_block() -> None:
    report = dry(c.Model())
    assert report.blocks == 2
    assert report.standalone
    assert {row.sites for row in report.plans} == {1}
    assert {name for name, _ in report.refused} == {
        "mlp"
    }  # the modulation, and the way up, narrow nothing by themselves
    assert "glue: standalone" in str(report)


@cache
def said_without(missed: str) -> str:
    return str(dry(MISSED[missed][0]()))


@pytest.mark.parametrize("missed", MISSED)
def test_a_dry_run_names_the_module_and_the_condition(missed: str) -> None:
    _, where, said = MISSED[missed]
    lines = [line for line in said_without(missed).splitlines() if line.startswith("left alone by")]
    assert any(f": {where}: " in line and said in line for line in lines), lines


@pytest.mark.parametrize(
    ("missed", "said"),
    [
        ("blocks in no list", "no block can be guarded"),
        ("no activation", "no MLP can be narrowed"),
        ("glue of the data", "glue: hosted"),
    ],
)
def test_a_dry_run_says_what_that_comes_to(missed: str, said: str) -> None:
    assert said in said_without(missed)


def test_rows_that_are_not_independent_stop_everything() -> None:
    with pytest.raises(DiscoveryError, match=r"rows of one sample changed at layers\.0 when other samples joined"):
        dry(of(c.Mixing))


def test_a_timestep_of_another_name_is_asked_for_and_taken() -> None:
    inputs = c.inputs()
    inputs["clock"] = inputs.pop("t")
    with pytest.raises(DiscoveryError, match="say which one is with timestep="):
        edit_compile.compile(c.Timeless().eval(), inputs=inputs, dry_run=True)
    elastic = edit_compile.elasticize(c.Timeless().eval(), inputs, timestep="clock")
    assert elastic.timestep == elastic.layout.timestep == "clock"
    assert edit_compile.compile(elastic, inputs=inputs, dry_run=True).blocks == 2


def test_a_timestep_that_is_no_input_is_named() -> None:
    with pytest.raises(DiscoveryError, match=r"said to be 'q', but the inputs are .*\bt\b"):
        edit_compile.compile(c.Model().eval(), inputs=c.inputs(), dry_run=True, timestep="q")


def test_an_elastic_model_found_at_its_first_call_keeps_the_name_it_was_given() -> None:
    inputs = c.inputs()
    inputs["clock"] = inputs.pop("t")
    elastic = edit_compile.elasticize(c.Timeless().eval(), timestep="clock")
    assert elastic.timestep == "clock"
    elastic(**inputs)
    assert elastic.layout.timestep == "clock"


def test_the_page_has_every_sentence() -> None:
    page = " ".join(PAGE.read_text().split())
    assert [said for _, _, said in MISSED.values() if said not in page] == []
