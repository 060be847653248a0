"""A tier may be changed in the middle of generations: a residual is what its block last computed, whoever decided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from edit_compile import ReusePolicy, RoutingPolicy, ScheduledPolicy
from runtime.bundle.program import Program
from runtime.face.transformer import CompiledTransformer
from runtime.requests.trace import COMPUTED, REUSED, SKIPPED, RequestTrace
from runtime.routing.policy import REUSE, SKIP
from tests import programs
from tests.emulator import Emulator
from tests.oracle import Oracle
from tests.test_reuse import step_inputs

KINDS = ("double", "single", "double")
ROWS = 2
STEPS = 7
MIXED = np.array([[0.5, REUSE, SKIP], [REUSE, SKIP, 1.0], [REUSE, REUSE, REUSE]])
TIERS = {
    "full": RoutingPolicy(0.0, 0.0, 0),  # keeps no residuals
    "routed": RoutingPolicy(0.35, 0.3, 2),
    "planned": ScheduledPolicy(np.tile(MIXED, (3, 1))),
    "planned, without routers": ScheduledPolicy(np.tile(MIXED[::-1], (3, 1)), routed=False),
    "every third": ReusePolicy(2, otherwise=RoutingPolicy(0.3, 0.0, 0)),
    "while inputs stay": ReusePolicy(4, 0.5, "input"),
    "while the first block stays": ReusePolicy(4, 0.5, "first block"),
}


class Replay(Oracle):
    """Does what was decided before, with residuals of its own."""

    def __init__(self, program: Program) -> None:
        super().__init__(KINDS, program.weights, program.routers, programs.WIDTHS, 0.0, 0.0, 0)
        self.residuals: dict[tuple[int, int], list[Tensor]] = {}

    def after(self, decided: Mapping[tuple[int, int], tuple[int, float]], inputs: Mapping[str, Tensor]) -> Tensor:
        """The output of a step, `decided` being (what was done, width) by (block, row)."""
        rows = []
        for row in range(ROWS):
            hidden = inputs["hidden_states"][row] @ self.weights["glue.into"]
            text = inputs["encoder_hidden_states"][row]
            time = torch.sin(inputs["timestep"][row] * self.weights["glue.timing"])
            for block, kind in enumerate(KINDS):
                states = [hidden, text] if kind == "double" else [hidden]
                done, width = decided[block, row]
                if done == COMPUTED:
                    after = self._block(block, kind, states, time, width)
                    self.residuals[block, row] = [y - x for x, y in zip(states, after, strict=True)]
                if done != SKIPPED:
                    states = [x + delta for x, delta in zip(states, self.residuals[block, row], strict=True)]
                hidden, text = states[0], states[1] if kind == "double" else text
            rows.append(hidden @ self.weights["glue.out"])
        return torch.stack(rows)


def decided_in(trace: RequestTrace, step: int) -> dict[tuple[int, int], tuple[int, float]]:
    columns = trace.arrays()
    here = columns["step"] == step
    entries = zip(*(columns[name][here].tolist() for name in ("block", "row", "done", "width")), strict=True)
    return {(block, row): (done, width) for block, row, done, width in entries}


def tiered(program: Program, dispatch: str = "host") -> CompiledTransformer:
    model = CompiledTransformer(program, "torch", dispatch=dispatch)
    for name, policy in TIERS.items():
        model.add_tier(name, policy)
    return model


@pytest.fixture(scope="module")
def program() -> Program:
    return programs.make(KINDS, seed=3)


choices = st.lists(st.sampled_from([*TIERS]), min_size=STEPS, max_size=STEPS)
on_device = st.lists(st.sampled_from([*TIERS][:4]), min_size=STEPS, max_size=STEPS)


@settings(max_examples=40, deadline=None)
@given(one=choices, other=choices)
def test_requests_under_way_stay_right_whatever_tiers_they_go_through(
    program: Program, one: Sequence[str], other: Sequence[str]
) -> None:
    check_replayed(tiered(program), one, other)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(one=on_device | choices, other=on_device)
def test_so_they_do_where_decisions_are_taken_on_the_device(
    recorder: Emulator, program: Program, one: Sequence[str], other: Sequence[str]
) -> None:
    check_replayed(tiered(program, "device"), one, other)
    assert recorder.replays


def check_replayed(model: CompiledTransformer, one: Sequence[str], other: Sequence[str]) -> None:
    """Two requests at once, through these tiers step by step, give what their decisions say."""
    replays = {name: Replay(model.program) for name in ("one", "other")}
    for step in range(STEPS):
        for seed, (request, names) in enumerate((("one", one), ("other", other))):
            inputs = step_inputs(ROWS, "cond", step, seed)
            model.tier = names[step] if request == "one" else "full"
            with model.request(request, tier=None if request == "one" else names[step]):
                sample = model(**inputs).sample
            decided = [decided_in(trace, step) for trace in model.trace if trace.request == request]
            expected = replays[request].after(next(filter(None, decided)), inputs)
            torch.testing.assert_close(sample, expected, rtol=1e-4, atol=1e-4)


def test_tiers_in_turn_do_everything(program: Program) -> None:
    """Else the test above would compare little."""
    model = tiered(program)
    for step in range(STEPS):
        with model.request("one", tier=list(TIERS)[1 + step % 6]):
            model(**step_inputs(ROWS, "cond", step))
    assert set(model.trace[-1].arrays()["done"]) == {COMPUTED, REUSED, SKIPPED}


def test_what_one_tier_watched_says_nothing_to_another(program: Program) -> None:
    """What an input was like is no measure of how the first block has changed: what is not known is computed."""
    for first, second in (("input", "first block"), ("first block", "input")):
        model = CompiledTransformer(program, "torch")
        for watched in (first, second):
            model.add_tier(watched, ReusePolicy(9, 1e6, watched))  # whatever the change is, as long as it is known
        for step, tier in enumerate((first, first, second, second)):
            with model.request("one", tier=tier):
                model(**step_inputs(1, "cond", step))
        columns = model.trace[-1].arrays()
        last = columns["done"][columns["block"] == len(KINDS) - 1].tolist()
        assert last == [COMPUTED, REUSED, COMPUTED, REUSED]
