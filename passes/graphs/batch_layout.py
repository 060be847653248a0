"""How tensors hold the samples of a batch: the data of passes.observe.adapt, which says when each form is found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec


@dataclass(frozen=True)
class Packing:
    """How a tensor holds the samples of a batch along dimension `dim` (see passes.observe.adapt).

    Each sample has one row, or several where `folded`: together, or one in each of several runs over the samples where
    `strided`. `shared` more rows belong to all samples; they come first where `leading`, else last. Where they are
    `offsets`, rows are the ends of a sample's segments in the tokens of the batch, after one zero; per sample, they
    count from where the sample starts.
    """

    dim: int = 0
    folded: bool = False
    shared: int = 0
    leading: bool = False
    strided: bool = False
    offsets: bool = False

    @property
    def plain(self) -> bool:
        """Whether it is one row per sample."""
        return not self.folded and not self.shared and not self.offsets

    def tokens(self, value: object, samples: int) -> int | None:
        """How many tokens (all but the last dimension) of floats each sample has; None where they lie not together."""
        if not isinstance(value, Tensor) or not value.is_floating_point() or self.shared or self.strided:
            return None
        each = value.shape[self.dim] // samples if self.folded else 1
        inner = value.shape[self.dim + 1 : -1]
        return each * inner.numel() if self.dim < value.ndim - 1 and (self.folded or inner) else None

    @property
    def parts(self) -> int:
        """How many tensors `per_sample` makes of it."""
        return 2 if self.shared else 1

    def per_sample(self, tensor: Tensor, samples: int) -> tuple[Tensor, ...]:
        """Its rows as (samples, ...), or (samples, k, ...) where folded, at `dim`; then the shared rows, if any."""
        if self.offsets:
            ends, starts = (part.unflatten(0, (samples, -1)) for part in (tensor[1:], tensor[:-1]))
            return (ends - starts[:, :1],)
        size = tensor.shape[self.dim] - self.shared
        start = self.shared if self.leading else 0
        rows = tensor.narrow(self.dim, start, size) if self.shared else tensor
        if self.strided:
            rows = rows.unflatten(self.dim, (size // samples, samples)).transpose(self.dim, self.dim + 1)
        elif self.folded:
            rows = rows.unflatten(self.dim, (samples, size // samples))
        return (rows, tensor.narrow(self.dim, 0 if self.leading else size, self.shared)) if self.shared else (rows,)

    def spread(self, values: Tensor, size: int) -> Tensor:
        """`values` (samples, ...) of samples, for each of `size` rows of such a tensor."""
        each = size // len(values)
        return values.repeat(each, *[1] * (values.ndim - 1)) if self.strided else values.repeat_interleave(each, 0)

    def packed(self, rows: Tensor, shared: Tensor | None = None) -> Tensor:
        """The tensor that `per_sample` made these of."""
        if self.offsets:
            lengths = rows[:, -1:]
            ends = rows + lengths.cumsum(0, dtype=rows.dtype) - lengths
            return torch.cat([torch.zeros_like(ends[:1, 0]), ends.flatten()])
        if self.strided:
            rows = rows.transpose(self.dim, self.dim + 1)
        rows = rows.flatten(self.dim, self.dim + 1) if self.folded else rows
        if shared is None:
            return rows
        return torch.cat([shared, rows] if self.leading else [rows, shared], self.dim)


def part_samples(offsets: Tensor, samples: int, tokens: int) -> Tensor:
    """Whether `offsets` rise from 0, and one of them stands after every `tokens`, where a sample ends."""
    starts = offsets[:-1].unflatten(0, (samples, -1))[:, 0]
    meant = tokens * torch.arange(samples, device=offsets.device)
    return (starts == meant).all() & (offsets[-1] == samples * tokens) & (offsets.diff() >= 0).all()


@dataclass(frozen=True)
class Adapter:
    """How every argument and result of a block holds the batch, in the order of its call's leaves.

    None stands for a leaf that holds no batch. `spec` is the structure of the block's own arguments. `counted` has, of
    each leaf that holds offsets, its position, its name, and the positions of the leaves whose tokens they count.
    """

    inputs: tuple[Packing | None, ...]
    outputs: tuple[Packing | None, ...]
    spec: TreeSpec
    counted: tuple[tuple[int, str, tuple[int, ...]], ...] = ()

    def tokens(self, counted: Sequence[int], leaves: Sequence[object], samples: int) -> int:
        """How many tokens each sample has in the leaves `counted`, together."""
        held = ((self.inputs[at] or Packing()).tokens(leaves[at], samples) for at in counted)
        return sum(tokens or 0 for tokens in held)

    @property
    def plain(self) -> bool:
        """Whether the block already sees one row per sample."""
        return all(packing is None or packing.plain for packing in (*self.inputs, *self.outputs))

    @property
    def origins(self) -> tuple[int, ...]:
        """Position among the block's own leaves of each leaf of the adapted block's call."""
        return tuple(at for at, packing in enumerate(self.inputs) for _ in range(packing.parts if packing else 1))

    @property
    def dims(self) -> tuple[int | None, ...]:
        """Dimension that carries the batch, for each leaf of the adapted block's call."""
        dims: list[int | None] = []
        for packing in self.inputs:
            dims += [None] if packing is None else [packing.dim, None][: packing.parts]
        return tuple(dims)


@dataclass(frozen=True)
class Samples:
    """Where a model's keyword arguments tell how many samples they hold.

    `path` leads to a tensor whose dimension `dim` it is, or to a list of one entry per sample where `dim` is None.
    Without a path they always hold one.
    """

    path: tuple[str | int, ...]
    dim: int | None

    def count(self, kwargs: Mapping[str, object]) -> int:
        """How many there are."""
        value: Any = kwargs if self.path else [kwargs]
        for key in self.path:
            value = value[key]
        size: int = len(value) if self.dim is None else value.shape[self.dim]
        return size
