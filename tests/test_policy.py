from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.base.errors import PolicyError
from runtime.routing.policy import EMPTY, REUSE, SKIP, RoutingPolicy
from runtime.routing.schedule import ScheduledPolicy

probability = st.floats(0, 1)
row = st.tuples(probability, st.sampled_from([0.25, 0.5, 1.0]), st.integers(EMPTY, 6))


@given(
    rows=st.lists(row, min_size=1, max_size=4),
    threshold=probability,
    margin=st.floats(0, 0.5),
    max_reuse=st.integers(0, 5),
    warmup=st.integers(0, 3),
    step=st.integers(0, 5),
)
def test_each_row_follows_algorithm_1(rows, threshold, margin, max_reuse, warmup, step) -> None:
    policy = RoutingPolicy(threshold, margin, max_reuse, warmup)
    decisions = policy.decide(step, 0, *map(list, zip(*rows, strict=True)))
    for (p, width, held), decision in zip(rows, decisions, strict=True):
        if p < threshold:
            assert decision == SKIP
        elif p <= threshold + margin and held != EMPTY and held < max_reuse and step >= warmup:
            assert decision == REUSE
        else:
            assert decision == width


def test_the_threshold_itself_is_open_and_reusable() -> None:
    policy = RoutingPolicy(0.5, 0.1, 3)
    assert policy.decide(0, 0, [0.5], [1.0], [EMPTY]) == [1.0]
    assert policy.decide(0, 0, [0.5], [1.0], [2]) == [REUSE]
    assert policy.decide(0, 0, [0.5], [1.0], [3]) == [1.0]
    assert policy.decide(0, 0, [0.6], [1.0], [0]) == [REUSE]
    assert policy.decide(0, 0, [0.61], [1.0], [0]) == [1.0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"threshold": 1.5},
        {"threshold": -0.1},
        {"margin": 2.0},
        {"max_reuse": -1},
        {"max_reuse": 1.5},
        {"warmup_steps": -2},
    ],
)
def test_senseless_settings_are_refused_by_name(wrong) -> None:
    with pytest.raises(PolicyError, match=next(iter(wrong))):
        RoutingPolicy(**wrong)


def test_nan_threshold_is_refused() -> None:
    with pytest.raises(PolicyError):
        RoutingPolicy(threshold=float("nan"))


def test_presets_are_the_papers() -> None:
    assert RoutingPolicy.preset("flux") == RoutingPolicy(0.5, 0.10, 3)
    assert RoutingPolicy.preset("qwen-image-base") == RoutingPolicy(0.5, 0.10, 5)
    assert RoutingPolicy.preset("qwen-image-turbo") == RoutingPolicy(0.5, 0.15, 10)
    assert RoutingPolicy.preset("hunyuan3d") == RoutingPolicy(0.5, 0.15, 5)
    with pytest.raises(PolicyError, match="hunyuan3d"):
        RoutingPolicy.preset("sdxl")


def test_a_policy_survives_the_manifest() -> None:
    policy = RoutingPolicy(0.4, 0.2, 7, 3)
    assert RoutingPolicy.stored(policy.to_spec()) == policy


@given(
    steps=st.integers(1, 30),
    blocks=st.integers(1, 20),
    gate=probability,
    width=st.floats(0.25, 1.0),
    seed=st.integers(0, 3),
)
def test_a_drawn_schedule_meets_its_budget(steps, blocks, gate, width, seed) -> None:
    table = ScheduledPolicy.at_budget(steps, blocks, gate, width, seed).table
    computed = table[table > 0]
    assert len(computed) == round(gate * steps * blocks)
    assert set(computed) <= {0.25, 0.5, 0.75, 1.0}
    if len(computed):
        assert abs(computed.sum() - width * len(computed)) <= 0.125 + 1e-6  # half of the step between widths
    per_step = (table > 0).sum(1)
    assert per_step.max() - per_step.min() <= 1


def test_a_drawn_schedule_uses_every_width_and_its_seed() -> None:
    first = ScheduledPolicy.at_budget(28, 57, 0.5, 0.6, seed=1).table
    assert {0.0, 0.25, 0.5, 0.75, 1.0} == set(np.unique(first))
    np.testing.assert_array_equal(first, ScheduledPolicy.at_budget(28, 57, 0.5, 0.6, seed=1).table)
    assert (first != ScheduledPolicy.at_budget(28, 57, 0.5, 0.6, seed=2).table).any()


@pytest.mark.parametrize(("gate", "width"), [(1.2, 0.5), (-0.1, 0.5), (0.5, 0.1), (0.5, 1.1)])
def test_impossible_budgets_are_refused(gate, width) -> None:
    with pytest.raises(PolicyError):
        ScheduledPolicy.at_budget(4, 4, gate, width)


def test_a_schedule_is_read_per_row_where_it_has_rows() -> None:
    table = np.array([[[SKIP, REUSE, 0.5]]])
    policy = ScheduledPolicy(table)
    assert policy.keeps == 1
    assert policy.decide(0, 0, [1.0] * 3, [1.0] * 3, [0, 0, 0]) == [SKIP, REUSE, 0.5]
    assert policy.decide(0, 0, [1.0] * 3, [1.0] * 3, [EMPTY] * 3) == [SKIP, 1.0, 0.5]
    with pytest.raises(PolicyError, match="3 rows"):
        policy.decide(0, 0, [1.0], [1.0], [0])


def test_a_schedule_ends_where_its_table_ends() -> None:
    policy = ScheduledPolicy(np.zeros((2, 3)))
    assert policy.keeps == 0
    for step, block in ((2, 0), (0, 3)):
        with pytest.raises(PolicyError, match="2 steps of 3 blocks"):
            policy.decide(step, block, [1.0], [1.0], [0])


@pytest.mark.parametrize("table", [[[1.5]], [[-0.5]], [[float("nan")]], [0.5], [[]]])
def test_senseless_schedules_are_refused(table) -> None:
    with pytest.raises(PolicyError):
        ScheduledPolicy(np.array(table))


def test_a_schedule_is_its_own_copy() -> None:
    table = np.zeros((1, 1))
    policy = ScheduledPolicy(table)
    table[0, 0] = 1.0
    assert policy.decide(0, 0, [1.0], [1.0], [0]) == [SKIP]
    with pytest.raises(ValueError, match="read-only"):
        policy.table[0, 0] = 1.0
