"""``decide.cu``, compiled for a CPU, against what decides on the host."""

from __future__ import annotations

import math
import re
from ctypes import addressof, c_uint
from importlib.resources import files

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.device.policy import COMPUTE_CASE, REUSE_CASE, SKIP_CASE, UNPLANNED
from runtime.device.recorder import Condition
from runtime.device.requests import FIELDS
from runtime.device.step import OWN
from runtime.requests.state import Request
from runtime.requests.trace import Trace
from runtime.routing.policy import EMPTY, REUSE, SKIP, RoutingPolicy
from tests.emulator import call_kernel

WIDTHS = (0.25, 0.5, 1.0)
VARIANTS = torch.tensor([0, 0, 1], dtype=torch.int32)  # a plan without a variant for .25
probability = st.floats(0, 1)
logit = st.floats(-4, 4)


class Guard:
    """One row of one block, with a bank that was reused `held` times."""

    def __init__(self, policy: RoutingPolicy, step: int, held: int, keeps: bool = True, untold: bool = False) -> None:
        self.bounds = torch.tensor([policy.threshold, policy.threshold + policy.margin], dtype=torch.float64)
        self.limits = torch.tensor([policy.max_reuse, policy.warmup_steps, keeps, 0], dtype=torch.int32)
        self.table = torch.full((4, 2), UNPLANNED, dtype=torch.int32)
        self.own = torch.tensor([0, 0, step, untold], dtype=torch.int32)
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


def test_branches_that_cannot_be_told_apart_reuse_nothing() -> None:
    logits = [0.1, 0.0, 0.0, 1.0]
    assert Guard(RoutingPolicy(), 0, 0)(logits) == REUSE_CASE
    assert Guard(RoutingPolicy(), 0, 0, untold=True)(logits) == COMPUTE_CASE + 1


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


calls = st.lists(
    st.tuples(st.sampled_from(["cond", "uncond"]), st.lists(st.integers(0, 4), min_size=2, max_size=2)), max_size=12
)


@settings(max_examples=300, deadline=None)
@given(calls)
def test_a_clock_goes_as_a_request_of_the_host_does(calls: list[tuple[str, list[int]]]) -> None:
    """Steps, and which contexts find their banks emptied, for any order of calls."""
    request = Request("r", Trace())
    last, fields = torch.zeros(2, dtype=torch.float64), torch.zeros(6, dtype=torch.int32)
    own = {name: torch.zeros(4, dtype=torch.int32) for name in ("cond", "uncond")}
    held = {name: torch.full((3,), EMPTY, dtype=torch.int32) for name in own}
    for name, times in calls:
        branch = request.enter(tuple(map(float, times)), name, ())
        bank = branch.bank(0, 3, (0,))
        given = torch.tensor(times, dtype=torch.float64)
        call_kernel("advance", (given, last, 2, 1, fields, own[name], held[name], 3))
        assert int(own[name][2]) == request.step
        assert held[name].tolist() == bank.held
        bank.held = [1, 2, 3]
        held[name].copy_(torch.tensor(bank.held))


def test_a_second_call_at_one_timestep_without_a_context_is_told() -> None:
    last, fields, own = torch.zeros(1, dtype=torch.float64), torch.zeros(6, dtype=torch.int32), torch.zeros(4).int()
    held = torch.zeros(1, dtype=torch.int32)
    told = []
    for time in (1.0, 0.8, 0.8, 0.6, 0.6):
        call_kernel("advance", (torch.tensor([time], dtype=torch.float64), last, 1, 0, fields, own, held, 1))
        told.append((int(own[3]), int(own[2]), int(held[0])))
        held.fill_(0)
    assert told == [(0, 0, 0), (0, 1, 0), (1, 1, EMPTY), (1, 2, 0), (1, 2, 0)]


def test_numbers_of_the_kernel_and_of_the_runtime_are_the_same() -> None:
    source = files("runtime.device").joinpath("decide.cu").read_text()
    enums = [
        [name.strip().split(" = ")[0] for name in listed.split(",")] for listed in re.findall(r"enum \{(.*)\}", source)
    ]
    values = dict(re.findall(r"(\w+) = (-?\d+)[,} ]", source))
    assert (len(enums[0]), len(enums[1]), len(enums[2])) == (FIELDS, OWN, 4)
    assert enums[0][:3] == ["STARTED", "STEP", "DIRECTION"]  # which Clock reads and writes
    assert {name: int(values[name]) for name in ("UNPLANNED", "REUSE", "COMPUTE", "SKIP", "EMPTY")} == {
        "UNPLANNED": UNPLANNED,
        "REUSE": REUSE_CASE,
        "COMPUTE": COMPUTE_CASE,
        "SKIP": SKIP_CASE,
        "EMPTY": EMPTY,
    }
