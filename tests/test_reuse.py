"""Reuse by schedule and by change, of both orders, beside skips and widths: against an oracle, row by row."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from runtime.base.errors import PolicyError
from runtime.face.transformer import CompiledTransformer
from runtime.requests.trace import COMPUTED, REUSED, SKIPPED, RequestTrace
from runtime.routing.policy import EXTRAPOLATE, REUSE, SKIP, RoutingPolicy
from runtime.routing.reuse import ReusePolicy
from runtime.routing.schedule import ScheduledPolicy
from tests import programs
from tests.reuse_oracle import ReuseOracle
from tests.test_transformer import in_threads

KINDS = ("double", "single", "double", "single")
NAMES = {SKIPPED: "skip", REUSED: "reuse", COMPUTED: "compute"}
ALGORITHM_1 = RoutingPolicy(threshold=0.35, margin=0.2, max_reuse=2)
OPEN = RoutingPolicy(threshold=0.0, margin=0.0, max_reuse=0)
POLICIES = {
    "every third step": ReusePolicy(2, otherwise=OPEN),
    "every third step, extrapolated": ReusePolicy(2, order=1, warmup_steps=3, otherwise=OPEN),
    "beside Algorithm 1": ReusePolicy(1, otherwise=ALGORITHM_1),
    "Algorithm 1, extrapolated": ReusePolicy(0, order=1, otherwise=RoutingPolicy(0.2, 0.8, 3)),
    "inputs that changed little": ReusePolicy(3, change=0.12, watches="input", otherwise=ALGORITHM_1),
    "the same, extrapolated": ReusePolicy(5, change=0.2, watches="input", order=1, otherwise=OPEN),
    "a first block that changed little": ReusePolicy(4, change=0.15, watches="first block", otherwise=OPEN),
    "the same beside Algorithm 1": ReusePolicy(
        4, change=0.2, watches="first block", order=1, warmup_steps=2, otherwise=ALGORITHM_1
    ),
}


def step_inputs(rows: int, context: str, step: int, seed: int = 0) -> dict[str, Tensor]:
    """Latents that move slowly, row by row at another pace; the prompt stays, timesteps differ by row."""
    given = programs.inputs(rows, seed=seed + (context == "uncond"))
    drift = programs.inputs(rows, seed=99)["hidden_states"]
    pace = 0.02 * torch.arange(1, rows + 1)[:, None, None]
    moments = 1 - step / 30 - 0.005 * step**1.5 * torch.arange(rows) / rows
    return {**given, "hidden_states": given["hidden_states"] + pace * step * drift, "timestep": moments.float()}


def entries(trace: RequestTrace) -> list[tuple[object, ...]]:
    columns = trace.arrays()
    names = ("context", "step", "block", "row", "done", "width")
    return sorted(
        (trace.contexts[c], int(s), int(b), int(r), NAMES[int(d)], float(w))
        for c, s, b, r, d, w in zip(*(columns[name] for name in names), strict=True)
    )


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", POLICIES)
def test_every_row_is_what_the_oracle_makes_of_it_alone(name: str, rows: int, engine: str) -> None:
    policy, program = POLICIES[name], programs.make(KINDS, seed=3)
    inner = policy.otherwise
    assert isinstance(inner, RoutingPolicy)
    oracle = ReuseOracle(
        KINDS, program.weights, program.routers, programs.WIDTHS, inner.threshold, inner.margin, inner.max_reuse,
        most=policy.max_reuse, warmup=policy.warmup_steps, order=policy.order, change=policy.change,
        watches=policy.watches,
    )  # fmt: skip
    model = CompiledTransformer(program, engine, policy)
    for step in range(20):
        for context in ("cond", "uncond"):
            given = step_inputs(rows, context, step)
            with model.request("one"), model.cache_context(context):
                sample = model(**given).sample
            expected = oracle(context, step, given["hidden_states"], given["encoder_hidden_states"], given["timestep"])
            torch.testing.assert_close(sample, expected, rtol=5e-5, atol=5e-5)
    assert entries(model.trace[0]) == sorted(oracle.log)
    assert not oracle.margins or min(oracle.margins) > 1e-5, "too near to tell"
    seen = Counter(kind for *_, kind, _ in oracle.log)
    assert min(seen["reuse"], seen["compute"]) > len(oracle.log) / 20


@pytest.mark.parametrize("name", POLICIES)
def test_threads_and_requests_do_not_meet(name: str) -> None:
    model = CompiledTransformer(programs.make(KINDS, seed=3), "torch", POLICIES[name])

    def run(seed: int) -> list[Tensor]:
        outputs = []
        for step in range(8):
            for context in ("cond", "uncond"):
                with model.request(f"{seed}"), model.cache_context(context):
                    outputs.append(model(**step_inputs(2, context, step, seed)).sample)
        with model.request(f"{seed}"):
            model.reset()
        return outputs

    together = in_threads([lambda seed=seed: run(seed) for seed in range(4)])
    for seed, got in enumerate(together):
        torch.testing.assert_close(got, run(seed), rtol=1e-5, atol=1e-5)


def test_a_schedule_may_extrapolate_row_by_row() -> None:
    table = np.ones((4, len(KINDS), 2))
    table[2:] = [EXTRAPOLATE, REUSE]
    model = CompiledTransformer(programs.make(KINDS, seed=3), "torch", ScheduledPolicy(table, routed=False))
    alone = CompiledTransformer(model.program, "torch")
    for step in range(4):
        given = step_inputs(2, "cond", step)
        with model.request("both"):
            sample = model(**given).sample
        for row in range(2):
            alone.policy = ScheduledPolicy(table[..., row], routed=False)
            with alone.request(str(row)):
                mine = {key: tensor[row : row + 1] for key, tensor in given.items()}
                torch.testing.assert_close(sample[row : row + 1], alone(**mine).sample, rtol=1e-5, atol=1e-5)
    assert model.counters.reused == 4 * len(KINDS)


def test_a_timestep_computed_twice_is_one_point_of_the_line() -> None:
    model = CompiledTransformer(programs.make(KINDS, seed=3), "torch")
    twin = copy.copy(model)
    once = np.ones((3, len(KINDS)))
    once[2] = EXTRAPOLATE
    model.policy = ScheduledPolicy(once, routed=False)
    twin.policy = ScheduledPolicy(np.insert(once, 1, 1.0, axis=0), routed=False)
    for step in (0, 1, 2):
        given = step_inputs(1, "cond", step)
        with model.request("one"), model.cache_context("cond"):
            if step == 1:  # as a sampler of second order does
                twin(**given)
            results = model(**given).sample, twin(**given).sample
    torch.testing.assert_close(*results)


def test_after_another_policy_there_is_no_line_to_follow() -> None:
    """What was computed while nothing was to be extrapolated has no known time: the residual is reused as it is."""
    program = programs.make(KINDS, seed=3)
    tables = [np.ones((4, len(KINDS))) for _ in range(3)]
    tables[1][0], tables[2][3], tables[1][3] = REUSE, EXTRAPOLATE, REUSE
    samples = []
    for last in (tables[2], tables[1]):
        model = CompiledTransformer(program, "torch")
        for step, table in enumerate((tables[2], tables[2], tables[1], last)):
            model.policy = ScheduledPolicy(table, routed=False)
            with model.request("one"):
                sample = model(**step_inputs(1, "cond", step)).sample
        samples.append(sample)
    torch.testing.assert_close(*samples)


def test_what_is_watched_counts_as_memory_once() -> None:
    def peak(policy: ReusePolicy) -> list[str]:
        model = CompiledTransformer(programs.make(("double",) * 4, seed=3), "torch", policy)
        model.memory_limit = 9000
        with pytest.warns(RuntimeWarning) as told:
            for name in range(9):
                with model.request(str(name)):
                    model(**step_inputs(4, "cond", 0))
        return [str(one.message) for one in told]

    plain, first, own = (
        len(peak(replace(ReusePolicy(2), **options)))
        for options in ({}, {"change": 0.1, "watches": "first block"}, {"change": 0.1, "watches": "input"})
    )
    assert plain <= first <= own


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"max_reuse": -1}, "max_reuse"),
        ({"max_reuse": True}, "max_reuse"),
        ({"warmup_steps": 1.5}, "warmup_steps"),
        ({"order": 2}, "order is 0 or 1"),
        ({"watches": "output", "change": 0.1}, "'first block'"),
        ({"change": 0.1}, "go together"),
        ({"watches": "input"}, "go together"),
        ({"watches": "input", "change": float("nan")}, "at least 0"),
        ({"otherwise": ReusePolicy(1, change=0.1, watches="input")}, "one policy of the two"),
    ],
)
def test_senseless_policies_are_refused(wrong: dict[str, object], told: str) -> None:
    with pytest.raises(PolicyError, match=told):
        ReusePolicy(**{"max_reuse": 1, **wrong})


def test_skips_stay_skips() -> None:
    policy = ReusePolicy(5, otherwise=RoutingPolicy(threshold=0.5))
    assert policy.decide(3, 0, [0.4, 0.9], [1.0, 0.5], [0, 0], [0.0, 0.0]) == [SKIP, REUSE]
