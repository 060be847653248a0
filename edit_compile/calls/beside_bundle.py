"""Recorded calls as what commands run a model or a bundle with."""

from __future__ import annotations

from typing import Any

import torch

from edit_compile.calls.forms import one_of_each_form
from edit_compile.calls.generations import CallsError, Recording
from edit_compile.calls.replaying import Placed
from runtime.face.arguments import flatten
from runtime.face.transformer import CompiledTransformer


def recorded_dtype(recording: Recording) -> torch.dtype:
    """The floating-point dtype of what the model gave; CallsError where it gave none."""
    for output in recording[0].calls[0].outputs:
        if output.is_floating_point():
            return output.dtype
    raise CallsError(f"{recording.folder}: no output of the recorded model is of a floating-point type")


def forms_for(compiled: CompiledTransformer, recording: Recording) -> list[dict[str, Any]]:
    """Keyword arguments of one call of each form, where the bundle runs; CallsError for another model's."""
    _check_model(compiled, recording)
    placed = Placed(compiled.device)
    return one_of_each_form(placed.arguments(call) for generation in recording for call in generation.calls)


def steps_for(compiled: CompiledTransformer, recording: Recording) -> list[dict[str, Any]]:
    """Keyword arguments of the first call of each step of the first generation, where the bundle runs.

    Calls one after another with one timestep are a step: branches of guidance, of which the first is taken. CallsError
    for another model's, and for calls without the bundle's timestep.
    """
    _check_model(compiled, recording)
    placed, name = Placed(compiled.device), compiled.program.manifest.timestep
    steps, last = list[dict[str, Any]](), None
    for call in recording[0].calls:
        tensors, constants = flatten(call.arguments)
        if name not in tensors and name not in constants:
            raise CallsError(f"{recording.folder}: the recorded calls have no {name!r}, the bundle's timestep")
        now = tensors[name].flatten().tolist() if name in tensors else constants[name]
        if now != last:
            steps.append(placed.arguments(call))
        last = now
    return steps


def _check_model(compiled: CompiledTransformer, recording: Recording) -> None:
    kind = compiled.program.manifest.model
    if recording.model_class != kind:
        raise CallsError(
            f"{recording.folder} holds calls of {recording.model}, the bundle is of a {kind}: give its own"
        )
