"""A program grows by other forms of call: nothing that is there changes, and only what is missing is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import edit_compile
from edit_compile import CompiledTransformer, CompileError, ScheduledPolicy
from edit_compile.compiling.compiler import Tracer
from runtime.base.guard import ANY
from runtime.bundle.program import Program
from tests.conftest import WIDTHS
from tests.models import PlainBlock, PlainDiT, noise, randomised, tiny_flux, tiny_plain

pytestmark = pytest.mark.filterwarnings("ignore:.*has no routers:UserWarning")


def eager(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    with torch.no_grad():
        output = model(**inputs)
    return output if isinstance(output, Tensor) else output[0]


def lazily(model: nn.Module, **options: Any) -> CompiledTransformer:
    widths = WIDTHS if isinstance(model, edit_compile.ElasticTransformer) else [0.5, 1]
    return edit_compile.compile(model, widths=widths, engine="torch", **options)


def agree(compiled: CompiledTransformer, model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """With gates open, and a second time so that nothing that was kept of the first matters."""
    for _ in range(2):
        compiled._reset_stateful_cache()
        output = compiled(**inputs)
        torch.testing.assert_close(
            output if isinstance(output, Tensor) else output[0], eager(model, inputs), rtol=1e-4, atol=1e-4
        )


def opened(model: nn.Module, blocks: int) -> CompiledTransformer:
    return lazily(model, policy=ScheduledPolicy([[1.0] * blocks]))


def extends(new: Program, old: Program) -> None:
    """Blocks, glues and plans are where they were, the weights are the same objects, and so are the files."""
    for one, other in zip(new.manifest.blocks, old.manifest.blocks, strict=True):
        assert (one.name, one.plan, one.weights) == (other.name, other.plan, other.weights)
        assert one.others[: len(other.others)] == other.others
    assert new.manifest.glues[: len(old.manifest.glues)] == old.manifest.glues
    assert [plan.id for plan in new.manifest.plans][: len(old.manifest.plans)] == [p.id for p in old.manifest.plans]
    assert all(new.weights[key] is value for key, value in old.weights.items())
    assert all(new.files[name] is old.files[name] for name in old.files if name.endswith("pt2"))
    assert new.routers is old.routers


def test_other_lengths_add_to_the_program_and_only_the_second_needs_plans() -> None:
    model, inputs = tiny_flux(double=1, single=1)
    compiled = opened(model, 2)
    programs = []
    for text in (6, 5, 7, 4):
        _, inputs = tiny_flux(text=text)
        agree(compiled, model, inputs)
        programs.append(compiled.program)
    for new, old in zip(programs[1:], programs, strict=False):
        extends(new, old)
    assert [len(program.manifest.plans) for program in programs] == [2, 4, 4, 4]
    assert [len(program.manifest.glues) for program in programs] == [1, 2, 3, 4]
    assert all(
        len(block.others) == 1 and block.others[0].weights == block.weights for block in programs[-1].manifest.blocks
    )
    general = programs[-1].manifest.plans[2]
    assert len(general.buckets) == 3
    used = [{cost.plan for cost in glue.costs} for glue in programs[-1].manifest.glues]
    assert used[0] == {plan.id for plan in programs[0].manifest.plans}
    assert used[1] == used[2] == used[3] == {plan.id for plan in programs[-1].manifest.plans[2:]}


def test_the_routers_of_a_program_are_those_of_its_first_trace() -> None:
    model, inputs = tiny_flux(double=1, single=0)
    elastic = edit_compile.elasticize(model, inputs)
    compiled = lazily(elastic, inputs=inputs)
    before = {key: value.clone() for key, value in compiled.program.routers.items()}
    with torch.no_grad():
        for parameter in elastic.routers.parameters():
            parameter.add_(1.0)
    compiled(**tiny_flux(text=5)[1])
    assert len(compiled.program.manifest.glues) == 2
    assert all(torch.equal(before[key], value) for key, value in compiled.program.routers.items())


def test_a_program_made_ahead_grows_in_the_same_process_and_is_saved_whole(tmp_path: Path) -> None:
    model, inputs = tiny_plain()
    compiled = lazily(model, inputs=inputs, output=tmp_path / "first.edit")
    compiled.policy = ScheduledPolicy([[1.0] * 3])
    other = tiny_plain(tokens=7)[1]
    agree(compiled, model, other)
    compiled.save(tmp_path / "grown.edit")
    loaded = edit_compile.load(tmp_path / "grown.edit", engine="torch")
    loaded.policy = ScheduledPolicy([[1.0] * 3])
    for given in (inputs, other):
        agree(loaded, model, given)


def test_a_mask_in_one_branch_and_none_in_the_other() -> None:
    model, inputs = tiny_plain()
    compiled = opened(model, 3)
    agree(compiled, model, inputs)
    first = compiled.program
    agree(compiled, model, {**inputs, "mask": None})
    agree(compiled, model, inputs)
    extends(compiled.program, first)
    assert [len(plan.inputs) for plan in compiled.program.manifest.plans] == [4, 3]
    assert all(block.others[0].weights == block.weights for block in compiled.program.manifest.blocks)
    assert len(compiled.program.manifest.glues) == 2


class Skipping(PlainDiT):
    """Leaves out blocks that the call names."""

    def forward(self, x: Tensor, t: Tensor, words: Tensor, skip_layers: Sequence[int] | None = None) -> Tensor:
        vector = self.clock(t[:, None].expand(-1, self.dim))
        x, words = self.embed(x), self.text(words)
        for index, layer in enumerate(self.layers):
            if index not in (skip_layers or ()):
                x = layer(x, words, vector)
        return self.head(x)


def of_skipping() -> tuple[nn.Module, dict[str, Any]]:
    inputs = {"x": noise(2, 9, 4), "t": torch.tensor([0.9, 0.3]), "words": noise(2, 5, 12, seed=2)}
    return randomised(Skipping()), inputs


def test_a_form_that_leaves_a_block_out_has_no_guard_for_it() -> None:
    model, inputs = of_skipping()
    compiled = opened(model, 3)
    agree(compiled, model, inputs)
    first = compiled.program
    agree(compiled, model, {**inputs, "skip_layers": [1]})
    extends(compiled.program, first)
    assert len(compiled.program.manifest.plans) == 1
    assert compiled.program.manifest.blocks == first.manifest.blocks


def test_a_block_that_only_a_later_form_calls_stays_in_its_glue() -> None:
    model, inputs = of_skipping()
    compiled = opened(model, 2)
    agree(compiled, model, {**inputs, "skip_layers": [1]})
    agree(compiled, model, inputs)
    assert [block.name for block in compiled.program.manifest.blocks] == ["layers.0", "layers.2"]
    refused = {refusal.where: refusal.reason for report in compiled._tracer.reports for refusal in report.refused}
    assert "first traced" in refused["layers.1"]


class NoResidual(PlainBlock):
    """Is no residual without a mask."""

    def forward(self, x: Tensor, text: Tensor, vector: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, text, vector, mask) * (1.0 if mask is not None else 0.9)


def test_a_block_that_cannot_be_guarded_in_a_form_stays_in_the_glue_of_that_form() -> None:
    model = randomised(PlainDiT(block=NoResidual))
    inputs = tiny_plain()[1]
    compiled = opened(model, 3)
    agree(compiled, model, inputs)
    first = compiled.program
    agree(compiled, model, {**inputs, "mask": None})
    extends(compiled.program, first)
    assert compiled.program.manifest.plans == first.manifest.plans
    refused = {refusal.where: refusal.reason for report in compiled._tracer.reports for refusal in report.refused}
    assert "not an input plus something" in refused["layers.0"]


def test_changed_weights_are_an_error_and_nothing_is_added() -> None:
    model, inputs = tiny_plain()
    compiled = lazily(model, inputs=inputs)
    program = compiled.program
    assert compiled._tracer.changed() is None
    with torch.no_grad():
        model.head.bias.add_(1.0)
    assert compiled._tracer.changed() == "head.bias"
    with pytest.raises(
        CompileError, match=r"have changed since it was compiled \(first: head\.bias\): compile it anew"
    ):
        compiled(**tiny_plain(tokens=7)[1])
    assert compiled.program is program
    compiled(**inputs)  # what was compiled runs on


class Counting(PlainDiT):
    """Writes into a buffer of its own in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor, t: Tensor, words: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.seen.add_(1)
        return super().forward(x, t, words)


def test_what_a_model_writes_itself_is_no_change_of_weights() -> None:
    model = randomised(Counting())
    inputs = of_skipping()[1]
    compiled = opened(model, 3)
    agree(compiled, model, inputs)
    model(**inputs)
    assert compiled._tracer.changed() is None
    agree(compiled, model, {**inputs, "x": noise(2, 7, 4)})


class Telling(PlainDiT):
    """Cuts its tokens to as many as a mask tells, in its own Python where `plainly`."""

    def __init__(self, plainly: bool = False) -> None:
        super().__init__()
        self.plainly = plainly

    def forward(self, x: Tensor, t: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        length = int(mask.sum(1).max()) if self.plainly else max(mask.sum(1).tolist())
        if self.plainly and length > 100:
            return x
        vector = self.clock(t[:, None].expand(-1, self.dim))
        padded = torch.zeros(len(x), length, self.dim)
        padded[:, :length] = self.text(words)[:, :length]
        x = torch.cat([self.embed(x), padded], 1)
        for layer in self.layers:
            x = layer(x, padded[:, :1], vector)
        return self.head(x[:, : x.shape[1] - length])


def told(length: int) -> dict[str, Any]:
    mask = torch.zeros(2, 6, dtype=torch.int64)
    mask[0, :length], mask[1, :2] = 1, 1
    return {**of_skipping()[1], "words": noise(2, 6, 12, seed=2), "mask": mask}


@pytest.mark.parametrize("plainly", [False, True])
def test_sizes_told_by_values_add_forms_to_the_glue_there_is(plainly: bool) -> None:
    model = randomised(Telling(plainly))
    compiled = opened(model, 3)
    counts = []
    for length in (4, 5, 3, 6, 4):
        agree(compiled, model, told(length))
        counts.append(len(compiled.program.manifest.plans))
    manifest = compiled.program.manifest
    assert counts == ([1, 2, 2, 2, 2] if plainly else [2] * 5)  # a graph tells that values set a size, Python does not
    (glue,) = manifest.glues
    assert (glue.file is None) == plainly
    assert glue.sized_by == (() if plainly else ("mask",))
    assert {cost.plan for cost in glue.costs} == {plan.id for plan in manifest.plans}


class Dropping(PlainDiT):
    """Gives its blocks no mask where that hides nothing, which its own Python looks at."""

    def forward(self, x: Tensor, t: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x, t, words, None if bool(mask.all()) else mask)


def test_blocks_called_with_other_arguments_inside_hosted_glue() -> None:
    model, inputs = randomised(Dropping()), tiny_plain()[1]
    everything = {**inputs, "mask": torch.ones_like(inputs["mask"])}
    compiled = opened(model, 3)
    for given in (inputs, everything, inputs):
        agree(compiled, model, given)
    manifest = compiled.program.manifest
    assert [len(plan.inputs) for plan in manifest.plans] == [4, 3]
    assert [glue.file for glue in manifest.glues] == [None]
    assert {cost.plan for cost in manifest.glues[0].costs} == {plan.id for plan in manifest.plans}


class Measured(PlainBlock):
    """Does something else as soon as there are more than eight tokens."""

    def forward(self, x: Tensor, text: Tensor, vector: Tensor, mask: Tensor | None = None) -> Tensor:
        y = super().forward(x, text, vector, mask)
        return y if x.shape[1] <= 8 else x + 0.5 * (y - x)


def test_a_plan_that_is_not_right_at_a_length_does_not_serve_it() -> None:
    model, inputs = randomised(PlainDiT(block=Measured)), tiny_plain()[1]
    compiled = opened(model, 3)
    plans = []
    for tokens in (6, 7, 8, 12, 5):
        agree(compiled, model, {**inputs, "x": noise(2, tokens, 4)})
        plans.append(len(compiled.program.manifest.plans))
    assert plans == [1, 2, 2, 3, 3]


def test_sizes_told_by_values_are_free_in_a_bundle(tmp_path: Path) -> None:
    model = randomised(Telling())
    lazily(model, inputs=told(4), output=tmp_path / "x.edit")
    loaded = edit_compile.load(tmp_path / "x.edit", engine="torch")
    loaded.policy = ScheduledPolicy([[1.0] * 3])
    for length in (4, 5, 3):
        agree(loaded, model, told(length))


def test_guards_say_in_which_form_a_block_is_called() -> None:
    model, inputs = tiny_plain()
    compiled = lazily(model, inputs=inputs)
    compiled(**{**inputs, "mask": None})
    tracer = compiled._tracer
    assert {name: [form for form, _ in ways] for name, ways in tracer._memory.ways.items()} == {
        f"layers.{index}": [0, 1] for index in range(3)
    }
    assert ANY not in (form for ways in tracer._memory.ways.values() for form, _ in ways)


def test_latents_are_told() -> None:
    model, inputs = tiny_flux(double=1, single=0)
    program = Tracer(model, (1.0,), None).trace(inputs)
    assert program.manifest.glues[0].latents == (("hidden_states", 0),)
    model, inputs = tiny_plain()
    assert Tracer(model, (1.0,), None).trace(inputs).manifest.glues[0].latents == (("x", 0),)
