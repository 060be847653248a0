"""A generation that is being recorded: its calls so far, with the tensors that they hold, each once, on the CPU."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edit_compile.calls.argument_tree import FlatArguments, flat_arguments
from edit_compile.calls.generations import Call, CallsError
from runtime.base.errors import EditError
from runtime.face.output import tensors_of as output_tensors

RESULT = "result"


@dataclass(frozen=True)
class _Begun:
    """A call before its output is known: its arguments, and the keys of the tensors among them."""

    flat: FlatArguments
    keys: Mapping[str, str]
    context: str | None


class Draft:
    """Calls of one generation.

    `fault` says what makes it one that cannot be kept. A call that has begun and not returned when something else
    happens has raised: the generation has `failed`.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.tensors: dict[str, Tensor] = {}
        self.fault: str | None = None
        self._raised = self._running = False
        self._known: dict[tuple[object, ...], str] = {}
        self._begun: _Begun | None = None

    @property
    def result(self) -> str | None:
        """Key of what the sampler ended with, where that is known."""
        return RESULT if RESULT in self.tensors else None

    @property
    def failed(self) -> bool:
        """Whether a call has raised."""
        return self._raised or self._running

    def begin(self) -> None:
        """A call begins."""
        self._raised, self._running, self._begun = self.failed, True, None
        self.tensors.pop(RESULT, None)  # whatever it was, the sampler has gone on

    def take(self, arguments: Mapping[str, object], context: str | None) -> None:
        """Note the arguments of the call that has begun, by name, as they are now."""
        if self.fault or self._raised:
            return
        try:
            flat = flat_arguments(arguments)
            keys = {
                name: self._stored(f"arguments/{name}", tensor, f"argument {name!r}")
                for name, tensor in flat.tensors.items()
            }
        except EditError as error:
            self.refuse(error)
        else:
            self._begun = _Begun(flat, keys, context)

    def finish(self, output: object) -> None:
        """Note what the call that was begun last has returned."""
        self._running = False
        begun = self._begun
        if begun is None:
            return
        try:
            leaves = tensors_of(output)
            keys = [self._stored(f"outputs/{i}", leaf, f"output {i}") for i, leaf in enumerate(leaves)]
        except EditError as error:
            self.refuse(error)
        else:
            flat = begun.flat
            kinds, constants = dict(flat.kinds), dict(flat.constants)
            self.calls.append(Call(dict(begun.keys), constants, kinds, begun.context, tuple(keys)))

    def end_with(self, latents: Tensor) -> None:
        """Note what the sampler has ended with, in the place of what it was."""
        self.tensors.pop(RESULT, None)
        try:
            self.tensors[RESULT] = _checked(_copied(latents, "the result"), "the result")
        except EditError as error:
            self.refuse(error)

    def looks_like_latents(self, sample: Tensor) -> bool:
        """Whether the last call took a tensor in the shape of `sample`, or several of it for guidance in one batch."""
        begun = self._begun
        return begun is not None and any(_repeats(tensor, sample) for tensor in begun.flat.tensors.values())

    def refuse(self, error: EditError) -> None:
        """Let the generation be one that cannot be kept; the first reason is the one that is told."""
        self.fault = self.fault or f"calls[{len(self.calls)}]: {error}"

    def _stored(self, place: str, tensor: Tensor, said: str) -> str:
        """Key of a tensor that stands at `place` in a call; only one with other values than those before is kept."""
        value = _copied(tensor, said)
        data = value.reshape(-1).view(torch.uint8).numpy().data
        identity = (place, value.dtype, value.shape, hashlib.blake2b(data).digest())
        if identity not in self._known:
            key = f"{place}/{len(self._known)}"
            self.tensors[key] = _checked(value, said)
            self._known[identity] = key
        return self._known[identity]


def tensors_of(output: Any) -> list[Tensor]:
    """Tensors of a model's output, in order; CallsError where it has none."""
    found = output_tensors(output)
    if not found:
        raise CallsError(f"the output is a {type(output).__name__}, and no tensor is found in it")
    return found


def _copied(tensor: Tensor, said: str) -> Tensor:
    """The values of `tensor` in memory of their own, on the CPU and contiguous: callers write into theirs."""
    if tensor.is_meta or tensor.layout is not torch.strided or tensor.is_quantized:
        raise CallsError(f"{said} is on the meta device, sparse or quantised: only dense tensors are recorded")
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor.detach())


def _checked(value: Tensor, said: str) -> Tensor:
    """`value`; CallsError where it is not finite."""
    narrow = value.is_floating_point() and value.dtype.itemsize == 1  # torch has no isfinite for these
    if not torch.isfinite(value.float() if narrow else value).all():
        raise CallsError(f"{said} holds NaN or infinity")
    return value


def _repeats(tensor: Tensor, sample: Tensor) -> bool:
    if tensor.dim() != sample.dim() or tensor.dim() == 0 or tensor.shape[1:] != sample.shape[1:]:
        return False
    return len(sample) > 0 and len(tensor) % len(sample) == 0
