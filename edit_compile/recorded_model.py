"""What is recorded: the module, its name, and the names of its arguments; dense, elastic and compiled."""

from __future__ import annotations

from typing import Any

from torch import nn

from edit_compile.calls import CallsError
from edit_compile.elastic import ElasticTransformer
from runtime.face.arguments import argument_names
from runtime.face.transformer import CompiledTransformer


def parts_of(given: Any) -> tuple[nn.Module, Any]:
    """The module to record, and the pipeline that it is the transformer of, None for a bare module.

    CallsError where that cannot be told.
    """
    if isinstance(given, nn.Module):
        return given, None
    kind = type(given).__name__
    if getattr(given, "transformer_2", None) is not None:
        raise CallsError(f"{kind} has two transformers: pass the one to record, as record(pipe.transformer_2, ...)")
    model = getattr(given, "transformer", None)
    if not isinstance(model, nn.Module):
        raise CallsError(
            f"{kind} has no transformer that could be recorded: pass the module, as record(pipe.unet, ...)"
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
