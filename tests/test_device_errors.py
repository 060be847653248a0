"""What goes wrong with decisions on the device: whose error it is, what falls back, and what two threads do to it."""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import weakref

import numpy as np
import pytest
import torch

from runtime.base.errors import EditError, InputError, RecordError
from runtime.device import runner, step
from runtime.device.reader import Reading
from runtime.face.transformer import CompiledTransformer
from runtime.requests.trace import COMPUTED, REUSED
from runtime.routing.policy import SKIP, RoutingPolicy
from runtime.routing.schedule import ScheduledPolicy
from tests import programs
from tests.emulator import Emulator
from tests.test_device_dispatch import ALWAYS_REUSE, KINDS, POLICY, Custom, on_device
from tests.test_transformer import in_threads
from tests.test_transformer_requests import alternating, call, done

BY_STEP = ScheduledPolicy(np.repeat(np.array([1.0, 0.25, SKIP, 0.5, 0.75, 1.0])[:, None], 3, axis=1))


def on_host(policy=ALWAYS_REUSE) -> CompiledTransformer:
    return CompiledTransformer(programs.make(KINDS, seed=3), "torch", policy)


def infinite() -> dict[str, torch.Tensor]:
    given = programs.inputs(1, 0, 1.0)
    given["hidden_states"][0, 0, 0] = float("inf")
    return given


def test_branches_that_cannot_be_told_apart_are_at_the_hosts_steps(recorder: Emulator) -> None:
    device, host = on_device(BY_STEP), on_host(BY_STEP)
    for got, expected in zip(alternating(device, False), alternating(host, False), strict=True):
        torch.testing.assert_close(got, expected)
    assert len(device.trace) == len(host.trace) == 1


def test_an_error_is_raised_in_its_own_request_alone(recorder: Emulator) -> None:
    model = on_device(POLICY)
    with model.request("a"):
        model(**infinite())
    with model.request("b"):
        call(model, 0.9)
    with model.request("a"), pytest.raises(InputError, match="hidden_states"):
        call(model, 0.5)
    with model.request("a"):
        assert torch.isfinite(call(model, 0.5)).all()


def test_an_error_is_raised_in_its_own_thread_alone(recorder: Emulator) -> None:
    model = on_device()
    failed, seen = threading.Event(), threading.Event()

    def bad() -> None:
        model(**infinite())
        failed.set()
        assert seen.wait(20)
        with pytest.raises(InputError):
            call(model, 0.5)
        assert torch.isfinite(call(model, 0.5)).all()

    def good() -> None:
        assert failed.wait(20)
        call(model, 0.9)
        seen.set()

    in_threads([bad, good])


def test_the_end_of_a_request_raises_what_was_left(recorder: Emulator) -> None:
    model = on_device()
    model(**infinite())
    with pytest.raises(InputError, match="hidden_states"):
        model._reset_stateful_cache()
    model._reset_stateful_cache()


def test_what_follows_an_error_is_not_written_down(recorder: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    model, late = on_device(), [True]
    monkeypatch.setattr(Reading, "arrived", lambda self: not late[0])
    model(**infinite())
    call(model, 0.5)
    late[0] = False
    assert len(model.trace) == 0
    with pytest.raises(InputError):
        call(model, 0.4)
    assert len(model.trace) == 0


def test_a_trace_that_is_waited_for_holds_up_no_call(recorder: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    model = on_device()
    waiting, go = threading.Event(), threading.Event()

    def wait(self) -> None:
        waiting.set()
        assert go.wait(20)

    monkeypatch.setattr(Reading, "wait", wait)
    call(model, 1.0)
    reader = threading.Thread(target=lambda: model.trace)
    reader.start()
    assert waiting.wait(20)
    call(model, 0.5)  # would wait for the reader, which waits for us
    go.set()
    reader.join()


@pytest.mark.parametrize("when", ["the first", "the second"])
def test_shapes_that_cannot_be_recorded_are_tried_once(
    recorder: Emulator, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where memory lasts for one context alone, both are decided on the host, at the right steps."""
    device, host = on_device(BY_STEP), on_host(BY_STEP)
    original, tried = recorder.record, []

    def record(work):
        tried.append(work)
        if len(tried) == (1 if when == "the first" else 2):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(work)

    monkeypatch.setattr(recorder, "record", record)
    for number in range(6):
        for context in ("cond", "uncond"):
            with device.request("one"), device.cache_context(context):
                got = call(device, 1 - number / 6, seed=number)
            with host.request("one"), host.cache_context(context):
                torch.testing.assert_close(got, call(host, 1 - number / 6, seed=number))
    assert len(tried) == (1 if when == "the first" else 2)
    assert device.dispatch == "host" and "out of memory" in device.dispatch_note
    assert {int(s) for record in device.trace for s in record.arrays()["step"]} == set(range(6))


def test_buffers_that_do_not_fit_fall_back_too(recorder: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(like):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = on_device()
    monkeypatch.setattr(step.torch, "zeros_like", full)
    call(model, 1.0)
    assert model.dispatch == "host"


def test_a_missing_library_falls_back(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    asked = []

    def missing(device):
        asked.append(device)
        raise RecordError("Failed to dlopen libnvrtc.so.13 (pip install ...)")

    monkeypatch.setattr(runner, "recorder_for", missing)
    monkeypatch.setattr(runner, "absent", lambda device: None)
    model = on_device()
    with caplog.at_level(logging.WARNING):
        call(model, 1.0)
        call(model, 0.5)
    assert model.dispatch == "host" and len(asked) == 1
    assert caplog.text.count("libnvrtc") == 1


def test_calls_that_fall_back_hold_nothing_of_their_inputs() -> None:
    model = on_device()  # on a CPU, where every call is refused the device
    held = []
    for number in range(3):
        given = programs.inputs(1, timestep=1 - number / 3)
        held.append(weakref.ref(given["hidden_states"]))
        model(**given)
    del given
    gc.collect()
    assert model.dispatch == "host"
    assert [each() for each in held] == [None] * 3


@pytest.mark.parametrize("inside", [(True, False, False), (False, True, False)])
def test_inference_mode_may_come_and_go(recorder: Emulator, inside: tuple[bool, ...]) -> None:
    model = on_device()
    for number, mode in enumerate(inside):
        with torch.inference_mode(mode):
            call(model, 1 - number / 3)
    assert done(model) == [COMPUTED, REUSED, REUSED]
    assert not torch.is_grad_enabled() or call(model, 0.1).requires_grad is False


def test_autocast_is_not_recorded_for_calls_without_it(recorder: Emulator) -> None:
    full = ScheduledPolicy(np.ones((9, 3)))
    device, host = on_device(full), on_host(full)
    call(device, 1.0), call(host, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = call(device, 0.5), call(host, 0.5)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(call(device, 0.3), call(host, 0.3))


class Mine(RoutingPolicy):
    def decide(self, step, block, gate, width, held, change):
        return [SKIP] * len(held)


def test_a_subclass_decides_for_itself(recorder: Emulator) -> None:
    torch.testing.assert_close(call(on_device(Mine()), 1.0), call(on_host(Mine()), 1.0))


def test_policies_with_and_without_routers_follow_each_other(recorder: Emulator) -> None:
    routed, unrouted = BY_STEP, ScheduledPolicy(BY_STEP.table, routed=False)
    device, host = on_device(routed), on_host(routed)
    for number, policy in enumerate((routed, unrouted, routed, unrouted)):
        device.policy = host.policy = policy
        torch.testing.assert_close(call(device, 1 - number / 4), call(host, 1 - number / 4))
    assert len(device.trace) == 1


def test_two_first_calls_at_once_make_one_recorder(monkeypatch: pytest.MonkeyPatch) -> None:
    made, barrier = [], threading.Barrier(2, timeout=1)

    def slowly(device) -> Emulator:
        made.append(Emulator())
        with contextlib.suppress(threading.BrokenBarrierError):
            barrier.wait()
        return made[-1]

    monkeypatch.setattr(runner, "recorder_for", slowly)
    monkeypatch.setattr(runner, "absent", lambda device: None)
    model, outputs = on_device(BY_STEP), {}

    def trajectory(seed: int) -> None:
        with model.request(f"{seed}"):
            outputs[seed] = [call(model, 1 - number / 4, seed=10 * seed + number) for number in range(4)]

    in_threads([lambda seed=seed: trajectory(seed) for seed in range(3)])
    assert len(made) == 1
    assert model.counters.calls == 12
    for seed, got in outputs.items():
        host = on_host(BY_STEP)
        for number, sample in enumerate(got):
            with host.request("alone"):
                expected = call(host, 1 - number / 4, seed=10 * seed + number)
            torch.testing.assert_close(sample, expected)


def test_a_move_loses_no_counts(recorder: Emulator, caplog: pytest.LogCaptureFixture) -> None:
    model = on_device()
    call(model, 1.0)
    model._session.move(lambda tensor: tensor.clone())
    call(model, 0.5)
    assert model.counters.calls == 2
    model.reset()
    model(**infinite())
    model._session.move(lambda tensor: tensor.clone())
    assert "hidden_states" in caplog.text


@pytest.mark.parametrize("there_too", [True, False])
def test_a_move_loses_no_place(recorder: Emulator, there_too: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is recorded serves one device: a request under way goes on where it was, on the host."""
    model = on_device()
    with model.request("a"):
        call(model, 1.0)
        call(model, 0.7)
        model._session.move(lambda tensor: tensor.clone())
        if not there_too:
            monkeypatch.setattr(runner, "absent", lambda device: "there is no GPU")
        call(model, 0.4)
        call(model, 0.2)
    assert recorder.replays == 2
    steps = [int(s) for record in model.trace for s in record.arrays()["step"]]
    assert steps[:: len(KINDS)] == [0, 1, 2, 3]
    assert [what for number in range(len(model.trace)) for what in done(model, number)] == [COMPUTED, REUSED] * 2


def test_a_move_leaves_an_error_to_be_raised(recorder: Emulator) -> None:
    model = on_device()
    model(**infinite())
    model._session.move(lambda tensor: tensor.clone())
    with pytest.raises(InputError, match="hidden_states"):
        model.reset()


def test_an_error_is_raised_where_the_host_goes_on(recorder: Emulator) -> None:
    model = on_device()
    model(**infinite())
    model.policy = Custom()
    with pytest.raises(InputError, match="hidden_states"):
        call(model, 0.5)
    assert torch.isfinite(call(model, 0.5)).all()


def test_errors_are_edit_errors() -> None:
    assert issubclass(RecordError, EditError)
