"""Algorithm 1's bank of residuals: what a block last added to its states, row by row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from runtime.routing.policy import EMPTY


class Residuals:
    """Bank C = (Delta, k) of one block in one branch of a request, for every row of the batch.

    `held[row]` is k, the number of reuses since the residual was computed, or EMPTY. One Delta per
    state, of the state's shape and dtype, whose dimension ``dims[state]`` carries the rows. The
    buffers stay when the bank is emptied, and are written again, within torch.inference_mode or not.
    """

    def __init__(self, states: Sequence[Tensor], dims: Sequence[int]) -> None:
        self._dims = tuple(dims)
        self._like = [_kind(state) for state in states]
        self.held = [EMPTY] * states[0].shape[self._dims[0]]
        self._deltas: list[Tensor] = []
        self.nbytes = 0
        """Bytes of the buffers."""

    def fits(self, states: Sequence[Tensor]) -> bool:
        """Whether it is for states like these: rows, shapes, dtypes and device."""
        return [_kind(state) for state in states] == self._like

    def clear(self, rows: Sequence[int] | None = None) -> None:
        """Empty `rows` (all where None)."""
        for row in range(len(self.held)) if rows is None else rows:
            self.held[row] = EMPTY

    def keep(
        self,
        before: Sequence[Tensor],
        after: Sequence[Tensor],
        rows: Sequence[int] | None = None,
        index: Tensor | None = None,
    ) -> None:
        """Delta = after - before and k = 0.

        For all rows; or for `rows`, then `index` is these as an int64 tensor on the states' device, and `before` and
        `after` hold these rows alone.
        """
        if not self._deltas:
            with torch.inference_mode(False):
                self._deltas = [torch.empty(shape, dtype=dtype, device=where) for shape, dtype, where in self._like]
            self.nbytes = sum(delta.nbytes for delta in self._deltas)
        for delta, dim, old, new in zip(self._deltas, self._dims, before, after, strict=True):
            if index is None:
                torch.sub(new, old, out=delta)
            else:
                delta.index_copy_(dim, index, new - old)
        for row in range(len(self.held)) if rows is None else rows:
            self.held[row] = 0

    def reuse(
        self, states: Sequence[Tensor], rows: Sequence[int] | None = None, index: Tensor | None = None
    ) -> list[Tensor]:
        """x + Delta and k += 1; for all rows, or for `rows`, which `states` and the result then hold alone."""
        for row in range(len(self.held)) if rows is None else rows:
            self.held[row] += 1
        deltas = self._deltas
        if index is not None:
            deltas = [delta.index_select(dim, index) for delta, dim in zip(deltas, self._dims, strict=True)]
        return [state + delta for state, delta in zip(states, deltas, strict=True)]


def _kind(state: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return state.shape, state.dtype, state.device
