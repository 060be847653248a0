"""Requests that share rows, of kinds of models and calls that are told from others by one thing each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.export import Dim
from torch.multiprocessing.reductions import StorageWeakRef

import edit_compile
from runtime.base.errors import EditError, NotFiniteError
from runtime.bundle import archive as pt2
from runtime.bundle.program import Program
from runtime.bundle.spec import GlueInput
from runtime.face.transformer import CompiledTransformer
from runtime.requests.conditioning import Conditioning
from runtime.routing.policy import REUSE
from runtime.routing.reuse import ReusePolicy
from runtime.routing.schedule import ScheduledPolicy
from tests import programs, unprepared
from tests.data import make as kept_bundles
from tests.test_shared_rows import BLOCKS, TIERS, Job, alone, decisions, together
from tests.test_unprepared_batches import Guided

FRAMES = 3


class ByFrame(programs.GlueModel):
    """A timestep for each frame of a row."""

    def forward(self, *given: Tensor) -> tuple[Tensor]:
        return super().forward(*given[:-1], given[-1].mean(1))


def program_of_frames() -> Program:
    made = programs.make(("double",) * BLOCKS)
    example = (
        torch.randn(programs.C, programs.D),
        torch.randn(programs.E),
        torch.randn(programs.D, programs.C),
        torch.randn(2, programs.IMAGE, programs.C),
        torch.randn(2, programs.TEXT, programs.D),
        torch.rand(2, FRAMES),
    )
    rows = {0: Dim.AUTO}
    shapes = ((None, None, None, rows, rows, rows),)
    glue = torch.export.export(ByFrame(("double",) * BLOCKS), example, dynamic_shapes=shapes)
    (known,) = made.manifest.glues
    known = replace(known, inputs=(*known.inputs[:2], GlueInput("timestep", "float32", (None, FRAMES))))
    return replace(
        made, manifest=replace(made.manifest, glues=(known,)), files=made.files | {"glue/a.pt2": pt2.dump(glue)}
    )


class OfFrames(Job):
    def arguments(self, context: str) -> dict[str, Tensor]:
        given = super().arguments(context)
        return given | {"timestep": given["timestep"][:, None].expand(-1, FRAMES).contiguous()}


@pytest.mark.parametrize("tier", ["scheduled", "ahead", "every third"])
def test_timesteps_of_frames_belong_to_their_rows(tier: str) -> None:
    compiled, twins = (
        CompiledTransformer(program_of_frames(), "torch"),
        CompiledTransformer(program_of_frames(), "torch"),
    )
    for one in (compiled, twins):
        for name, policy in TIERS.items():
            one.add_tier(name, policy)
    first, second, third = (OfFrames(name, tier, 1, 4) for name in "abc")
    for jobs in ([first], [first, second], [first, third], [first]):
        together(compiled, jobs)
    torch.testing.assert_close(first.latents, alone(twins, first).latents)
    assert decisions(compiled, "a") == decisions(twins, "a")


@torch.no_grad()
def test_states_keep_their_strides_where_residuals_of_several_are_reused() -> None:
    compiled = edit_compile.compile(Guided().eval(), inputs=unprepared.inputs(2), engine="torch")
    compiled.policy = ReusePolicy(2)

    def drawn(names: list[str], x: Tensor) -> Tensor:
        with compiled.request(names):
            for step in range(3):
                x = x - 0.1 * compiled(x=x, t=torch.full((len(x),), 1 - step / 6))
        return x

    start = unprepared.inputs(2)["x"]
    both = drawn(["a", "b"], start)
    each = [drawn([name], row) for name, row in zip("cd", start.split(1), strict=True)]
    torch.testing.assert_close(both, torch.cat(each))


def compiled_without_routers() -> CompiledTransformer:
    return CompiledTransformer(programs.make(routers=False), "torch")


def test_requests_of_one_call_are_within_the_limit_of_memory() -> None:
    compiled = compiled_without_routers()
    compiled.policy, compiled.memory_limit = ReusePolicy(5), 1
    jobs = [Job(name, None, 1, 6) for name in "abc"]
    together(compiled, jobs)
    with pytest.warns(RuntimeWarning, match="lose theirs"):
        together(compiled, jobs)
    compiled.reset_counters()
    together(compiled, jobs)
    assert compiled.counters.computed >= 2 * 2 * BLOCKS  # but for the one that was called last


def test_what_the_model_itself_overflows_in_hides_nothing_of_others() -> None:
    compiled = compiled_without_routers()
    compiled.policy = ScheduledPolicy(np.array([[1.0] * BLOCKS, [REUSE] * BLOCKS, [REUSE] * BLOCKS]))
    jobs = [Job("a", None, 1, 3), Job("b", None, 1, 3)]
    together(compiled, jobs)
    jobs[0].latents = torch.full_like(jobs[0].latents, 1e38)
    for branch in compiled._session.requests._named["b"]._branches:
        branch.banks[1].deltas[0].fill_(torch.inf)
    with pytest.warns(RuntimeWarning, match="as the model itself"), pytest.raises(NotFiniteError, match="reused"):
        together(compiled, jobs)


def test_what_is_kept_of_a_request_is_its_own_rows_alone() -> None:
    compiled = compiled_without_routers()
    names = ["a", "b", "c", "d"]
    given = programs.inputs(8)
    joint = StorageWeakRef(given["encoder_hidden_states"].untyped_storage())
    for step in range(3):
        with compiled.request(names), compiled.cache_context("cond"):
            compiled(**{**given, "timestep": torch.full((8,), 1 - step / 4)})
    for name in names:
        for branch in compiled._session.requests._named[name]._branches:
            held = [one._tensor for one in branch.conditioning._given.values()]
            assert held and branch.conditioning.nbytes == sum(one.untyped_storage().nbytes() for one in held)
    del given
    assert joint.expired()


def test_rows_of_the_very_same_batch_are_known_without_looking_at_them(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = compiled_without_routers()
    given = programs.inputs(4)
    looked: list[object] = []
    monkeypatch.setattr("runtime.requests.conditioning.torch.equal", lambda *two: looked.append(two))

    def call(text: Tensor, step: int) -> None:
        with compiled.request(["a", "b"]), compiled.cache_context("cond"):
            compiled(**{**given, "encoder_hidden_states": text, "timestep": torch.full((4,), 1 - step / 4)})

    text = given["encoder_hidden_states"]
    for step in range(3):
        call(text, step)
    assert not looked
    text.add_(1)
    call(text, 3)
    assert looked


def several() -> Iterator[object]:
    yield ("a", "b")
    yield {"a": 1, "b": 2}.keys()
    yield np.array(["a", "b"])
    yield (name for name in "ab")


@pytest.mark.parametrize("names", list(several()), ids=["tuple", "keys", "array", "generator"])
def test_whatever_holds_names_gives_several(names: object) -> None:
    compiled = compiled_without_routers()
    with compiled.request(names):  # type: ignore[arg-type]
        compiled(**programs.inputs(2))
    assert sorted(one.request for one in compiled.trace) == ["a", "b"]


def test_a_name_may_be_a_number_and_none_is_no_name_among_others() -> None:
    compiled = compiled_without_routers()
    with compiled.request(17):  # type: ignore[arg-type]
        compiled(**programs.inputs(2))
    assert [one.request for one in compiled.trace] == ["17"]
    with pytest.raises(EditError, match="a name of its own"), compiled.request([None, "a"]):  # type: ignore[list-item]
        pytest.fail("entered")


def test_bundles_are_never_written_over_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "thesis.txt").write_text("years")
    monkeypatch.setattr("sys.argv", ["make", str(tmp_path)])
    monkeypatch.setattr(kept_bundles, "make", lambda place: {})
    assert kept_bundles.main() == 1
    assert (tmp_path / "thesis.txt").read_text() == "years"


def test_alone_and_together_are_the_same_for_a_model_of_frames() -> None:
    compiled = CompiledTransformer(program_of_frames(), "torch")
    compiled.policy = ReusePolicy(1, order=1)
    job, other = OfFrames("a", None, 2, 4), OfFrames("b", None, 2, 4)
    for _ in range(4):
        together(compiled, [job, other])
    twins = CompiledTransformer(program_of_frames(), "torch")
    twins.policy = compiled.policy
    torch.testing.assert_close(job.latents, alone(twins, job).latents)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*has no routers")
def test_a_model_that_doubles_its_batch_keeps_what_rows_of_a_request_are() -> None:
    model = Guided().eval()
    compiled = edit_compile.compile(model, inputs=unprepared.inputs(2), engine="torch")
    blocks = len(compiled.program.manifest.blocks)
    compiled.add_tier(
        "reuse", ScheduledPolicy(np.array([[1.0] * blocks, [REUSE] * blocks, [1.0, 0.0, REUSE][:blocks]]))
    )
    compiled.add_tier("full", ScheduledPolicy(np.ones((3, blocks))))
    calls = {
        name: [unprepared.inputs(2, seed=seed) | {"t": torch.full((2,), 0.9 - 0.2 * step)} for step in range(3)]
        for name, seed in (("reuse", 3), ("full", 4))
    }
    alone = {}
    for name, own in calls.items():
        with compiled.request(f"{name} alone", tier=name):
            alone[name] = [compiled(**call) for call in own]
    for step, (one, other) in enumerate(zip(*calls.values(), strict=True)):
        with compiled.request(list(calls), tier=list(calls)):
            found = compiled(**{name: torch.cat([one[name], other[name]]) for name in one})
        for name, part in zip(calls, found.chunk(2), strict=True):
            torch.testing.assert_close(part, alone[name][step])
    assert not torch.equal(alone["reuse"][1], model(**calls["reuse"][1]))


@pytest.mark.parametrize("read", [Tensor.conj, lambda tensor: tensor.conj().imag], ids=["conjugate", "negative"])
def test_what_lies_in_one_place_and_is_read_otherwise_is_another(read: Callable[[Tensor], Tensor]) -> None:
    tensor = torch.full((2, 3), 1 + 1j)
    known = Conditioning({"c": tensor.imag if read is not Tensor.conj else tensor})
    assert known.same_objects({"c": tensor.imag if read is not Tensor.conj else tensor})
    assert not known.same_values({"c": read(tensor)})
