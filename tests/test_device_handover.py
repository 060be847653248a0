"""A request goes from the host to the device and back, or loses what it has there: it keeps its step."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from runtime.routing.policy import REUSE, Decider
from runtime.routing.schedule import ScheduledPolicy
from tests import programs
from tests.emulator import Emulator
from tests.test_device_dispatch import ALWAYS_REUSE, KINDS, Custom, on_device
from tests.test_transformer import in_threads
from tests.test_transformer_requests import call


def test_between_device_and_host_a_request_keeps_its_step_and_no_residuals(recorder: Emulator) -> None:
    table = ScheduledPolicy(np.repeat(np.array([1.0, 0.25, REUSE, REUSE, 0.5])[:, None], 3, axis=1))
    model = on_device(table)
    for step, policy in enumerate((table, Custom(), table, table, table)):
        model.policy = policy
        call(model, 1 - step / 5)
    steps = [int(s) for record in model.trace for s in record.arrays()["step"][::3]]
    widths = [float(w) for record in model.trace for w in record.arrays()["width"][::3]]
    assert steps == [0, 1, 2, 3, 4]
    assert widths == [1.0, 1.0, 1.0, 0.0, 0.5]  # the first reuse finds no residual, the second does


def test_a_step_may_begin_on_the_host_and_end_on_the_device(recorder: Emulator) -> None:
    model, given = on_device(), programs.inputs()
    for moment in (1.0, 0.5):
        for context in ("cond", "uncond", "third"):
            model.policy = Custom() if (moment, context) == (1.0, "cond") else ALWAYS_REUSE
            with model.cache_context(context):
                model(**{**given, "timestep": torch.tensor([moment])})
    with model.cache_context("third"):
        model(**{**given, "timestep": torch.tensor([0.5])})  # a second time, as a sampler of second order does
    (record,) = model.trace
    assert recorder.replays == 6
    assert record.arrays()["step"][:: len(KINDS)].tolist() == [0, 0, 0, 1, 1, 1, 2]


@pytest.mark.parametrize("policies", [(ALWAYS_REUSE, Custom()), (Custom(), ALWAYS_REUSE)], ids=["to host", "to device"])
def test_the_first_call_once_more_begins_anew_wherever_it_runs(recorder: Emulator, policies: Sequence[Decider]) -> None:
    model, given = on_device(), programs.inputs()
    for model.policy in policies:
        model(**given)
    assert [set(record.arrays()["step"].tolist()) for record in model.trace] == [{0}, {0}]


def test_the_first_call_once_more_begins_anew_with_other_rows_than_before(recorder: Emulator) -> None:
    model = on_device()
    one, two = ({**programs.inputs(rows, seed=rows), "timestep": torch.tensor([1.0])} for rows in (1, 2))
    for given in (one, two, two, one, one):
        model(**given)
    assert len(model.trace) == 5


def test_a_device_that_lost_residuals_goes_on_at_its_step(recorder: Emulator) -> None:
    model = on_device()
    model.memory_limit = 1
    given = [programs.inputs(1, seed) for seed in (0, 1)]
    turn = threading.Barrier(2)

    def run(mine: int) -> None:
        latents = given[mine]
        for moment in (1.0, 0.7, 0.4):
            model(**{**latents, "timestep": torch.tensor([moment])})
            turn.wait(20)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        in_threads([lambda: run(0), lambda: run(1)])
    assert [set(record.arrays()["step"].tolist()) for record in model.trace] == [{0, 1, 2}] * 2
