"""Replaying recorded generations with another model: what the real loop gives with that model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import edit_compile
from edit_compile import (
    CompiledTransformer,
    Recording,
    ReusePolicy,
    Sampler,
    ScheduledPolicy,
    latents_of,
    quality,
    replay,
)
from edit_compile import Generation as Recorded
from tests import generations as kinds
from tests.generations import GUIDANCE, SAMPLERS, Generation, one_thread
from tests.models import tiny_flux

KINDS = list(itertools.product(SAMPLERS, GUIDANCE))


class Scaled(nn.Module):
    """A model whose output is another's times a factor, or times one that falls with the timestep."""

    def __init__(self, model: nn.Module, factor: float = 1.0, fall: float = 0.0) -> None:
        super().__init__()
        self.model, self.factor, self.fall = model, factor, fall

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        return_dict: bool = True,
    ) -> tuple[Tensor]:
        (output,) = self.model(
            hidden_states, encoder_hidden_states, pooled_projections, timestep, img_ids, txt_ids, return_dict=False
        )
        return (output * (self.factor - self.fall * timestep[:, None, None]),)

    def cache_context(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()


@pytest.fixture(scope="module")
def dense() -> Iterator[nn.Module]:
    model, _ = tiny_flux(double=1, single=1)
    with one_thread():
        yield model.requires_grad_(False)


@pytest.fixture(scope="module")
def compiled(dense: nn.Module) -> CompiledTransformer:
    """Computes every second step; grows as it is called."""
    elastic = edit_compile.elasticize(dense, tiny_flux(double=1, single=1)[1])
    return edit_compile.compile(elastic, engine="torch", policy=ReusePolicy(1))


def recorded(model: nn.Module, one: Generation, folder: Path) -> Recorded:
    """What `model` is called with for `one`, by the real sampler, and what that ends with."""
    scope = model.request() if isinstance(model, CompiledTransformer) else nullcontext()
    with edit_compile.record(model, folder / type(model).__name__) as recorder, recorder.generation(), scope:
        loop = kinds.steps(model, one, [])
        while True:
            try:
                next(loop)
            except StopIteration as ended:
                recorder.result(ended.value)
                break
    return Recording(folder / type(model).__name__)[-1]


def latents(generation: Recorded) -> list[Tensor]:
    return [call.arguments["hidden_states"] for call in generation.calls]


def outputs(generation: Recorded) -> list[Tensor]:
    return [call.outputs[0] for call in generation.calls]


def furthest(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> float:
    """The largest difference of any number."""
    return max(float((one - other).abs().max()) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside"])
@pytest.mark.parametrize(("sampler", "guidance"), KINDS)
def test_what_gives_the_same_is_given_the_same(
    dense: nn.Module, sampler: str, guidance: str, beside: bool, tmp_path: Path
) -> None:
    generation = recorded(dense, Generation(sampler, guidance, 4, batch=2, beside=beside), tmp_path)
    fitted = Sampler.fit(generation)
    assert (fitted.place.latents, fitted.place.sizes) == ("hidden_states", (16, 8))
    assert min(fitted.explained) > 1 - 1e-9
    again = replay(dense, generation, fitted)
    assert all(map(torch.equal, again.latents, latents(generation)))
    assert all(torch.equal(ours[0], theirs) for ours, theirs in zip(again.outputs, outputs(generation), strict=True))
    assert torch.equal(again.result, generation.result)
    assert quality(again, generation) == math.inf


@pytest.mark.parametrize("kind", ["scaled", "beside an image", "compiled"])
@pytest.mark.parametrize(("sampler", "guidance"), KINDS)
def test_another_model_gives_what_the_real_loop_gives_with_it(
    dense: nn.Module, compiled: CompiledTransformer, sampler: str, guidance: str, kind: str, tmp_path: Path
) -> None:
    one = Generation(sampler, guidance, 5, batch=2, beside=kind == "beside an image")
    generation = recorded(dense, one, tmp_path)
    other = compiled if kind == "compiled" else Scaled(dense, 0.9, 0.2)
    expected, ours = recorded(other, one, tmp_path), replay(other, generation, Sampler.fit(generation))
    assert furthest(ours.latents, latents(expected)) < 5e-6
    assert furthest([ours.result], [expected.result]) < 5e-6
    # steps of a thousandth make little of what is changed
    assert furthest([generation.result], [expected.result]) > (1e-3 if sampler == "rounded" else 2e-2)


def test_skipped_and_narrowed_blocks(dense: nn.Module, compiled: CompiledTransformer, tmp_path: Path) -> None:
    one = Generation("heun", "contexts", 5)
    generation = recorded(dense, one, tmp_path)
    recorded(compiled, one, tmp_path)  # so that all forms of call are compiled
    model = CompiledTransformer(compiled.program, "torch", ScheduledPolicy.at_budget(10, 2, gate=0.6, width=0.5))
    expected = recorded(model, one, tmp_path)
    model.reset_counters()
    ours = replay(model, generation, Sampler.fit(generation, *latents_of(model)))
    assert furthest([ours.result], [expected.result]) < 5e-6
    assert furthest([ours.result], [generation.result]) > 0.1
    assert model.counters.skipped > 0


def test_a_replay_is_a_request_of_its_own(dense: nn.Module, compiled: CompiledTransformer, tmp_path: Path) -> None:
    generation = recorded(dense, Generation("euler", "contexts", 4), tmp_path)
    recorded(compiled, Generation("euler", "contexts", 4), tmp_path)
    fitted, model = Sampler.fit(generation), CompiledTransformer(compiled.program, "torch", ReusePolicy(1))
    with model.request("mine"):
        first = generation.calls[0]
        with model.cache_context("cond"):
            model(**first.arguments)
        once, twice = (replay(model, generation, fitted) for _ in range(2))
    assert torch.equal(once.result, twice.result)
    assert [set(record.arrays()["step"].tolist()) for record in model.trace] == [{0}, {0, 1, 2, 3}, {0, 1, 2, 3}]
    assert model.trace[1].contexts == ["cond", "uncond"]


def test_calls_are_made_in_their_contexts_and_caches_are_reset(dense: nn.Module, tmp_path: Path) -> None:
    generation, told = recorded(dense, Generation("euler", "interval", 3), tmp_path), []

    class Told(Scaled):
        @contextmanager
        def cache_context(self, name: str) -> Iterator[None]:
            told.append(name)
            yield

        def _reset_stateful_cache(self) -> None:
            told.append("reset")

    replay(Told(dense), generation, Sampler.fit(generation))
    assert [call.context for call in generation.calls] == ["cond", "cond", "uncond", "cond"]
    assert told == ["cond", "cond", "uncond", "cond", "reset"]
