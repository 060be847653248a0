"""What tuning is asked for and given: errors that say what to do, work that goes on, and what fewer steps give."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import edit_compile
from edit_compile import CallsError, CompiledTransformer, EditError, Generation, PolicyError, RecordedCall, Tuned
from tests import programs
from tests.models import tiny_plain
from tests.test_tune import KINDS, STEPS, sampled

Calls = list[Generation]
ASKED: dict[str, Any] = {"budget": {"half": 0.6}, "quality": {"good": 30.0}, "repeats": 1, "reach": 3}


class Stopped(Exception):
    """In the place of a kill."""


@pytest.fixture(scope="module")
def compiled() -> CompiledTransformer:
    return CompiledTransformer(programs.make(KINDS, seed=3, routers=False), "torch")


@pytest.fixture(scope="module")
def recording(compiled: CompiledTransformer, tmp_path_factory: pytest.TempPathFactory) -> Calls:
    folder = tmp_path_factory.mktemp("calls")
    with edit_compile.record(compiled, folder) as recorder:
        for seed in range(4):
            with recorder.generation():
                recorder.result(sampled(compiled, seed))
    return list(edit_compile.Recording(folder))


@pytest.fixture
def counted(compiled: CompiledTransformer) -> Iterator[list[int]]:
    """How often the compiled transformer was called, in its only entry."""
    count = [0]

    def add(*_: object) -> None:
        count[0] += 1

    handle = compiled.register_forward_hook(add)
    yield count
    handle.remove()


def stopping_at(what: str, number: int) -> Callable[[str, int, int], None]:
    def progress(now: str, done: int, total: int) -> None:
        if (now, done) == (what, number):
            raise Stopped

    return progress


def same(one: Tuned, other: Tuned) -> bool:
    """All but the times, and what is told by them."""
    tiers = [{name: replace(tier, times_faster=None) for name, tier in each.tiers.items()} for each in (one, other)]
    return tiers[0] == tiers[1] and one.fewer_steps == other.fewer_steps


@pytest.mark.parametrize(
    ("what", "number"), [("intervals", 40), ("qualities", 0), ("tiers on held-out generations", 0)]
)
def test_a_killed_run_goes_on(
    compiled: CompiledTransformer,
    recording: Calls,
    counted: list[int],
    tmp_path: Path,
    what: str,
    number: int,
) -> None:
    whole = edit_compile.tune(compiled, recording, **ASKED)
    needed, counted[0] = counted[0], 0
    with pytest.raises(Stopped):
        edit_compile.tune(compiled, recording, **ASKED, work=tmp_path / "work", progress=stopping_at(what, number))
    before, counted[0] = counted[0], 0
    seen = list[tuple[str, int]]()
    gone_on = edit_compile.tune(
        compiled, recording, **ASKED, work=tmp_path / "work", progress=lambda now, done, _: seen.append((now, done))
    )
    assert 0 < counted[0] < needed and before > 0
    assert same(gone_on, whole)
    assert sum(now == "intervals" for now, _ in seen) == max(done for now, done in seen if now == "intervals")
    after, counted[0] = counted[0], 0
    assert same(edit_compile.tune(compiled, recording, **ASKED, work=tmp_path / "work"), whole)
    assert counted[0] < after  # nothing but the times


def test_generations_that_are_added_are_computed_and_others_taken_up(
    compiled: CompiledTransformer,
    recording: Calls,
    counted: list[int],
    tmp_path: Path,
) -> None:
    edit_compile.tune(compiled, recording, **ASKED, work=tmp_path)
    call = recording[0].calls[0]
    changed = replace(recording[0], calls=(replace(call, outputs=(call.outputs[0] + 1e-3,)), *recording[0].calls[1:]))
    other = [changed, *recording[1:]]
    counted[0] = 0
    mixed = edit_compile.tune(compiled, other, **ASKED, work=tmp_path)
    taken, counted[0] = counted[0], 0
    assert same(mixed, edit_compile.tune(compiled, other, **ASKED))
    assert taken < counted[0]


def test_the_work_of_another_bundle_is_refused(
    compiled: CompiledTransformer,
    recording: Calls,
    tmp_path: Path,
) -> None:
    work = tmp_path / "work"
    with pytest.raises(Stopped):
        edit_compile.tune(compiled, recording, **ASKED, work=work, progress=stopping_at("budgets", 0))
    other = CompiledTransformer(programs.make(KINDS, seed=4, routers=False), "torch")
    with pytest.raises(EditError, match="the work of tuning another bundle, or with another engine: give another"):
        edit_compile.tune(other, recording, **ASKED, work=work)
    again = CompiledTransformer(programs.make(KINDS, seed=3, routers=False), "torch")
    again.add_tier("one", edit_compile.RoutingPolicy())  # tiers change nothing of what is found
    with pytest.raises(Stopped):
        edit_compile.tune(again, recording, **ASKED, work=work, progress=stopping_at("budgets", 0))
    damaged = next(work.glob("*-reach*.safetensors"))
    damaged.write_bytes(b"nothing")
    with pytest.raises(EditError, match=f"{damaged.name} cannot be read .* delete it"):
        edit_compile.tune(compiled, recording, **ASKED, work=work)
    save_file({"products": torch.full((2, 2), torch.nan)}, damaged)
    with pytest.raises(EditError, match=f"{damaged.name} cannot be read .other numbers.* delete it"):
        edit_compile.tune(compiled, recording, **ASKED, work=work)
    state = work / "work.json"
    state.write_text(state.read_text().replace('"format":2', '"format":1'))
    with pytest.raises(EditError, match="work of another version of edit_compile"):
        edit_compile.tune(compiled, recording, **ASKED, work=work)
    state.write_text("{}")
    with pytest.raises(EditError, match=f"work\\.json cannot be read.*delete {work}"):
        edit_compile.tune(compiled, recording, **ASKED, work=work)
    with pytest.raises(EditError, match="is a file: give a folder"):
        edit_compile.tune(compiled, recording, **ASKED, work=state)
    (tmp_path / "file").write_text("")
    with pytest.raises(EditError, match="holds something else"):
        edit_compile.tune(compiled, recording, **ASKED, work=tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"budget": {"": 0.5}}, r"a tier is called ''"),
        ({"budget": {" ": 0.5}}, r"a tier is called ' '"),
        ({"budget": {3: 0.5}}, r"a tier is called 3"),
        ({"budget": {"fast": 0.5}, "quality": {"fast": 30.0}}, "two tiers are called 'fast'"),
        ({"budget": {"fast": 0.0}}, r"budget\['fast'\] is a share of the dense FLOPs, above 0 and at most 1, not 0.0"),
        ({"budget": {"fast": -1}}, "above 0 and at most 1"),
        ({"budget": {"fast": 1.01}}, "above 0 and at most 1"),
        ({"budget": {"fast": math.nan}}, r"budget\['fast'\] is a number, not nan"),
        ({"budget": {"fast": "0.5"}}, r"budget\['fast'\] is a number, not '0.5'"),
        ({"quality": {"good": math.inf}}, r"quality\['good'\] is a number, not inf"),
        ({"quality": {"best": 190.0}}, r"the best that reuse reaches here is \d+\.\d dB, at \d+% of the dense FLOPs"),
    ],
)
def test_tiers_that_make_no_sense(
    compiled: CompiledTransformer,
    recording: Calls,
    change: dict[str, Any],
    told: str,
) -> None:
    with pytest.raises(PolicyError, match=told):
        edit_compile.tune(compiled, recording, reach=3, repeats=1, **change)


def with_calls(change: Callable[[RecordedCall], RecordedCall]) -> Callable[[Calls], Calls]:
    """The third generation with its calls changed."""

    def changed(generations: Calls) -> Calls:
        third = replace(generations[2], calls=tuple(map(change, generations[2].calls)))
        return [*generations[:2], third, *generations[3:]]

    return changed


def renamed(call: RecordedCall) -> RecordedCall:
    return replace(call, arguments={("x" if k == "hidden_states" else k): v for k, v in call.arguments.items()})


def cut(call: RecordedCall) -> RecordedCall:
    given = {name: value[:, :-1] if value.dim() == 3 else value for name, value in call.arguments.items()}
    return replace(call, arguments=given, outputs=(call.outputs[0][:, :-1],))


def spoilt(call: RecordedCall) -> RecordedCall:
    return replace(call, outputs=(call.outputs[0] * math.nan,))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda given: given[:3], "recording: 3 recorded.*at least 2 to search by and 2 held out, 4 in all"),
        (lambda given: [], "recording: 0 recorded"),
        (with_calls(renamed), r"recording\[2\]: the model does not take the arguments of calls\[0\].* no 'x'"),
        (with_calls(spoilt), r"recording\[2\]: calls\[0\] holds NaN or infinity: leave this generation out"),
        (
            lambda given: [replace(one, result=one.result * math.inf) for one in given],
            r"recording\[0\]: the result holds",
        ),
        (
            lambda given: [replace(one, calls=one.calls[:2]) for one in given],
            r"recording\[0\]: .*one step says nothing",
        ),
        (lambda given: [replace(one, calls=one.calls[:-2]) for one in given[:1]] + given[1:], "steps: tune"),
    ],
)
def test_calls_that_cannot_be_tuned_on(
    compiled: CompiledTransformer,
    recording: Calls,
    change: Callable[[Calls], Calls],
    told: str,
) -> None:
    with pytest.raises(CallsError, match=told):
        edit_compile.tune(compiled, change(recording), reach=3, repeats=1)


def test_calls_in_other_shapes_than_were_compiled(
    compiled: CompiledTransformer,
    recording: Calls,
) -> None:
    other = [replace(one, calls=tuple(map(cut, one.calls)), result=None) for one in recording]
    with (
        pytest.raises(CallsError, match=r"does not take the recorded calls, compile it for them .*--calls"),
        pytest.warns(RuntimeWarning, match="without a result"),
    ):
        edit_compile.tune(compiled, other, reach=3, repeats=1)


@pytest.mark.filterwarnings("ignore:.*has no routers")
def test_what_is_not_compiled(recording: Calls) -> None:
    model, _ = tiny_plain()
    with pytest.raises(CallsError, match=r"compiled is a PlainDiT: give what edit_compile\.compile"):
        edit_compile.tune(model, recording)
    with pytest.raises(CallsError, match="nothing is compiled yet"):
        edit_compile.tune(edit_compile.compile(model, engine="torch"), recording)


def test_a_recording_of_another_class(compiled: CompiledTransformer, tmp_path: Path) -> None:
    with edit_compile.record(torch.nn.Linear(2, 2), tmp_path) as recorder:
        for _ in range(4):
            with recorder.generation():
                recorder._model(torch.zeros(1, 2))
    with pytest.raises(CallsError, match="holds calls of Linear, what is tuned is a"):
        edit_compile.tune(compiled, edit_compile.Recording(tmp_path))


def test_what_was_recorded_without_a_result_is_warned_of(
    compiled: CompiledTransformer,
    recording: Calls,
) -> None:
    silent = [replace(one, result=None) for one in recording]
    with pytest.warns(RuntimeWarning, match=r"without a result.*recorder\.result\(latents\)"):
        edit_compile.tune(compiled, silent, budget={"half": 0.6}, reach=3, repeats=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        edit_compile.tune(compiled, recording, budget={"half": 0.6}, reach=3, repeats=1)


def test_a_sampler_that_is_not_explained_is_warned_of(
    compiled: CompiledTransformer,
    recording: Calls,
) -> None:
    draw = torch.Generator().manual_seed(0)
    noisy = [replace(one, result=10 * torch.randn(one.result.shape, generator=draw)) for one in recording]
    with pytest.warns(
        RuntimeWarning, match=rf"recording\[\d\]: of step {STEPS - 1} of its sampler only \d+% is explained"
    ):
        edit_compile.tune(compiled, noisy, budget={"half": 0.6}, reach=3, repeats=1)


def test_all_of_the_flops_is_the_dense_model(
    compiled: CompiledTransformer,
    recording: Calls,
) -> None:
    tuned = edit_compile.tune(compiled, recording, budget={"full": 1.0}, reach=3, repeats=1)
    own = CompiledTransformer(compiled.program, "torch")
    tuned.add_to(own)
    expected = sampled(own, 7)
    own.reset()
    own.tier = "full"
    assert torch.equal(sampled(own, 7), expected)
    assert tuned.computed_steps == {"full": STEPS} and tuned.tiers["full"].flops_share == 1.0
