"""What is recorded: the module, its name, and the names of its arguments; dense, elastic and compiled."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from edit_compile.calls.generations import CallsError, Generation
from edit_compile.elastic.transformer import ElasticTransformer
from runtime.face.arguments import OTHERS, argument_names
from runtime.face.transformer import CompiledTransformer

PARTS = ("transformer", "transformer_2")
"""What pipelines of diffusers call their transformers; the second makes the last steps, where there is one."""


def parts_of(given: Any, part: str | None) -> tuple[nn.Module, Any]:
    """The module to record, and the pipeline whose `part` it is, None for a bare module.

    CallsError where that cannot be told.
    """
    if isinstance(given, nn.Module):
        if part is not None:
            raise CallsError(f"part={part!r} is for pipelines, this is a {type(given).__name__} itself: leave it out")
        return given, None
    kind = type(given).__name__
    if part is None and getattr(given, PARTS[1], None) is not None:
        raise CallsError(
            f"{kind} has two transformers: say which one to record, as record(pipe, ..., part={PARTS[1]!r}); "
            "each into a folder of its own"
        )
    model = getattr(given, part or PARTS[0], None)
    if not isinstance(model, nn.Module):
        raise CallsError(
            f"{kind} has no {part or PARTS[0]} that could be recorded: pass the module, as record(pipe.unet, ...)"
        )
    return model, given


def name_of(model: nn.Module) -> str:
    """What a recording calls the model: its class, and whose it is where it stands for another."""
    if isinstance(model, ElasticTransformer):
        return f"ElasticTransformer of {type(model.model).__name__}"
    if isinstance(model, CompiledTransformer):
        return f"CompiledTransformer of {model.program.manifest.model}"
    return type(model).__name__


def argument_names_of(model: nn.Module) -> tuple[str, ...]:
    """Names of the forward's arguments, as `runtime.face.arguments.argument_names`."""
    if isinstance(model, CompiledTransformer):
        return model.program.manifest.arguments
    return argument_names(model.model.forward if isinstance(model, ElasticTransformer) else model.forward)


def check_arguments(model: Callable[..., Any], generation: Generation) -> None:
    """CallsError, which names the call, where `model` (or any function) does not take the arguments of `generation`."""
    forward = model
    if isinstance(model, nn.Module):
        forward = model.model.forward if isinstance(model, ElasticTransformer) else model.forward
    for index, call in enumerate(generation.calls):
        said = f"the model does not take the arguments of calls[{index}], is it another model's? "
        if isinstance(model, CompiledTransformer):
            names = argument_names_of(model)
            unknown = [] if OTHERS in names else [name for name in call.arguments if name not in names]
            if unknown:
                raise CallsError(f"{said}It takes {', '.join(names)}, and no {unknown[0]!r}")
            continue
        try:
            signature = inspect.signature(forward)
        except ValueError:  # of a function written in C
            return
        try:
            signature.bind(**call.arguments)
        except TypeError as error:
            raise CallsError(f"{said}{error}") from error
