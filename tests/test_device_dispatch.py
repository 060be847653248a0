"""Decisions on the device, by a recorder that is strict as a CUDA graph, against the oracle and against the host."""

from __future__ import annotations

import gc
import logging
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from runtime.base.errors import EditError, InputError, PolicyError
from runtime.device.policy import STEPS
from runtime.engines import pytorch
from runtime.face.transformer import CompiledTransformer
from runtime.requests.trace import COMPUTED, REUSED, SKIPPED
from runtime.routing.policy import REUSE, SKIP, RoutingPolicy
from runtime.routing.schedule import ScheduledPolicy
from tests import programs
from tests.emulator import Emulator
from tests.oracle import Oracle
from tests.test_transformer import in_threads
from tests.test_transformer_requests import alternating, call, done

KINDS = ("double", "single", "double")
POLICY = RoutingPolicy(threshold=0.35, margin=0.4, max_reuse=2)
ALWAYS_REUSE = ScheduledPolicy(np.full((100, len(KINDS)), REUSE))


def on_device(policy=ALWAYS_REUSE, kinds=KINDS, **options) -> CompiledTransformer:
    return CompiledTransformer(programs.make(kinds, seed=3, **options), "torch", policy, dispatch="device")


@pytest.mark.parametrize("rows", [1, 4])
def test_every_row_is_what_algorithm_1_makes_of_it_alone(recorder: Emulator, rows: int) -> None:
    model = on_device(POLICY)
    program = model.program
    oracle = Oracle(
        KINDS, program.weights, program.routers, programs.WIDTHS, POLICY.threshold, POLICY.margin, POLICY.max_reuse
    )
    for step in range(28):
        for number, context in enumerate(("cond", "uncond")):
            given = programs.inputs(rows, seed=2 * step + number, timestep=1 - step / 28)
            with model.request("one"), model.cache_context(context):
                sample = model(**given).sample
            expected = oracle(context, step, given["hidden_states"], given["encoder_hidden_states"], given["timestep"])
            torch.testing.assert_close(sample, expected, rtol=2e-5, atol=2e-5)
    assert (model.dispatch, model.dispatch_note) == ("device", None)
    assert recorder.replays == 56
    columns = model.trace[0].arrays()
    names = {SKIPPED: "skip", REUSED: "reuse", COMPUTED: "compute"}
    log = [
        (model.trace[0].contexts[c], int(s), int(b), int(r), names[int(d)], float(w))
        for c, s, b, r, d, w in zip(
            *(columns[n] for n in ("context", "step", "block", "row", "done", "width")), strict=True
        )
    ]
    assert sorted(log) == sorted(oracle.log)
    np.testing.assert_allclose(sorted(columns["p"]), sorted(oracle.gates), atol=1e-5)
    seen = Counter(kind for *_, kind, _ in log)
    assert min(seen["skip"], seen["reuse"], seen["compute"]) > len(log) / 20


@pytest.mark.parametrize("routers", [True, False])
def test_traces_and_counters_are_those_of_the_host(recorder: Emulator, routers: bool) -> None:
    table = np.array([[SKIP, 0.5, 1.0], [REUSE, 0.25, SKIP], [1.0, REUSE, REUSE], [REUSE, REUSE, 0.75]])
    models = [
        CompiledTransformer(
            programs.make(KINDS, seed=3, routers=routers),
            "torch",
            ScheduledPolicy(table, routed=routers),
            dispatch=dispatch,
        )
        for dispatch in ("host", "device")
    ]
    for step in range(4):
        outputs = []
        for model in models:
            with model.request("one"), model.cache_context("any prompt"):
                outputs.append(call(model, 1 - step / 4, seed=step))
        host, device = outputs
        torch.testing.assert_close(device, host, rtol=0, atol=0)
    host, device = models
    assert len(host.trace) == len(device.trace) == 1
    assert set(host.trace[0].arrays()["step"]) == {0, 1, 2, 3}
    assert set(host.trace[0].arrays()["done"]) == {SKIPPED, REUSED, COMPUTED}
    assert host.counters == device.counters
    assert device.counters.calls == 4
    for name, column in host.trace[0].arrays().items():
        np.testing.assert_array_equal(device.trace[0].arrays()[name], column)
    device.reset_counters()
    assert device.counters.calls == 0


def test_another_policy_needs_no_new_recording(recorder: Emulator) -> None:
    model = on_device(RoutingPolicy(threshold=0.0, margin=0.0))
    call(model, 1.0)
    policies = (RoutingPolicy(threshold=1.0), RoutingPolicy(threshold=0.0, margin=1.0), ALWAYS_REUSE)
    for step, policy in enumerate(policies):
        model.policy = policy
        call(model, 0.9 - step / 10)
    assert done(model) == [COMPUTED, SKIPPED, REUSED, REUSED]
    assert len(recorder._conditions) == len(KINDS)


def test_the_rows_of_a_schedule_decide_apart(recorder: Emulator) -> None:
    table = np.array([[[SKIP, 0.25, 1.0]] * 3, [[REUSE, 1.0, REUSE]] * 3])
    models = [
        CompiledTransformer(programs.make(KINDS, seed=3), "torch", ScheduledPolicy(table), dispatch=dispatch)
        for dispatch in ("host", "device")
    ]
    for timestep in (1.0, 0.5):
        host, device = (call(model, timestep, rows=3) for model in models)
        torch.testing.assert_close(device, host)
    model = models[1]
    model.policy = ScheduledPolicy(table[:, :, :2])
    with pytest.raises(PolicyError, match="3 blocks and 2 rows"):
        call(model, 0.4, rows=3)


def test_requests_begin_where_those_of_the_host_do(recorder: Emulator) -> None:
    model = on_device()
    for timestep in (1.0, 0.5, 0.1, 1.0, 0.7):
        call(model, timestep)
    assert [done(model, 0), done(model, 1)] == [[COMPUTED, REUSED, REUSED], [COMPUTED, REUSED]]
    model._reset_stateful_cache()
    call(model, 0.5)
    assert done(model, 2) == [COMPUTED]
    call(model, 0.4, rows=2)
    assert done(model, 3) == [COMPUTED]


def test_rows_may_move_apart_as_long_as_latents_continue(recorder: Emulator) -> None:
    model = on_device()
    given = programs.inputs(2)
    for times in ([0.5, 0.5], [0.4, 0.6]):
        model(**{**given, "timestep": torch.tensor(times)})
    assert [done(model, n) for n in range(len(model.trace))] == [[COMPUTED, REUSED]]


@pytest.mark.parametrize("contexts", [True, False])
def test_branches_of_guidance_are_those_of_the_host(recorder: Emulator, contexts: bool) -> None:
    host, device = CompiledTransformer(programs.make(KINDS, seed=3), "torch", ALWAYS_REUSE), on_device()
    for got, expected in zip(alternating(device, contexts), alternating(host, contexts), strict=True):
        torch.testing.assert_close(got, expected)
    assert device.dispatch_note is None
    assert done(device) == done(host)
    assert done(device).count(REUSED) == 4


def test_a_branch_that_is_recorded_anew_is_still_the_same_branch(recorder: Emulator) -> None:
    host, device = CompiledTransformer(programs.make(KINDS, seed=3), "torch", ALWAYS_REUSE), on_device()
    given = programs.inputs()
    for model in (host, device):
        model(**given)
        model(**{**given, "timestep": torch.tensor([0.5])})
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            model(**{**given, "timestep": torch.tensor([0.5])})  # as a sampler of second order does
        finally:
            torch.set_float32_matmul_precision(before)
    assert device.dispatch_note is None
    steps = [model.trace[0].arrays()["step"].tolist() for model in (host, device)]
    assert steps[0] == steps[1] and set(steps[0]) == {0, 1, 2}


def test_recordings_are_used_again_when_a_request_has_ended(recorder: Emulator) -> None:
    model = on_device()
    for name in ("a", "b", "c"):
        with model.request(name):
            call(model, 1.0)
            call(model, 0.5)
            model._reset_stateful_cache()
        gc.collect()
    assert [done(model, n) for n in range(3)] == [[COMPUTED, REUSED]] * 3
    assert len(recorder._conditions) == len(KINDS)


def test_requests_at_once_have_recordings_of_their_own(recorder: Emulator) -> None:
    model = on_device()
    for step, timestep in enumerate((1.0, 0.7, 0.4)):
        for name, shift in (("a", 0.0), ("b", 0.3)):
            with model.request(name), model.cache_context("any prompt"):
                call(model, timestep + shift, seed=step)
    assert [done(model, 0), done(model, 1)] == [[COMPUTED, REUSED, REUSED]] * 2


def test_threads_are_as_if_alone(recorder: Emulator) -> None:
    model = on_device()

    def trajectory(target: CompiledTransformer, seed: int) -> list[torch.Tensor]:
        with target.request(f"{seed}"), target.cache_context("any prompt"):
            return [call(target, 1 - n / 3, 100 * seed + n) for n in range(3)]

    for seed in range(2):
        (samples,) = in_threads([lambda seed=seed: trajectory(model, seed)])
        host = CompiledTransformer(programs.make(KINDS, seed=3), "torch", ALWAYS_REUSE)
        for got, expected in zip(samples, trajectory(host, seed), strict=True):
            torch.testing.assert_close(got, expected)
        assert done(model, seed) == [COMPUTED, REUSED, REUSED]


def test_outputs_are_not_overwritten_by_later_calls(recorder: Emulator) -> None:
    model = on_device()
    first = call(model, 1.0, seed=1)
    kept = first.clone()
    call(model, 0.5, seed=2)
    torch.testing.assert_close(first, kept, rtol=0, atol=0)


def test_errors_of_the_device_come_later_and_end_the_request(recorder: Emulator) -> None:
    model = on_device(ScheduledPolicy(np.ones((1, len(KINDS)))))
    call(model, 1.0)
    call(model, 0.5)
    with pytest.raises(PolicyError, match="does not cover step 1"):
        call(model, 0.4)
    call(model, 0.9)
    assert done(model) == [COMPUTED]


def test_a_router_that_overflows_is_named(recorder: Emulator) -> None:
    program = programs.make(KINDS, seed=3)
    name = next(key for key in program.routers if key.startswith("1.") and key.endswith("gate.bias"))
    routers = {**program.routers, name: torch.full_like(program.routers[name], float("nan"))}
    model = CompiledTransformer(replace(program, routers=routers), "torch", POLICY, dispatch="device")
    call(model, 1.0)
    assert list(model.trace) == []
    with pytest.raises(EditError, match=r"router of block .*1.* gives .* overflow torch.float32"):
        call(model, 0.5)


def test_inputs_that_are_not_finite_are_named(recorder: Emulator) -> None:
    model = on_device(POLICY)
    given = programs.inputs(2)
    given["encoder_hidden_states"][1, 0, 0] = float("inf")
    model(**given)
    with pytest.raises(InputError, match="input encoder_hidden_states holds NaN or infinity"):
        call(model, 0.5)
    assert len(model.trace) == 0
    call(model, 0.5)
    assert done(model) != []


class Custom:
    keeps, watches, routed = 0, None, False

    def decide(self, step, block, gate, width, held, change):
        return [1.0] * len(held)


@pytest.mark.parametrize(
    ("policy", "reason"),
    [(Custom(), "Custom decides in Python"), (ScheduledPolicy(np.ones((STEPS + 1, 3))), f"{STEPS + 1} steps")],
)
def test_a_policy_that_cannot_decide_there_decides_on_the_host(recorder: Emulator, policy, reason: str) -> None:
    model = on_device(policy)
    call(model, 1.0)
    assert model.dispatch == "host"
    assert reason in model.dispatch_note
    assert recorder.replays == 0
    model.policy = POLICY
    call(model, 0.5)
    assert (model.dispatch, model.dispatch_note, recorder.replays) == ("device", None, 1)


def test_a_step_that_reads_on_the_host_is_not_recorded(recorder: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    def reading(graph, name, weights, inputs):
        assert inputs[0].sum().item() < 1e9
        return list(graph(*weights, *inputs))

    model = on_device()
    monkeypatch.setattr(pytorch, "_run", reading)
    expected = call(CompiledTransformer(programs.make(KINDS, seed=3), "torch", ALWAYS_REUSE), 1.0)
    torch.testing.assert_close(call(model, 1.0), expected)
    assert "could not be recorded" in model.dispatch_note and "waits" in model.dispatch_note


def test_a_recording_has_bindings_of_its_own(recorder: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    bound, bind = [], pytorch._Kernel.bind
    monkeypatch.setattr(pytorch._Kernel, "bind", lambda self, *given: bound.append(1) or bind(self, *given))
    model = on_device()
    variants = len(KINDS) * len(programs.WIDTHS)
    assert len(bound) == variants
    for context, expected in (("cond", 2), ("uncond", 3), ("cond", 3)):
        with model.cache_context(context):
            call(model, 1.0)
        assert len(bound) == expected * variants


def test_a_cpu_has_no_device_dispatch(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model = on_device()
        assert model.dispatch == "host" and "recorded on a GPU" in model.dispatch_note  # before any call
        for timestep in (1.0, 0.5):
            call(model, timestep)
    assert model.dispatch == "host" and "recorded on a GPU" in model.dispatch_note
    assert caplog.text.count("decisions are taken on the host") <= 1
    assert done(model) == [COMPUTED, REUSED]


def test_an_engine_that_cannot_be_recorded_says_so(recorder: Emulator) -> None:
    model = CompiledTransformer(programs.make(KINDS), "onnxruntime", POLICY, dispatch="device")
    call(model, 1.0)
    assert model.dispatch == "host" and "'onnxruntime'" in model.dispatch_note


def test_dispatch_is_host_or_device() -> None:
    with pytest.raises(EditError, match="'gpu'"):
        CompiledTransformer(programs.make(KINDS), "torch", dispatch="gpu")
