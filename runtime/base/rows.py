"""Code that takes one row of a batch per call, used for a batch of any size.

Rows are independent, f(X)[r] = f(X[r:r+1]), so that

    f(X) = cat(f(X[0:1]), ..., f(X[B-1:B]))    along the dimension of each state that carries the batch

and what all rows share (no such dimension) goes into every call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Run = Callable[[Sequence[Tensor]], Sequence[Tensor]]
Dims = Sequence[int | None]
"""For each input, the dimension that carries the batch; None for one that all rows share."""


def one_row(inputs: Sequence[Tensor], dims: Dims, row: int = 0) -> list[Tensor]:
    """The inputs of row `row` alone, as a batch of one; views."""
    return [
        tensor if dim is None or tensor.shape[dim] == 1 else tensor.narrow(dim, row, 1)
        for tensor, dim in zip(inputs, dims, strict=True)
    ]


def row_by_row(run: Run, inputs: Sequence[Tensor], dims: Dims, states: Sequence[int]) -> list[Tensor]:
    """``run(inputs)`` by one call per row; result k has the shape of ``inputs[states[k]]``."""
    first = states[0]
    rows = inputs[first].shape[dims[first] or 0]
    done = [run(one_row(inputs, dims, row)) for row in range(rows)]
    return [torch.cat(parts, dims[at] or 0) for at, parts in zip(states, zip(*done, strict=True), strict=True)]


class RowByRow:
    """A bound plan that takes one row (see runtime.engines.Bound) as one that takes a batch."""

    def __init__(self, bound: Run, dims: Dims, states: Sequence[int]) -> None:
        self._bound, self._dims, self._states = bound, tuple(dims), tuple(states)

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """States after the block, from inputs with any number of rows."""
        return row_by_row(self._bound, inputs, self._dims, self._states)
