"""What commands call a model or a bundle with: recorded calls, a file's arguments, or noise, and then it is said."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from edit_compile.bundles.beside_bundle import inputs_for
from edit_compile.calls.beside_bundle import forms_for, recorded_dtype, steps_for
from edit_compile.calls.generations import Recording
from edit_compile.loading import UserError, load_inputs, parse_dtype
from edit_compile.measuring.benchmarking import trajectory_of
from runtime.face.transformer import CompiledTransformer

STEPS = 28
"""Steps that one call's inputs are spread over where nothing else is said."""

Each = list[dict[str, Any]]


def compile_inputs(
    files: Sequence[Path], calls: Path | None, dtype: str | None
) -> tuple[Recording | Each, torch.dtype | None]:
    """What to compile for, and the dtype to load the model in, that of recorded calls where none is asked for.

    UserError where both or neither are given, or another dtype was recorded.
    """
    if bool(files) == (calls is not None):
        raise UserError("say what the model is called with: --calls FOLDER of recorded calls, or --inputs FILE")
    asked = parse_dtype(dtype)
    if calls is None:
        return [load_inputs(path) for path in files], asked
    recording = Recording(calls)
    recorded = recorded_dtype(recording)
    if asked not in (None, recorded):
        was = str(recorded).removeprefix("torch.")
        raise UserError(f"{calls} was recorded in {was}: record with --dtype {dtype}, or compile without --dtype")
    return recording, recorded


def forms_of(compiled: CompiledTransformer, inputs: Path | None, calls: Path | None, console: Console) -> Each:
    """Keyword arguments of one call of each form that was recorded, or of the one call that the file or noise is."""
    return _given(compiled, inputs, calls, console, forms_for)


def steps_of(
    compiled: CompiledTransformer, inputs: Path | None, calls: Path | None, steps: int | None, console: Console
) -> Each:
    """Keyword arguments of each step: those recorded, or of one call while its timestep falls over `steps`."""
    if calls is not None and steps is not None:
        raise UserError("--steps is for the inputs of one call: with --calls the steps are those recorded")
    given = _given(compiled, inputs, calls, console, steps_for)
    if calls is not None:
        return given
    return trajectory_of(given[0], steps or STEPS, compiled.program.manifest.timestep)


def _given(
    compiled: CompiledTransformer,
    inputs: Path | None,
    calls: Path | None,
    console: Console,
    recorded: Callable[[CompiledTransformer, Recording], Each],
) -> Each:
    if inputs is not None and calls is not None:
        raise UserError("--inputs and --calls both say what to run with: give one of them")
    if calls is not None:
        return recorded(compiled, Recording(calls))
    if inputs is None:
        told = "inputs are random: decisions mean nothing (--calls FOLDER takes recorded ones)"
        console.print(told, style="yellow", markup=False, highlight=False, soft_wrap=True)
    given: Mapping[str, Any] = inputs_for(compiled, inputs)
    return [dict(given)]
