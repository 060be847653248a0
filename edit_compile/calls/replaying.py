"""A recorded generation once more, with another model: its sampler is known from its calls (see `sampler`).

With x' = a x + b_1 v_1 + ... + r, and r as it was, what is replayed differs from what was recorded by

    dx' = a dx + b_1 dv_1 + ...

so that r is never computed, and a model that gives what was recorded is given what was recorded, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edit_compile.calls.draft import tensors_of
from edit_compile.calls.generations import CallsError, Generation, RecordedCall
from edit_compile.calls.place import Place
from edit_compile.calls.recorded_model import check_arguments
from edit_compile.calls.sampler import Sampler, Term
from edit_compile.calls.stages import Stage
from runtime.face.arguments import mapped
from runtime.face.transformer import CompiledTransformer


@dataclass(frozen=True)
class Replayed:
    """What a replay gave, on the CPU, in the shapes and dtypes that were recorded.

    `latents` and `outputs` have an entry for each call: the latents that it was given, and the tensors it returned.
    `result` is the generation's new result, None where none was recorded; `place` says what was moved.
    """

    latents: tuple[Tensor, ...]
    outputs: tuple[tuple[Tensor, ...], ...]
    result: Tensor | None
    place: Place


@torch.no_grad()
def replay(model: Callable[..., Any], generation: Generation, sampler: Sampler) -> Replayed:
    """Make `generation` again with `model`: what it gives moves the latents of the calls that follow.

    Args:
        model: called with the recorded keyword arguments and other latents, on its own device: a dense, elastic or
            compiled transformer, or any function. Calls are made in the recorded `cache_context` where it has that.
            Of a compiled one each replay is a request of its own.
        generation: the one that `sampler` was fitted to, or another with the same calls in the same schedule.
        sampler: ``Sampler.fit(generation)``.

    Latents are rounded to their recorded dtype in every step. What does not come from the transformer is as recorded:
    noise, clipping, the factor of rescaled guidance, arguments other than the latents.

    Raises:
        CallsError (an EditError), which names the call: `sampler` is of another kind of generation, the model does
            not take the recorded arguments, or gives NaN, infinity or other outputs than were recorded.
    """
    stages = sampler.stages_of(generation)
    check_arguments(model, generation)
    run = _Run(model, generation, sampler.place)
    with ExitStack() as stack:
        if isinstance(model, CompiledTransformer):
            stack.enter_context(model.request())
        else:
            stack.callback(getattr(model, "_reset_stateful_cache", lambda: None))
        moved = torch.zeros_like(stages[0].distinct)
        for number, stage in enumerate(stages):
            if number:
                moved = torch.stack([run.moved(terms) for terms in sampler.steps[number - 1].groups])
            run.make(stage, moved)
    return Replayed(tuple(run.latents), tuple(run.outputs), run.result, sampler.place)


class _Run:
    """A replay that is being made: what calls were given and gave, and by how much that differs from before."""

    def __init__(self, model: Callable[..., Any], generation: Generation, place: Place) -> None:
        self.model, self.generation, self.place = model, generation, place
        self.latents: list[Tensor] = []
        self.outputs: list[tuple[Tensor, ...]] = []
        self.result: Tensor | None = None
        self._placed = Placed(device_of(model))

    def moved(self, terms: Sequence[Term]) -> Tensor:
        """By how much latents differ that are made of `terms`: (numbers,) float64."""
        total = torch.zeros(torch.Size(self.place.sizes).numel(), dtype=torch.float64)
        for term in terms:
            call, rows = self.generation.calls[term.call], slice(term.row, term.row + 1)
            if term.given:
                now, before = self.outputs[term.call][self.place.output], call.outputs[self.place.output]
            else:
                now, before = self.latents[term.call], self.place.latents_of(call)
            total += term.factor * (self.place.rows(now[rows]) - self.place.rows(before[rows]))[0]
        return total

    def make(self, stage: Stage, moved: Tensor) -> None:
        """Make the calls of `stage`, or its result, with latents that differ by `moved` (groups, numbers)."""
        if not stage.calls and self.generation.result is not None:
            self.result = self._other(self.generation.result, moved[list(stage.groups[0])])
            return
        for index, groups in zip(stage.calls, stage.groups, strict=True):
            recorded = self.place.latents_of(self.generation.calls[index])
            self.latents.append(self._other(recorded, moved[list(groups)]))
            self.outputs.append(self._called(index))

    def _other(self, recorded: Tensor, moved: Tensor) -> Tensor:
        """`recorded` with what moves in it moved on by (rows, numbers)."""
        other = recorded.clone()
        part = self.place.within(other)
        part.copy_(part.double() + moved.view(part.shape))
        return other

    def _called(self, index: int) -> tuple[Tensor, ...]:
        """What the model gives in call `index`, on the CPU."""
        call, said = self.generation.calls[index], f"calls[{index}] of {len(self.generation.calls)}"
        latents, place = self.latents[index].to(self._placed.device), self.place.latents
        arguments = mapped(call.arguments, lambda name, tensor: latents if name == place else self._placed(tensor))
        outputs = called(self.model, arguments, call.context)
        if [tensor.shape for tensor in outputs] != [tensor.shape for tensor in call.outputs]:
            told, was = ([tuple(tensor.shape) for tensor in given] for given in (outputs, call.outputs))
            raise CallsError(f"{said} gave tensors of shapes {told}, recorded were {was}: is it another model's?")
        if not torch.isfinite(outputs[self.place.output]).all():
            raise CallsError(f"{said} gave NaN or infinity in a replay: its latents, or the model, have gone astray")
        return outputs


class Placed:
    """Recorded tensors on `device`, the same object each time, as pipelines pass them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._made: dict[int, tuple[Tensor, Tensor]] = {}  # with what they were made of, so that no id comes again

    def __call__(self, tensor: Tensor) -> Tensor:
        """`tensor` there."""
        if id(tensor) not in self._made:
            self._made[id(tensor)] = tensor, tensor.to(self.device)
        return self._made[id(tensor)][1]

    def arguments(self, call: RecordedCall) -> dict[str, Any]:
        """Those of a recorded call, there."""
        return mapped(call.arguments, lambda _, tensor: self(tensor))


def in_context(model: Callable[..., Any], context: str | None) -> AbstractContextManager[Any]:
    """The model's cache context of that name, where a name is given and the model has those."""
    named = getattr(model, "cache_context", None)
    return nullcontext() if context is None or named is None else named(context)


def called(model: Callable[..., Any], arguments: Mapping[str, Any], context: str | None) -> tuple[Tensor, ...]:
    """What the model gives in a cache context, where it has those: copies of its tensors, on the CPU."""
    with in_context(model, context):
        return tuple(tensor.detach().cpu().clone() for tensor in tensors_of(model(**arguments)))


def device_of(model: Callable[..., Any]) -> torch.device:
    """Where the model takes its inputs; the CPU where it does not say."""
    told = getattr(model, "device", None)
    if isinstance(told, torch.device):
        return told
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return torch.device("cpu") if first is None else first.device
