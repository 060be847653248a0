"""Recorded calls, made again with a dense model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from edit_compile.calls.draft import tensors_of
from edit_compile.calls.generations import CallsError, Generation, RecordedCall, Recording
from edit_compile.calls.recorded_model import check_arguments
from edit_compile.calls.replaying import Placed, in_context


def check_model(model: nn.Module, recording: Recording | Sequence[Generation]) -> None:
    """CallsError where the recording says that it is of another class than `model`, dense, elastic or compiled."""
    if isinstance(recording, Recording) and recording.model_class != type(model).__name__:
        raise CallsError(
            f"recording: {recording.folder} holds calls of {recording.model}, the model is a {type(model).__name__}"
        )


def chosen_calls(
    model: nn.Module, recording: Recording | Sequence[Generation], count: int | None
) -> Iterator[tuple[str, RecordedCall]]:
    """What messages say of a call, and the call: all, or `count` of each generation, spread evenly over it.

    CallsError where the model does not take the arguments of a generation.
    """
    for number, generation in enumerate(recording):
        check_arguments(model, generation)
        total = len(generation.calls)
        taken = total if count is None else min(count, total)
        for place in torch.linspace(0, total - 1, taken, dtype=torch.float64).round().int().tolist():
            yield f"recording[{number}].calls[{place}]", generation.calls[place]


def arguments_for(model: nn.Module, call: RecordedCall) -> dict[str, object]:
    """The call's arguments on the model's device."""
    return Placed(next(model.parameters()).device).arguments(call)


def made_again(model: nn.Module, call: RecordedCall, said: str) -> list[Tensor]:
    """What `model` gives in a recorded call; CallsError, which begins with `said`, where that is of other shapes."""
    with in_context(model, call.context):
        try:
            outputs = tensors_of(model(**arguments_for(model, call)))
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise CallsError(f"{said}: the model fails with its arguments, is it another model's? {error}") from error
    shapes, were = ([tuple(tensor.shape) for tensor in given] for given in (outputs, call.outputs))
    if shapes != were:
        raise CallsError(f"{said} gives tensors of shapes {shapes}, recorded were {were}: is it another model's?")
    return outputs
