"""``decide.cu``, compiled for a CPU, against what decides on the host."""

from __future__ import annotations

import math
import re
from ctypes import addressof, c_double, c_int, c_uint, c_void_p
from dataclasses import replace
from importlib.resources import files

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.device.policy import COMPUTE_CASE, REUSE_CASE, SKIP_CASE, UNPLANNED
from runtime.device.recorder import Condition
from runtime.device.state import FIELDS, Clock
from runtime.device.step import OWN
from runtime.requests.evidence import LAST, MOST, continues
from runtime.requests.rule import Arrival, Grounds, Verdict, advance, grounds
from runtime.requests.sighting import one_if_equal
from runtime.routing.policy import EMPTY, REUSE, SKIP, RoutingPolicy
from tests.emulator import call_kernel, library

WIDTHS = (0.25, 0.5, 1.0)
VARIANTS = torch.tensor([0, 0, 1], dtype=torch.int32)  # a plan without a variant for .25
probability = st.floats(0, 1)
logit = st.floats(-4, 4)


class Guard:
    """One row of one block, with a bank that was reused `held` times."""

    def __init__(self, policy: RoutingPolicy, step: int, held: int, keeps: bool = True) -> None:
        self.bounds = torch.tensor([policy.threshold, policy.threshold + policy.margin], dtype=torch.float64)
        self.limits = torch.tensor([policy.max_reuse, policy.warmup_steps, keeps, 0], dtype=torch.int32)
        self.table = torch.full((4, 2), UNPLANNED, dtype=torch.int32)
        self.own = torch.tensor([0, 0, 0, step, 0], dtype=torch.int32)
        self.held = torch.tensor([77, held], dtype=torch.int32)
        self.decision = torch.zeros(1, dtype=torch.float64)
        self.switch = c_uint(99)

    def __call__(self, logits: list[float] | None) -> int:
        given = None if logits is None else torch.tensor(logits, dtype=torch.float64)
        call_kernel(
            "decide",
            (
                Condition(addressof(self.switch)),
                given,
                0 if given is None else len(WIDTHS),
                None if given is None else VARIANTS,
                1,
                self.bounds,
                self.limits,
                self.table,
                4,
                2,
                1,
                self.own,
                self.held,
                self.decision,
            ),
        )
        assert int(self.held[0]) == 77  # another row's
        case = int(self.decision)
        assert self.switch.value == case % 2**32
        return case


@settings(max_examples=300, deadline=None)
@given(
    policy=st.builds(
        RoutingPolicy,
        threshold=probability,
        margin=probability,
        max_reuse=st.integers(0, 3),
        warmup_steps=st.integers(0, 3),
    ),
    logits=st.lists(logit, min_size=4, max_size=4),
    step=st.integers(0, 5),
    held=st.integers(EMPTY, 4),
)
def test_it_decides_as_the_host_does(policy: RoutingPolicy, logits: list[float], step: int, held: int) -> None:
    gate = 1 / (1 + math.exp(-logits[0]))
    choice = logits[1:].index(max(logits[1:]))
    (expected,) = policy.decide(step, 0, [gate], [WIDTHS[choice]], [held])
    guard = Guard(policy, step, held)
    case = guard(logits)
    if expected == SKIP:
        assert (case, int(guard.held[1])) == (SKIP_CASE, held)
    elif expected == REUSE:
        assert (case, int(guard.held[1])) == (REUSE_CASE, held + 1)
    else:
        assert (case, int(guard.held[1])) == (COMPUTE_CASE + int(VARIANTS[choice]), 0)


def test_no_router_is_an_open_gate_and_the_full_width() -> None:
    assert Guard(RoutingPolicy(), 0, EMPTY)(None) == COMPUTE_CASE + 1
    assert Guard(RoutingPolicy(threshold=1.0, margin=0.0), 0, 0)(None) == REUSE_CASE


def test_where_nothing_is_ever_reused_the_bank_stays_empty() -> None:
    guard = Guard(RoutingPolicy(max_reuse=0), 0, EMPTY, keeps=False)
    assert guard([3.0, 0.0, 0.0, 1.0]) == COMPUTE_CASE + 1
    assert int(guard.held[1]) == EMPTY


def test_a_schedule_decides_by_step_and_row() -> None:
    cases = {0: SKIP_CASE, 1: REUSE_CASE, 2: COMPUTE_CASE, 3: UNPLANNED, 4: UNPLANNED}
    for step, planned in cases.items():
        guard = Guard(RoutingPolicy(), step, 0)
        guard.limits[3] = 1
        guard.table[:3, 1] = torch.tensor([SKIP_CASE, REUSE_CASE, COMPUTE_CASE])
        assert guard([5.0, 0.0, 0.0, 1.0]) == planned
    empty = Guard(RoutingPolicy(), 1, EMPTY)
    empty.limits[3] = 1
    empty.table[1, 1] = REUSE_CASE
    assert empty(None) == COMPUTE_CASE + 1


GRAMS = {  # of (d, x, v): the latents are the same, what an output makes of them, near, and others
    "same": [[0.0, 0.0, 0.0], [0.0, 4.0, 1.0], [0.0, 1.0, 2.0]],
    "continue": [[1.0, 0.5, 1.4], [0.5, 4.0, 1.0], [1.4, 1.0, 2.0]],
    "near": [[0.01, 0.0, 0.0], [0.0, 4.0, 1.0], [0.0, 1.0, 2.0]],
    "others": [[8.0, -4.0, 0.1], [-4.0, 4.0, 0.2], [0.1, 0.2, 2.0]],
    "nearly": [[1.0, 0.5, 1.28], [0.5, 4.0, 1.0], [1.28, 1.0, 2.0]],
}
call = st.tuples(
    st.integers(0, 2),  # branch
    st.lists(st.integers(0, 3), min_size=2, max_size=2),  # times
    st.sampled_from([None, *GRAMS]),
    st.booleans(),  # the latents are those of the first call
    st.integers(0, 7),  # what is told of the conditioning
    st.booleans(),  # rows changed places
)


@settings(max_examples=500, deadline=None)
@given(calls=st.lists(call, max_size=14), trusted=st.booleans())
def test_a_clock_goes_by_the_rule_of_the_host(calls, trusted: bool) -> None:
    """Steps, verdicts, and which branches find their banks emptied, for any order of calls."""
    place, tick = None, 0
    ticks = dict.fromkeys(range(3), -1)
    clock = Clock(2, torch.device("cpu"))
    own = [torch.zeros(OWN, dtype=torch.int32) for _ in ticks]
    held = [torch.full((3,), EMPTY, dtype=torch.int32) for _ in ticks]
    banks = dict.fromkeys(ticks, EMPTY)
    for branch, moments, kind, first, told, astray in calls:
        times = tuple(map(float, moments))
        gram = None if kind is None else np.array([GRAMS[kind]])
        seen = ticks[branch] == tick
        renewed, fresh, anew = bool(told & 1), bool(told & 2), bool(told & 4)
        on = None
        if gram is not None:
            on = place is not None and continues(gram, 1e-7, grounds(place, times, seen, renewed, fresh))
        if anew and not trusted:
            on = False
        arrival = Arrival(times, seen, on, None if gram is None else first, renewed, astray and on is not None, trusted)
        before, (place, verdict) = place, advance(place, arrival)
        if verdict is not Verdict.GOES_ON:
            banks = dict.fromkeys(banks, EMPTY)
        if before is None or verdict is not Verdict.GOES_ON or place.calls != before.calls:
            tick += 1
        ticks[branch] = tick
        matrix = None if gram is None else torch.from_numpy(gram).contiguous()
        flag = torch.tensor([int(first)], dtype=torch.int32)
        call_kernel("advance", (
            torch.tensor(times, dtype=torch.float64), clock.last, clock.begun, 2, matrix, 0 if gram is None else 1, 3,
            flag, torch.tensor([int(astray)], dtype=torch.int32), torch.tensor([1e-7], dtype=torch.float64),
            told + 8 * trusted, clock.fields,
            own[branch], held[branch], 3,
        ))  # fmt: skip
        assert int(own[branch][3]) == place.step
        assert int(own[branch][4]) == verdict
        assert set(held[branch].tolist()) == {banks[branch]}
        assert clock.place == replace(place, times=one_if_equal(times), begun=one_if_equal(place.begun))
        banks[branch] = 1
        held[branch].fill_(1)


@settings(max_examples=200, deadline=None)
@given(
    vectors=st.integers(2, 6),
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([0.0, 1e-8, 1e-3, 0.05, 1.0, 30.0]),
    share=st.sampled_from([0.0, 0.4, 0.6, 1.0]),
    on=st.builds(Grounds, st.booleans(), st.booleans(), st.booleans()),
)
def test_latents_continue_on_the_device_where_they_do_on_the_host(vectors, seed, scale, share, on) -> None:
    draw = np.random.default_rng(seed)
    basis = draw.normal(size=(vectors - 1, 40))
    moved = scale * (share * draw.normal(size=40) + (1 - share) * draw.normal(size=vectors - 1) @ basis)
    stack = np.stack([moved, *basis])
    gram = stack @ stack.T
    eps = 1e-3
    matrix = torch.from_numpy(gram).contiguous()
    function = library().continues
    function.restype = c_int
    found = function(
        c_void_p(matrix.data_ptr()), c_int(vectors), c_double(eps), c_int(on.near), c_int(on.strict), c_int(on.repeated)
    )
    assert bool(found) == continues(gram[None], eps, on)


def test_numbers_of_the_kernel_and_of_the_runtime_are_the_same() -> None:
    source = files("runtime.device").joinpath("decide.cu").read_text()
    enums = [
        [name.strip().split(" = ")[0] for name in listed.split(",")] for listed in re.findall(r"enum \{(.*)\}", source)
    ]
    values = dict(re.findall(r"(\w+) = (-?\d+)[,} ]", source))
    assert (len(enums[0]), len(enums[1]), len(enums[6])) == (FIELDS, OWN, 4)
    known = ["STARTED", "STEP", "CALLS", "DIRECTION", "BROKE", "LEFT", "SPLIT", "DOUBTS"]
    assert enums[0][:8] == known  # which Clock reads and writes
    assert [enums[0].index(name) for name in ("TICK", "VERDICT")] + [enums[1].index("OWN_TICK")] == [10, 11, 2]
    assert int(values["MOST"]) == MOST + 2  # the move and the latents before it
    assert (int(values["LAST"]), enums[5]) == (LAST, ["RENEWED", "FRESH", "ANEW", "TRUSTED"])
    assert enums[2] == [verdict.name for verdict in Verdict]
    assert {name: int(values[name]) for name in ("UNPLANNED", "REUSE", "COMPUTE", "SKIP", "EMPTY")} == {
        "UNPLANNED": UNPLANNED,
        "REUSE": REUSE_CASE,
        "COMPUTE": COMPUTE_CASE,
        "SKIP": SKIP_CASE,
        "EMPTY": EMPTY,
    }
