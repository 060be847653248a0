"""Routers' decisions as a schedule for each branch of guidance, and policies by branch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import edit_compile
from edit_compile import BranchedPolicy, Frozen, ReusePolicy, RoutingPolicy, ScheduledPolicy
from runtime.base.errors import PolicyError
from runtime.calls.dispatch import Dispatch
from runtime.face.transformer import CompiledTransformer
from runtime.requests.trace import COMPUTED, REUSED
from runtime.routing.policy import REUSE, SKIP
from tests import programs
from tests.test_reuse import step_inputs

KINDS = ("double", "single", "double")
CONTEXTS = ("cond", "uncond")
STEPS, ROWS = 4, 3
ROUTED = RoutingPolicy(0.35, 0.3, 2)
TABLES = {
    "cond": ScheduledPolicy([[1.0, 0.5, SKIP], [REUSE, SKIP, 1.0], [0.25, REUSE, REUSE], [1.0] * 3], False, "compute"),
    "uncond": ScheduledPolicy(
        [[SKIP, 1.0, 0.75], [0.5, REUSE, SKIP], [SKIP] * 3, [SKIP, REUSE, 0.5]], False, "compute"
    ),
}
BY_BRANCH = BranchedPolicy(TABLES, ROUTED)


def model(**changes: Any) -> CompiledTransformer:
    program = programs.make(KINDS)
    return CompiledTransformer(replace(program, **changes), "torch", policy=ROUTED)


def generation(compiled: CompiledTransformer, seed: int, steps: int = STEPS) -> list[Tensor]:
    """What a generation gives, step by step, both branches."""
    found = []
    with compiled.request(), torch.no_grad():
        for step in range(steps):
            for name in CONTEXTS:
                with compiled.cache_context(name):
                    found.append(compiled(**step_inputs(ROWS, name, step, seed=10 * seed)).sample)
    return found


def decisions(compiled: CompiledTransformer) -> list[tuple[str, int, int, int, float]]:
    """(branch, step, block, row, decision) of all traced generations."""
    found = []
    for trace in compiled.trace:
        columns = trace.arrays()
        names = ("context", "step", "block", "row", "done", "width")
        for context, step, block, row, done, width in zip(*(columns[n].tolist() for n in names), strict=True):
            way = width if done == COMPUTED else REUSE if done == REUSED else SKIP
            found.append((trace.contexts[context], step, block, row, way))
    return found


@pytest.fixture
def routed() -> CompiledTransformer:
    compiled = model()
    for seed in range(6):
        generation(compiled, seed)
    return compiled


@pytest.fixture
def frozen(routed: CompiledTransformer) -> Frozen:
    with pytest.warns(UserWarning, match="decide by the image, too, and the schedule says"):
        return edit_compile.freeze(routed)


def test_a_schedule_has_the_most_frequent_decision_of_each_branch(routed: CompiledTransformer, frozen: Frozen) -> None:
    seen: dict[tuple[str, int, int], Counter[float]] = {}
    for name, step, block, _, way in decisions(routed):
        seen.setdefault((name, step, block), Counter())[way] += 1
    assert len({way for counter in seen.values() for way in counter}) > 2  # else this would show nothing
    for (name, step, block), counter in seen.items():
        policy = frozen.policy.of(name)
        assert isinstance(policy, ScheduledPolicy)
        assert counter[policy.table[step, block]] == max(counter.values())
    for name in CONTEXTS:
        own = [counter for (branch, _, _), counter in seen.items() if branch == name]
        share = sum(max(counter.values()) for counter in own) / sum(counter.total() for counter in own)
        assert frozen.agreement[name] == pytest.approx(share)
    assert (frozen.steps, frozen.generations) == (STEPS, 6)


def test_each_branch_is_computed_as_its_schedule_says_and_no_router_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = model()
    compiled.add_tier("frozen", BY_BRANCH)
    compiled.save(tmp_path / "x")
    loaded = edit_compile.load(tmp_path / "x", engine="torch", tier="frozen")
    expected = []
    with compiled.request(), torch.no_grad():
        for step in range(STEPS):
            for name in CONTEXTS:
                with compiled.cache_context(name), compiled.decided_by(TABLES[name]):
                    expected.append(compiled(**step_inputs(ROWS, name, step, seed=70)).sample)
    asked = Counter[bool]()
    route = Dispatch._route

    def counted(self: Dispatch, *args: Any) -> Any:
        asked[self._routers is not None] += 1
        return route(self, *args)

    monkeypatch.setattr(Dispatch, "_route", counted)
    given = generation(loaded, 7)
    assert set(asked) == {False}
    for mine, theirs in zip(given, expected, strict=True):
        assert torch.equal(mine, theirs)
    assert [one for one in decisions(loaded) if one[-1] != TABLES[one[0]].table[one[1], one[2]]] == []


def test_another_branch_is_decided_by_the_routers(frozen: Frozen) -> None:
    compiled, plain = model(), model()
    compiled.policy = frozen.policy
    for one in (compiled, plain):
        with one.request(), one.cache_context("third"), torch.no_grad():
            one(**step_inputs(ROWS, "third", 0))
    assert decisions(compiled) == decisions(plain)


def test_decisions_that_all_images_share_are_frozen_without_a_word(recwarn: pytest.WarningsRecorder) -> None:
    compiled = model()
    compiled.policy = BY_BRANCH
    for seed in range(2):
        generation(compiled, seed)
    found = edit_compile.freeze(compiled)
    assert not recwarn.list
    assert found.agreement == dict.fromkeys(CONTEXTS, 1.0)
    assert found.policy == BY_BRANCH


def test_widths_are_those_of_the_model_not_what_a_trace_keeps_of_them() -> None:
    program = programs.make(KINDS)
    widths = (0.1, 0.3, 0.7, 1.0)
    plans = tuple(
        replace(p, variants=tuple(replace(v, width=w) for v, w in zip(p.variants, widths, strict=True)))
        for p in program.manifest.plans
    )
    files = program.files
    for old, new in (("w025", "w010"), ("w050", "w030"), ("w075", "w070")):
        files = {name.replace(old, new): data for name, data in files.items()}
    compiled = model(manifest=replace(program.manifest, widths=widths, plans=plans), files=files)
    compiled.policy = ScheduledPolicy([[0.3, 0.1, 0.7]])
    generation(compiled, 0, steps=1)
    policy = edit_compile.freeze(compiled).policy.of("cond")
    assert isinstance(policy, ScheduledPolicy)
    assert policy.table.tolist() == [[0.3, 0.1, 0.7]]


def test_generations_of_different_lengths_are_refused_and_the_last_can_be_taken(routed: CompiledTransformer) -> None:
    generation(routed, 8, steps=2)
    with pytest.raises(PolicyError, match=r"have 2 and 4 steps.*freeze\(compiled, last="):
        edit_compile.freeze(routed)
    assert edit_compile.freeze(routed, last=1).steps == 2


def test_there_has_to_be_a_generation() -> None:
    with pytest.raises(PolicyError, match="holds no generation: make some images"):
        edit_compile.freeze(model())


def test_what_was_extrapolated_is_not_taken_for_reused() -> None:
    compiled = model()
    compiled.policy = ReusePolicy(2, order=1)
    generation(compiled, 0, steps=6)
    with pytest.raises(PolicyError, match="residuals were extrapolated"):
        edit_compile.freeze(compiled)
    compiled.policy = ReusePolicy(2)
    dense = generation(compiled, 1, steps=6)
    frozen = edit_compile.freeze(compiled, last=1)
    compiled.policy = frozen.policy
    for mine, theirs in zip(generation(compiled, 1, steps=6), dense, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("last", [0, -1, 1.5])
def test_the_last_none_are_no_generations(routed: CompiledTransformer, last: Any) -> None:
    with pytest.raises(PolicyError, match="last is a whole number of at least 1"):
        edit_compile.freeze(routed, last=last)


INSIDE: list[tuple[Callable[[BranchedPolicy], object], str]] = [
    (lambda own: BranchedPolicy({"cond": own}, ROUTED), "branched itself"),
    (lambda own: BranchedPolicy({}, own), "branched itself"),
    (lambda own: ReusePolicy(2, otherwise=own), "otherwise is a BranchedPolicy"),
    (lambda own: own.decide(0, 0, [1.0], [1.0], [0], []), "stands by itself"),
]


@pytest.mark.parametrize(("put", "told"), INSIDE)
def test_a_policy_by_branch_is_the_outermost(put: Callable[[BranchedPolicy], object], told: str) -> None:
    with pytest.raises(PolicyError, match=told):
        put(BranchedPolicy({"cond": ROUTED}, ROUTED))


def test_a_branch_is_named_by_a_text() -> None:
    with pytest.raises(PolicyError, match="branches: 0 is no branch's name"):
        BranchedPolicy({0: ROUTED}, ROUTED)  # type: ignore[dict-item]


def test_a_schedule_of_other_blocks_is_refused_in_a_branch_too() -> None:
    policy = BranchedPolicy({"cond": ScheduledPolicy([[1.0]])}, ROUTED)
    with pytest.raises(PolicyError, match="the schedule is for 1 blocks, the model has 3"):
        model().add_tier("wrong", policy)
