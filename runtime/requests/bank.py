"""Algorithm 1's bank of residuals: what a block last added to its states, row by row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from runtime.routing.policy import EMPTY


class Residuals:
    """Bank C = (Delta, k) of one block in one cache context, for every row of the batch.

    `held[row]` is k, the number of reuses since the residual was computed, or EMPTY. One Delta per
    state, of the state's shape and dtype, whose dimension ``dims[state]`` carries the rows. The
    buffers stay when the bank is emptied, and are written again, within torch.inference_mode or not.
    """

    def __init__(self, rows: int, dims: Sequence[int]) -> None:
        self.held = [EMPTY] * rows
        self._dims = tuple(dims)
        self._deltas: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(delta.nbytes for delta in self._deltas)

    def clear(self, rows: Sequence[int] | None = None) -> None:
        """Empty `rows` (all where None)."""
        for row in range(len(self.held)) if rows is None else rows:
            self.held[row] = EMPTY

    def keep(self, before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
        """Delta = after - before and k = 0, for all rows."""
        if not self._deltas:
            with torch.inference_mode(False):
                self._deltas = [torch.empty_like(state) for state in after]
        for delta, old, new in zip(self._deltas, before, after, strict=True):
            torch.sub(new, old, out=delta)
        self.held = [0] * len(self.held)

    def keep_rows(self, rows: Sequence[int], index: Tensor, before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
        """Delta = after - before and k = 0 for `rows`; `before` and `after` hold these rows alone.

        `index` is `rows` as an int64 tensor on the states' device.
        """
        if not self._deltas:
            with torch.inference_mode(False):
                self._deltas = [self._whole(state, dim) for state, dim in zip(after, self._dims, strict=True)]
        for delta, dim, old, new in zip(self._deltas, self._dims, before, after, strict=True):
            delta.index_copy_(dim, index, new - old)
        for row in rows:
            self.held[row] = 0

    def reuse(self, states: Sequence[Tensor]) -> list[Tensor]:
        """x + Delta and k += 1, for all rows."""
        self.held = [k + 1 for k in self.held]
        return [state + delta for state, delta in zip(states, self._deltas, strict=True)]

    def reuse_rows(self, rows: Sequence[int], index: Tensor, states: Sequence[Tensor]) -> list[Tensor]:
        """x + Delta and k += 1 for `rows`; `states` and the result hold these rows alone."""
        for row in rows:
            self.held[row] += 1
        return [
            state + delta.index_select(dim, index)
            for state, delta, dim in zip(states, self._deltas, self._dims, strict=True)
        ]

    def _whole(self, part: Tensor, dim: int) -> Tensor:
        shape = list(part.shape)
        shape[dim] = len(self.held)
        return part.new_empty(shape)
