"""Recorded calls in the place of inputs that a user writes by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from runtime.base.errors import InputError
from runtime.face.arguments import flatten

Inputs = Mapping[str, Any] | Sequence[Mapping[str, Any]]


@runtime_checkable
class RecordedCalls(Protocol):
    """What `edit_compile.Recording` is here: the name of the model, and arguments of one call of each form."""

    model: str

    @property
    def model_class(self) -> str:
        """Class of the model, whichever stood for it."""

    def inputs(self) -> list[dict[str, Any]]:
        """Keyword arguments of one call of each form, on the CPU."""


def inputs_for(model: nn.Module, given: Inputs | RecordedCalls) -> Inputs:
    """`given` as keyword arguments of the forward of `model`, which is no elastic model; recorded ones on its device.

    InputError where another class of model was recorded.
    """
    if not isinstance(given, RecordedCalls):
        return given
    kind = type(model).__name__
    if given.model_class != kind:
        raise InputError(f"inputs: these are calls of {given.model}, the model is a {kind}: record its own")
    first = next(model.parameters(), None)
    device = torch.device("cpu") if first is None else first.device
    moved: list[dict[str, Any]] = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), given.inputs())
    return moved


def first_trace(model: nn.Module, given: Inputs | RecordedCalls) -> Inputs:
    """`inputs_for`, of recorded forms those that one trace takes: tensors and dimensions of the first, in other sizes.

    Of forms that differ in their first dimensions alone, most likely the batch, the first.
    """
    forms = inputs_for(model, given)
    if not isinstance(given, RecordedCalls) or isinstance(forms, Mapping):
        return forms
    found = {_inner_shapes(form): form for form in reversed(forms)}
    kind = [(name, len(shape)) for name, shape in _inner_shapes(forms[0])]
    alike = [shapes for shapes in found if [(name, len(shape)) for name, shape in shapes] == kind]
    return [found[shapes] for shapes in reversed(alike)]


def _inner_shapes(form: Mapping[str, Any]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    tensors, _ = flatten(form)
    return tuple((name, tuple(tensors[name].shape[1:])) for name in sorted(tensors))
