"""Whose residuals are used: requests, cache contexts, branches, threads, exceptions."""

from __future__ import annotations

import gc
import threading
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor

from runtime.base.errors import EditError
from runtime.face.transformer import CompiledTransformer
from runtime.requests.bank import Residuals
from runtime.requests.trace import COMPUTED, REUSED
from runtime.routing.policy import REUSE
from runtime.routing.schedule import ScheduledPolicy
from tests import programs
from tests.test_transformer import in_threads

BLOCKS = 2
ALWAYS_REUSE = ScheduledPolicy(np.full((100, BLOCKS), REUSE))


def compiled(engine: str = "torch") -> CompiledTransformer:
    return CompiledTransformer(programs.make(("double", "single")), engine, ALWAYS_REUSE)


def call(model: CompiledTransformer, timestep: float, seed: int = 0, rows: int = 1) -> Tensor:
    return model(**programs.inputs(rows, seed, timestep)).sample


def guided(model: CompiledTransformer, timestep: float, prompt: int) -> Tensor:
    """A call of one branch of guidance: latents are those of all branches, the text is its own."""
    text = programs.inputs(1, prompt)["encoder_hidden_states"]
    return model(**{**programs.inputs(1, 0, timestep), "encoder_hidden_states": text}).sample


def done(model: CompiledTransformer, request: int = -1) -> list[int]:
    """What was done with block 0, row 0, call by call."""
    columns = model.trace[request].arrays()
    first = (columns["block"] == 0) & (columns["row"] == 0)
    return columns["done"][first].tolist()


def test_a_bank_is_empty_when_the_timestep_rises() -> None:
    model = compiled()
    for timestep in (1.0, 0.5, 0.1):
        call(model, timestep)
    assert done(model) == [COMPUTED, REUSED, REUSED]
    call(model, 1.0)
    assert done(model) == [COMPUTED]
    assert len(model.trace) == 2


def test_a_timestep_may_rise_all_along() -> None:
    model = compiled()
    for timestep in (0.0, 0.2, 0.5, 0.9, 0.0, 0.2):
        call(model, timestep)
    assert [done(model, 0), done(model, 1)] == [[COMPUTED, REUSED, REUSED, REUSED], [COMPUTED, REUSED]]
    assert [int(s) for s in model.trace[0].grid()["done"].shape] == [4, BLOCKS, 1]


def test_rows_may_move_apart_as_long_as_latents_continue() -> None:
    model = compiled()
    given = programs.inputs(2)
    for times in ([0.5, 0.5], [0.4, 0.6], [0.3, 1.0]):
        model(**{**given, "timestep": torch.tensor(times)})
    assert [done(model, n) for n in range(len(model.trace))] == [[COMPUTED, REUSED, REUSED]]


def test_images_of_one_step_do_not_share_residuals() -> None:
    model = compiled()
    for _ in range(2):
        for name in ("cond", "uncond"):
            with model.cache_context(name):
                call(model, 1.0)
    assert [done(model, 0), done(model, 1)] == [[COMPUTED, COMPUTED]] * 2


def test_a_bank_is_empty_when_the_batch_changes() -> None:
    model = compiled()
    call(model, 1.0, rows=1)
    call(model, 0.5, rows=2)
    assert [done(model, 0), done(model, 1)] == [[COMPUTED], [COMPUTED]]


def test_reset_ends_the_request() -> None:
    model = compiled()
    call(model, 1.0)
    model._reset_stateful_cache(recurse=True)
    call(model, 0.5)
    assert [done(model, 0), done(model, 1)] == [[COMPUTED], [COMPUTED]]


def alternating(model: CompiledTransformer, contexts: bool) -> list[Tensor]:
    """Samples of both branches over three steps."""
    outputs = []
    for timestep in (1.0, 0.5, 0.1):
        for seed, name in ((1, "cond"), (2, "uncond")):
            if contexts:
                with model.cache_context(name):
                    outputs.append(guided(model, timestep, seed))
            else:
                outputs.append(guided(model, timestep, seed))
    return outputs


@pytest.mark.parametrize("contexts", [True, False])
def test_guidance_branches_do_not_share_residuals(contexts: bool) -> None:
    together = alternating(compiled(), contexts)
    for seed, own in ((1, together[::2]), (2, together[1::2])):
        alone = compiled()
        for got, timestep in zip(own, (1.0, 0.5, 0.1), strict=True):
            torch.testing.assert_close(got, guided(alone, timestep, seed))


def test_a_context_left_out_does_not_shift_the_other() -> None:
    model, alone = compiled(), compiled()
    for timestep, both in ((1.0, True), (0.8, False), (0.5, True), (0.2, False)):
        with model.cache_context("cond"):
            torch.testing.assert_close(guided(model, timestep, 1), guided(alone, timestep, 1))
        if both:
            with model.cache_context("uncond"):
                guided(model, timestep, 2)
    assert done(model) == [COMPUTED, COMPUTED, REUSED, REUSED, REUSED, REUSED]


def test_an_unnamed_branch_that_is_left_out_does_not_shift_the_other() -> None:
    model, alone = compiled(), compiled()
    for timestep, prompts in ((1.0, (1, 2)), (0.8, (1, 2)), (0.6, (2,)), (0.4, (2,)), (0.2, (1, 2))):
        for prompt in prompts:
            got = guided(model, timestep, prompt)
            if prompt == 2:
                torch.testing.assert_close(got, guided(alone, timestep, prompt))
    assert done(model) == [COMPUTED, COMPUTED, *[REUSED] * 6]
    assert len(model.trace) == 1


def test_branches_of_one_prompt_are_two_all_the_same() -> None:
    model = compiled()
    for timestep, calls in ((1.0, 2), (0.8, 2), (0.6, 1)):
        for _ in range(calls):
            call(model, timestep)
    assert done(model) == [COMPUTED, COMPUTED, REUSED, REUSED, REUSED]
    assert model.trace[0].contexts == ["branch 0", "branch 1"]
    assert set(model.trace[0].arrays()["step"].tolist()) == {0, 1, 2}


def test_a_context_that_joins_late_is_at_the_same_step() -> None:
    model = compiled()
    for timestep in (1.0, 0.8, 0.6):
        with model.cache_context("cond"):
            call(model, timestep)
    with model.cache_context("uncond"):
        call(model, 0.6)
    columns = model.trace[0].arrays()
    late = columns["context"] == model.trace[0].contexts.index("uncond")
    assert set(columns["step"][late]) == {2}
    assert set(columns["done"][late]) == {COMPUTED}


def test_repeating_one_timestep_without_end_does_not_grow() -> None:
    model = compiled()
    for _ in range(12):
        call(model, 0.5)
    gc.collect()
    assert sum(isinstance(thing, Residuals) and bool(thing.deltas) for thing in gc.get_objects()) <= BLOCKS * 4 + 8
    assert {int(s) for record in model.trace for s in record.arrays()["step"]} == {0}


def test_a_context_is_left_on_errors_too() -> None:
    model = compiled()
    with pytest.raises(KeyError), model.cache_context("cond"):
        raise KeyError
    call(model, 1.0)
    assert model.trace[0].contexts == ["branch 0"]


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_alternating_requests_are_as_if_alone(engine: str) -> None:
    model = compiled(engine)
    for step, timestep in enumerate((1.0, 0.7, 0.4)):
        for name, shift in (("a", 0.0), ("b", 0.3)):  # seen together, the timesteps rise at every call
            with model.request(name), model.cache_context("any prompt"):
                got = call(model, timestep + shift, seed=step)
            alone = compiled("torch")
            for before in range(step + 1):
                with alone.request("alone"), alone.cache_context("any prompt"):
                    expected = call(alone, (1.0, 0.7, 0.4)[before] + shift, seed=before)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert [record.request for record in model.trace] == ["a", "b"]
    assert [done(model, 0), done(model, 1)] == [[COMPUTED, REUSED, REUSED]] * 2


def test_a_request_without_a_name_ends_in_every_transformer_that_it_called() -> None:
    high, low = compiled(), compiled()
    for _ in range(3):
        with high.request():
            for timestep, model in ((1.0, high), (0.8, high), (0.5, low), (0.2, low)):
                call(model, timestep)
    assert not high._session.requests._named and not low._session.requests._named
    assert [done(model, n) for model in (high, low) for n in range(3)] == [[COMPUTED, REUSED]] * 6


def test_requests_beyond_the_limit_of_memory_lose_residuals_and_not_their_step() -> None:
    model = compiled()
    with model.request("a"):
        call(model, 1.0)
    model.memory_limit = model._session.requests._named["a"].nbytes * 2
    for name in ("b", "c"):
        with model.request(name):
            if name == "b":
                call(model, 1.0)
            else:
                with pytest.warns(RuntimeWarning, match="go on at their own step"):
                    call(model, 1.0)
    for name in ("c", "a"):
        with model.request(name):
            call(model, 0.5)
    assert [record.request for record in model.trace] == ["a", "b", "c"]
    assert done(model, 2) == [COMPUTED, REUSED]  # c was kept
    assert done(model, 0) == [COMPUTED, COMPUTED]  # a was not
    assert set(model.trace[0].arrays()["step"].tolist()) == {0, 1}


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_threads_are_as_if_alone(engine: str) -> None:
    model = compiled(engine)
    times = [1 - n / 12 for n in range(12)]

    def trajectory(target: CompiledTransformer, seed: int) -> list[Tensor]:
        with target.request(f"{seed}"), target.cache_context("any prompt"):
            return [call(target, timestep, 100 * seed + n) for n, timestep in enumerate(times)]

    together = in_threads([lambda seed=seed: trajectory(model, seed) for seed in range(4)])
    for seed, samples in enumerate(together):
        for got, expected in zip(samples, trajectory(compiled(engine), seed), strict=True):
            torch.testing.assert_close(got, expected)
    assert all(done(model, n) == [COMPUTED] + [REUSED] * 11 for n in range(4))


def test_a_threads_state_goes_with_the_thread() -> None:
    model = compiled()
    found: list[weakref.ref] = []

    def work() -> None:
        call(model, 1.0)
        found.append(weakref.ref(model._session.requests.existing()[0]))

    in_threads([work])
    gc.collect()
    assert found[0]() is None


def test_one_request_in_two_threads_at_once_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = compiled()
    inside, go = threading.Event(), threading.Event()
    ready = model._session.blocks.forms[0][0]
    original = ready.bound

    def slow(inputs):
        inside.set()
        assert go.wait(20)
        return original[3](inputs)

    ready.bound = (*original[:3], slow)

    def first() -> None:
        with model.request("same"):
            call(model, 1.0)

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(20)
    with pytest.raises(EditError, match="another thread"), model.request("same"):
        call(model, 1.0)
    go.set()
    thread.join()
    ready.bound = original
    with model.request("same"):
        call(model, 0.5)
    assert done(model) == [COMPUTED, REUSED]  # the refused call did no harm to the running one
