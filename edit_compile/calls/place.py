"""Which argument of recorded calls holds the latents, which output advances it, and what part of it moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from edit_compile.calls.generations import CallsError, Generation, RecordedCall
from passes.observe.latents import find_latents
from runtime.face.arguments import flatten
from runtime.face.transformer import CompiledTransformer


@dataclass(frozen=True)
class Place:
    """What a sampler advances: the argument `latents`, by its dotted name, with the output at position `output`.

    `box` holds (begin, end) of each dimension behind the rows: what moves. All else is as recorded, such as an image
    beside the latents.
    """

    latents: str
    output: int
    box: tuple[tuple[int, int], ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Shape of what moves, without rows."""
        return tuple(end - begin for begin, end in self.box)

    def within(self, tensor: Tensor) -> Tensor:
        """What moves of latents, an output or a result, as a view; a tensor of just that shape is all of it."""
        if tuple(tensor.shape[1:]) == self.sizes:
            return tensor
        return tensor[:, *(slice(*ends) for ends in self.box)]

    def rows(self, tensor: Tensor) -> Tensor:
        """The same as (rows, numbers) float64 on the CPU."""
        return self.within(tensor.detach()).flatten(1).to("cpu", torch.float64)

    def holds(self, tensor: Tensor) -> bool:
        """Whether `tensor` has all that moves."""
        shape = tuple(tensor.shape[1:])
        return shape == self.sizes or (
            len(shape) == len(self.box) and all(size >= end for size, (_, end) in zip(shape, self.box, strict=True))
        )

    def latents_of(self, call: RecordedCall) -> Tensor:
        """The latents that `call` was made with, all of them."""
        return flatten(call.arguments)[0][self.latents]


def latents_of(compiled: CompiledTransformer) -> tuple[str, int]:
    """The argument that holds the latents and the position of the output that advances them, by the program's manifest.

    CallsError where nothing is compiled yet, or several arguments are advanced.
    """
    return _only(sorted({pair for glue in compiled.program.manifest.glues for pair in glue.latents}), "the program")


def place_of(generation: Generation, latents: str | None = None, output: int | None = None) -> Place:
    """Where the latents are; what is not said is found by shapes, among what changes from step to step.

    CallsError where there are fewer than two calls, nothing or several things fit, or nothing moves.
    """
    calls = generation.calls
    if len(calls) < 2:
        raise CallsError(f"a generation of {len(calls)} calls says nothing of its sampler: record one of several steps")
    given = [flatten(call.arguments)[0] for call in calls]
    if latents is None or output is None:
        latents, output = _found(given, calls[0].outputs, latents, output)
    for index, (tensors, call) in enumerate(zip(given, calls, strict=True)):
        _check(f"calls[{index}]", tensors, call.outputs, latents, output, given[0])
    shapes = [tuple(call.outputs[output].shape[1:]) for call in calls]
    return Place(latents, output, _box([tensors[latents] for tensors in given], shapes))


def _found(
    given: Sequence[Mapping[str, Tensor]], outputs: Sequence[Tensor], latents: str | None, output: int | None
) -> tuple[str, int]:
    """What advances what, as far as it is not said."""
    names = _changing(given) if latents is None else [latents] if latents in given[0] else []
    chosen = outputs if output is None else outputs[output : output + 1]
    name, position = _only(find_latents({name: given[0][name] for name in names}, chosen, None, ""), "the generation")
    return name, position + (output or 0)


def _only(pairs: Sequence[tuple[str, int]], where: str) -> tuple[str, int]:
    if not pairs:
        raise CallsError(
            f"the latents of {where} are not found (a floating argument that changes from step to step, in the shape "
            "of an output): pass latents= and output="
        )
    if len(pairs) > 1:
        told = ", ".join(f"{name!r} by output {position}" for name, position in pairs)
        raise CallsError(f"{where} advances several arguments: {told}; only one can be replayed")
    return pairs[0]


def _changing(given: Sequence[Mapping[str, Tensor]]) -> list[str]:
    """Names of floating arguments that change and never come back to what they were, as prompts of branches do."""
    return [
        name
        for name, first in given[0].items()
        if first.is_floating_point()
        and all(name in tensors for tensors in given)
        and _moves_on([tensors[name] for tensors in given])
    ]


def _moves_on(values: Sequence[Tensor]) -> bool:
    kept = [values[0]]
    for value in values[1:]:
        if not _same(kept[-1], value):
            kept.append(value)
    return len(kept) > 1 and not any(_same(a, b) for number, a in enumerate(kept) for b in kept[number + 2 :])


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or torch.equal(one, other)


def _check(
    call: str,
    tensors: Mapping[str, Tensor],
    outputs: Sequence[Tensor],
    latents: str,
    output: int,
    first: Mapping[str, Tensor],
) -> None:
    """CallsError where a call has not what the first has: latents, of that shape, and an output for each row."""
    if latents not in tensors:
        raise CallsError(f"{call} has no tensor {latents!r}; it has {', '.join(sorted(tensors))}")
    if not 0 <= output < len(outputs):
        raise CallsError(f"{call} has no output {output}; it has {len(outputs)}")
    own, shape, given = tensors[latents].shape, first[latents].shape, outputs[output].shape
    if own[1:] != shape[1:]:
        raise CallsError(f"{call} has latents of shape {tuple(own)}, calls[0] of {tuple(shape)}: they have to be alike")
    if len(own) < 2 or len(given) != len(own) or given[0] != own[0]:
        raise CallsError(f"{call}: output {output} of shape {tuple(given)} does not advance latents of {tuple(own)}")


def _box(latents: Sequence[Tensor], outputs: Sequence[tuple[int, ...]]) -> tuple[tuple[int, int], ...]:
    """(begin, end) of what moves in each dimension, as far as outputs of the shapes `outputs` have it."""
    moved = torch.zeros(latents[0].shape[1:], dtype=torch.bool)
    for before, now in pairwise(latents):
        rows = len(now) if len(now) == len(before) else 1  # row 0 is the first sample's, however rows are joined
        moved |= (now[:rows] != before[:rows]).any(0)
    where = moved.nonzero()
    if not len(where):
        raise CallsError("the latents are the same in all calls: a generation of one step says nothing of its sampler")
    box = tuple(zip(where.amin(0).tolist(), (where.amax(0) + 1).tolist(), strict=True))
    if set(outputs) == {tuple(end - begin for begin, end in box)}:
        return box
    sizes = [min(dimension) for dimension in zip(*outputs, strict=True)]
    common = tuple((begin, min(end, size)) for (begin, end), size in zip(box, sizes, strict=True))
    if any(begin >= end for begin, end in common):
        raise CallsError("what moves of the latents is where the output has nothing: pass latents= and output=")
    return common
