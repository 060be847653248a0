"""A forward call: its glue, its arguments, and what the requests whose rows it has see of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from runtime.base.errors import InputError
from runtime.bundle.spec import Glue
from runtime.face import arguments
from runtime.requests.sighting import Sighting


@dataclass(frozen=True)
class Call:
    """A forward call: its glue, its arguments, the tensors among them by dotted name, what its request sees of it."""

    glue: Glue
    given: Mapping[str, object]
    tensors: Mapping[str, Tensor]
    sighting: Sighting

    @cached_property
    def rows(self) -> Mapping[str, int]:
        """Rows of the batch in each input that carries it."""
        return arguments.rows(self.glue, self.tensors)

    def parts(self, requests: int) -> list[Sighting]:
        """What each of `requests` sees, which have equally many rows; InputError where they cannot."""
        if requests == 1:
            return [self.sighting]
        dims = {given.name: given.shape.index(None) for given in self.glue.inputs if None in given.shape}
        latent = self.glue.latents[0][0] if self.glue.latents else None
        latents = self.sighting.latents
        if latents is None or latent not in dims:
            raise InputError("this call has no latents with rows that requests could share: call each request alone")
        rows = len(latents)
        for name, count in self.rows.items():
            if count != rows or count % requests:
                raise InputError(f"{name} holds {count} rows, which {requests} requests cannot share equally")
        fixed = {name: t for name, t in self.sighting.conditioning.items() if name not in dims and t.ndim}
        dims |= {name: 0 for name, tensor in fixed.items() if len(tensor) == rows}  # of a size that was traced
        each = rows // requests
        return [self.sighting.part(start, start + each, rows, dims) for start in range(0, rows, each)]


def latents_of(glue: Glue, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The tensor that a sampler advances, rows first; None where none is known, or it is not of floats."""
    if not glue.latents:
        return None
    name = glue.latents[0][0]
    latents = _rows_first(glue, name, tensors[name])
    return latents if latents.is_floating_point() else None


def advanced_of(glue: Glue, outputs: Sequence[Tensor]) -> Tensor | None:
    """The output that a sampler advances its latents by, rows first; None where none is known."""
    if not glue.latents:
        return None
    name, position = glue.latents[0]
    return _rows_first(glue, name, outputs[position])


def _rows_first(glue: Glue, name: str, tensor: Tensor) -> Tensor:
    """`tensor` with the rows of the input called `name` as dimension 0; an entry of a list is one row."""
    if "." in name:
        return tensor[None]
    shape = next(given.shape for given in glue.inputs if given.name == name)
    return tensor.movedim(shape.index(None), 0) if None in shape else tensor
