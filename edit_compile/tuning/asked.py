"""What is asked of tuning: tiers by name, each with a budget or a quality; and what it is given to tune on."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from edit_compile.calls.generations import CallsError, Generation, Recording
from edit_compile.calls.place import latents_of
from edit_compile.calls.recorded_model import check_arguments
from edit_compile.calls.sampler import Sampler, warn_of_unexplained
from edit_compile.tuning.trials import Trials
from edit_compile.tuning.work import Work
from runtime.base.errors import PolicyError
from runtime.face.transformer import CompiledTransformer

LEAST = 2
"""Generations to search by, and as many held out, that tuning needs."""


def check_tiers(budget: Mapping[str, float], quality: Mapping[str, float]) -> None:
    """PolicyError for a tier without a name or with two, a budget outside (0, 1], or a quality that is no number."""
    for name in (*budget, *quality):
        if not isinstance(name, str) or not name.strip():
            raise PolicyError(f"a tier is called {name!r}: give it a name, as in budget={{'fast': 0.36}}")
    if both := sorted(budget.keys() & quality.keys()):
        raise PolicyError(f"two tiers are called {both[0]!r}, one of budget and one of quality: give another name")
    for name, share in budget.items():
        if not 0.0 < _number("budget", name, share) <= 1.0:
            raise PolicyError(f"budget[{name!r}] is a share of the dense FLOPs, above 0 and at most 1, not {share!r}")
    for name, decibels in quality.items():
        _number("quality", name, decibels)


def split(
    compiled: CompiledTransformer, recording: Sequence[Generation] | Recording, held_out: int | None, work: Path | None
) -> tuple[Trials, Trials]:
    """Generations to search by, and others to predict by; CallsError where they cannot be tuned on."""
    _check_compiled(compiled)
    _check_class(compiled, recording)
    generations = list(recording)
    apart = len(generations) // 2 if held_out is None else held_out
    if not LEAST <= apart <= len(generations) - LEAST:
        raise CallsError(
            f"recording: {len(generations)} recorded, of which held_out={apart}: tuning needs at least {LEAST} to "
            f"search by and {LEAST} held out, {2 * LEAST} in all; record more"
        )
    for number, generation in enumerate(generations):
        _check_generation(compiled, generation, f"recording[{number}]")
    samplers = [_fitted(compiled, one, f"recording[{number}]") for number, one in enumerate(generations)]
    _warn(generations, samplers)
    kept, parts = Work(work, compiled), (slice(None, -apart), slice(-apart, None))
    searched, predicted = (Trials(compiled, generations[part], samplers[part], kept) for part in parts)
    if searched.steps != predicted.steps:
        raise CallsError(f"the recorded generations have {searched.steps} and {predicted.steps} steps: tune one number")
    return searched, predicted


def _number(what: str, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise PolicyError(f"{what}[{name!r}] is a number, not {value!r}")
    return float(value)


def _check_compiled(compiled: object) -> None:
    if not isinstance(compiled, CompiledTransformer):
        kind = type(compiled).__name__
        raise CallsError(f"compiled is a {kind}: give what edit_compile.compile(model, inputs=recording) makes")
    if not compiled.program.manifest.glues:
        raise CallsError("nothing is compiled yet: edit_compile.compile(model, inputs=recording), or call it once")


def _check_class(compiled: CompiledTransformer, recording: Sequence[Generation] | Recording) -> None:
    kind = compiled.program.manifest.model
    if isinstance(recording, Recording) and recording.model_class != kind:
        raise CallsError(f"{recording.folder} holds calls of {recording.model}, what is tuned is a {kind}: record that")


def _check_generation(compiled: CompiledTransformer, generation: Generation, said: str) -> None:
    try:
        check_arguments(compiled, generation)
    except CallsError as error:
        raise CallsError(f"{said}: {error}") from error
    outputs = [(f"calls[{number}]", one) for number, call in enumerate(generation.calls) for one in call.outputs]
    results = [] if generation.result is None else [("the result", generation.result)]
    for where, tensor in (*outputs, *results):
        if not torch.isfinite(tensor).all():
            raise CallsError(f"{said}: {where} holds NaN or infinity: leave this generation out, or record it anew")


def _fitted(compiled: CompiledTransformer, generation: Generation, said: str) -> Sampler:
    try:
        return Sampler.fit(generation, *latents_of(compiled))
    except CallsError as error:
        raise CallsError(f"{said}: {error}") from error


def _warn(generations: Sequence[Generation], samplers: Sequence[Sampler]) -> None:
    """Say what makes predictions worth less: no result, or a sampler that does more than is known of it."""
    if any(generation.result is None for generation in generations):
        warnings.warn(
            "some generations were recorded without a result, so their quality is that of what the last call was given "
            "and gave: record the pipeline, or say recorder.result(latents) in a loop of your own",
            RuntimeWarning,
            stacklevel=4,
        )
    warn_of_unexplained(samplers)
