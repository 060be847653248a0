"""Guards in place of blocks, the glue around them, and the checks that keep a wrong graph from leaving."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from edit_compile.compiling.compiler import Tracer
from passes.blocks.export import weight_values
from passes.glue.export import GuardError, guard_glue
from passes.graphs.glue_graph import GlueGraph, tensor_arguments
from passes.graphs.graph import Run
from passes.pipeline import analyse, run_passes
from passes.program.check import CheckError, check_open, check_widths, glue_outputs
from passes.program.compilation import Compilation
from runtime.base.guard import answering, guard
from runtime.bundle.spec import Manifest
from tests.models import noise, randomised, tiny_dit, tiny_flux
from tests.tracing import guarded


@pytest.fixture(scope="module")
def analysed() -> Compilation:
    return analyse(*tiny_flux(double=1, single=2))


def glue_of(analysis: Compilation) -> GlueGraph:
    given, doubled = analysis.discovery.runs
    return guard_glue(guarded(analysis), given, doubled)[0]


def dense_answer(analysis: Compilation):
    def answer(index: int, inputs: Sequence[Tensor], form: int = 0) -> list[Tensor]:
        graph = analysis.groups[analysis.group_of[index]].graph
        return list(graph.module(*weight_values(graph, analysis.discovery.blocks[index].module), *inputs))

    return answer


def test_every_block_is_one_guard_and_nothing_of_it_stays(analysed: Compilation) -> None:
    glue = glue_of(analysed)
    calls = glue.module.graph.find_nodes(op="call_function", target=guard)
    assert [node.args[2] for node in calls] == [0, 1, 2]
    assert not any("transformer_blocks" in name for name in glue.weights)
    assert set(glue.batch_dims) == {"hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"}


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_glue_takes_any_batch(analysed: Compilation, rows: int) -> None:
    glue = glue_of(analysed)
    _, inputs = tiny_flux(batch=rows, double=1, single=2)
    with torch.no_grad(), answering(dense_answer(analysed)):
        (output,) = glue.module(*glue.weights.values(), *tensor_arguments(inputs)[1])
        expected = analysed.discovery.model(**inputs, return_dict=False)[0]
    assert (output - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_skipped_block_passes_its_states_on(analysed: Compilation) -> None:
    seen: list[list[Tensor]] = []

    def skip(index: int, inputs: Sequence[Tensor], form: int) -> list[Tensor]:
        seen.append(list(inputs))
        return [inputs[position] for position in analysed.groups[analysed.group_of[index]].graph.states]

    glue = glue_of(analysed)
    with torch.no_grad(), answering(skip):
        glue.module(*glue.weights.values(), *tensor_arguments(analysed.discovery.runs[1].kwargs)[1])
    states = analysed.groups[0].graph.states
    assert all(torch.equal(seen[0][position], seen[2][position]) for position in states)


def test_the_guarded_copy_shares_weights_and_leaves_the_model_alone(analysed: Compilation) -> None:
    twin = guarded(analysed)
    model = analysed.discovery.model
    assert all(a is b for a, b in zip(twin.parameters(), model.parameters(), strict=True))
    assert all("forward" not in vars(module) for module in model.modules())
    assert "forward" in vars(twin.get_submodule("transformer_blocks.0"))


def test_a_forward_that_reaches_into_a_block_still_finds_it() -> None:
    analysis = analyse(*tiny_dit())
    glue = glue_of(analysis)
    assert any(name.startswith("transformer_blocks.0.norm1.emb") for name in glue.weights)
    assert len(glue.module.graph.find_nodes(op="call_function", target=guard)) == 3


def test_glue_that_cannot_be_followed_is_refused(analysed: Compilation) -> None:
    class Branching(nn.Module):
        def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
            return hidden_states if hidden_states.sum() > 0 else -hidden_states

    run = replace(analysed.discovery.runs[0], kwargs={"hidden_states": torch.ones(2, 3), "timestep": torch.ones(2)})
    with pytest.raises(GuardError, match="Branching does not export"):
        guard_glue(Branching(), run, run)


class Listed(nn.Module):
    """Takes one tensor per sample."""

    def forward(self, x: list[Tensor], timestep: Tensor) -> Tensor:
        return torch.stack([sample * 2 for sample in x]) + timestep[:, None]


class Pinned(nn.Module):
    """Counts the rows of its batch in Python, which pins them."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return torch.stack([x[row] * 2 for row in range(x.shape[0])]) + timestep[:, None]


@pytest.mark.parametrize(
    ("model", "two", "four"),
    [
        (Listed(), [torch.ones(3), torch.zeros(3)], [torch.ones(3)] * 4),
        (Pinned(), torch.ones(2, 3), torch.ones(4, 3)),
    ],
)
def test_glue_that_cannot_keep_the_batch_free_fits_the_given_batch(model: nn.Module, two: object, four: object) -> None:
    given = Run({"x": two, "timestep": torch.ones(2)}, 2, 0)
    doubled = Run({"x": four, "timestep": torch.ones(4)}, 4, 0)
    glue, shown, report = guard_glue(model, given, doubled)
    assert shown is given
    assert not glue.batch_dims
    assert "batch fixed at 2" in report.done[0]
    (output,) = glue_outputs(glue, given)()
    torch.testing.assert_close(output, model(**given.kwargs))


class Around(nn.Module):
    """One block, `glue` before it and `inner` inside it."""

    class Block(nn.Module):
        def __init__(self, inner: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.inner, self.up, self.down = inner, nn.Linear(8, 24), nn.Linear(24, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(nn.functional.gelu(self.up(self.inner(x))))

    def __init__(self, glue: Callable[[Tensor], Tensor] = lambda x: x, inner: Callable[[Tensor], Tensor] = lambda x: x):
        super().__init__()
        self.glue, self.layers = glue, nn.ModuleList([self.Block(inner)])

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.layers[0](self.glue(x) + timestep[:, None, None].cos())


def chunked(x: Tensor) -> Tensor:
    """Works on seven rows at a time, so that the number of its parts follows from the batch."""
    return torch.cat([part * 2 for part in x.flatten(0, 1).split(7)]).view_as(x)


def otherwise(x: Tensor) -> Tensor:
    """Does something else at batches that no run had."""
    return x * 2 if x.shape[0] > 6 else x


def made_of(model: nn.Module) -> Manifest:
    inputs = {"x": noise(2, 5, 8), "timestep": torch.tensor([0.8, 0.3])}
    return Tracer(randomised(model), (0.5, 1.0), None).trace(inputs).manifest


def test_glue_and_blocks_without_assumptions_take_any_batch() -> None:
    manifest = made_of(Around())
    assert manifest.glues[0].inputs[0].shape == (None, 5, 8)
    assert not manifest.plans[0].single_row


@pytest.mark.parametrize("glue", [chunked, otherwise])
def test_glue_that_pins_the_batch_unsaid_fits_the_given_batch(
    glue: Callable[[Tensor], Tensor], capfd: pytest.CaptureFixture[str]
) -> None:
    assert made_of(Around(glue)).glues[0].inputs[0].shape == (2, 5, 8)
    assert "Traceback" not in capfd.readouterr().err


def test_a_block_that_pins_the_batch_unsaid_runs_row_by_row() -> None:
    assert made_of(Around(inner=otherwise)).plans[0].single_row


class Sized(nn.Module):
    """Takes a size per sample as plain numbers, which the graph fixes."""

    def forward(self, x: Tensor, sizes: list[tuple[int, int]], timestep: Tensor) -> Tensor:
        return x.unflatten(1, sizes[0]).sum(1) + timestep[:, None]


def test_glue_with_plain_numbers_for_each_sample_fits_the_call_that_it_was_given() -> None:
    given = Run({"x": torch.ones(1, 6), "sizes": [(2, 3)], "timestep": torch.ones(1)}, 1, 0)
    doubled = Run({"x": torch.ones(2, 6), "sizes": [(2, 3)] * 2, "timestep": torch.ones(2)}, 2, 0)
    glue, shown, _ = guard_glue(Sized(), given, doubled)
    assert shown is given
    (output,) = glue_outputs(glue, given)()
    torch.testing.assert_close(output, Sized()(**given.kwargs))


def test_a_wrong_answer_never_passes_the_open_gate_check(analysed: Compilation) -> None:
    honest = dense_answer(analysed)

    def off(index: int, inputs: Sequence[Tensor], form: int) -> list[Tensor]:
        return [state * 1.01 for state in honest(index, inputs)]

    run, model = analysed.discovery.runs[1], analysed.discovery.model
    check_open(glue_outputs(glue_of(analysed), run), run, model, honest)
    with pytest.raises(CheckError, match="every gate open differs"):
        check_open(glue_outputs(glue_of(analysed), run), run, model, off)


def test_a_wrong_width_never_passes_the_width_check(analysed: Compilation) -> None:
    planned = run_passes(replace(analysed, widths=(0.5, 1.0)), until="plans").planned[0]
    site = planned.group.first
    check_widths(planned.group, planned.graph, site)
    full = planned.graph.variants[1]
    broken = copy.deepcopy(full)
    gelu = next(node for node in broken.graph.nodes if node.target is torch.ops.aten.gelu.default)
    gelu.target, gelu.kwargs = torch.ops.aten.relu.default, {}
    broken.recompile()
    wrong = replace(planned.graph, variants=(planned.graph.variants[0], broken))
    with pytest.raises(CheckError, match=r"at width 1\.0 differs"):
        check_widths(planned.group, wrong, site)
