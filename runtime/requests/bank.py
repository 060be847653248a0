"""Algorithm 1's bank of residuals: what a block last added to its states, row by row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from runtime.base.transfer import row_index
from runtime.routing.policy import EMPTY, Watched


class Residuals:
    """Bank C = (Delta, k) of one block in one branch of a request, for every row of the batch.

    `held[row]` is k, the number of reuses since the residual was computed, or EMPTY. One Delta per
    state, of the state's shape and dtype, whose dimension ``dims[state]`` carries the rows. For policies
    that extrapolate there is a second Delta, the one computed before, and for those that watch something
    what it was then (`signals`). The buffers stay when the bank is emptied, and are written again, within
    torch.inference_mode or not.
    """

    def __init__(self, states: Sequence[Tensor], dims: Sequence[int]) -> None:
        self._dims = tuple(dims)
        self._like = [_kind(state) for state in states]
        rows = states[0].shape[self._dims[0]]
        self.held = [EMPTY] * rows
        self.signals: list[tuple[Tensor, ...] | None] = [None] * rows
        self.watched: Watched | None = None
        """What `signals` are of."""
        self.deltas: list[Tensor] = []
        self._earlier: list[Tensor] = []
        self._times: list[tuple[float, float] | None] = [None] * rows  # of both Deltas; equal where there is one
        self.nbytes = 0
        """Bytes of the buffers."""

    def fits(self, states: Sequence[Tensor]) -> bool:
        """Whether it is for states like these: rows, shapes, dtypes and device."""
        return [_kind(state) for state in states] == self._like

    def clear(self, rows: Sequence[int] | None = None) -> None:
        """Empty `rows` (all where None)."""
        for row in range(len(self.held)) if rows is None else rows:
            self.held[row] = EMPTY
            self.signals[row] = None

    def keep(
        self,
        before: Sequence[Tensor],
        after: Sequence[Tensor],
        rows: Sequence[int] | None = None,
        index: Tensor | None = None,
        times: Sequence[float] | None = None,
    ) -> None:
        """Delta = after - before and k = 0.

        For all rows; or for `rows`, then `index` is these as an int64 tensor on the states' device, and `before` and
        `after` hold these rows alone. With `times`, one a row of the batch, the Delta computed before is held as well,
        unless it was at the same time.
        """
        chosen = range(len(self.held)) if rows is None else rows
        if times is not None:
            self._set_aside([row for row in chosen if self._at(row) not in (None, times[row])])
        if not self.deltas:
            self.deltas = self._buffers()
        for delta, dim, old, new in zip(self.deltas, self._dims, before, after, strict=True):
            if index is None:
                torch.sub(new, old, out=delta)
            else:
                delta.index_copy_(dim, index, new - old)
        for row in chosen:
            self._times[row] = None if times is None else self._moved_on(row, times[row])
            self.held[row], self.signals[row] = 0, None

    def reuse(
        self,
        states: Sequence[Tensor],
        rows: Sequence[int] | None = None,
        index: Tensor | None = None,
        times: Sequence[float] | None = None,
    ) -> list[Tensor]:
        """x + Delta and k += 1; for all rows, or for `rows`, which `states` and the result then hold alone.

        With `times`, one a row of the batch, Delta is moved on to them in a straight line from the earlier one.
        """
        chosen = range(len(self.held)) if rows is None else rows
        for row in chosen:
            self.held[row] += 1
        deltas = self._chosen(self.deltas, index)
        ahead = [0.0] if times is None else [self._ahead(row, times[row]) for row in chosen]
        if any(ahead):
            deltas = [
                _along(earlier, delta, ahead, dim)
                for earlier, delta, dim in zip(self._chosen(self._earlier, index), deltas, self._dims, strict=True)
            ]
        return [state + delta for state, delta in zip(states, deltas, strict=True)]

    def _at(self, row: int) -> float | None:
        """When the Delta of `row` was computed, None where there is none or that is not known."""
        times = self._times[row]
        return None if times is None or self.held[row] == EMPTY else times[0]

    def _moved_on(self, row: int, time: float) -> tuple[float, float]:
        """Times of both Deltas of `row`, the last being of `time`; equal where there is one."""
        at, times = self._at(row), self._times[row]
        if at is None or times is None:
            return time, time
        return time, times[1] if at == time else at

    def _ahead(self, row: int, time: float) -> float:
        """How far `time` lies behind the last Delta, in times between it and the earlier one."""
        last, earlier = self._times[row] or (time, time)
        return 0.0 if last == earlier else (time - last) / (last - earlier)

    def _set_aside(self, rows: Sequence[int]) -> None:
        """Let the Deltas of `rows` be the earlier ones."""
        if not rows:
            return
        if not self._earlier:
            self._earlier = self._buffers()
        if len(rows) == len(self.held):
            self.deltas, self._earlier = self._earlier, self.deltas
            return
        index = row_index(tuple(rows), self.deltas[0].device)
        for earlier, delta, dim in zip(self._earlier, self.deltas, self._dims, strict=True):
            earlier.index_copy_(dim, index, delta.index_select(dim, index))

    def _chosen(self, deltas: list[Tensor], index: Tensor | None) -> list[Tensor]:
        if index is None:
            return deltas
        return [delta.index_select(dim, index) for delta, dim in zip(deltas, self._dims, strict=True)]

    def _buffers(self) -> list[Tensor]:
        with torch.inference_mode(False):
            made = [torch.zeros(shape, dtype=dtype, device=where) for shape, dtype, where in self._like]
        self.nbytes += sum(buffer.nbytes for buffer in made)
        return made


def _along(earlier: Tensor, delta: Tensor, ahead: Sequence[float], dim: int) -> Tensor:
    """Rows of `delta`, each so far ahead on the line from those of `earlier`."""
    if len(set(ahead)) == 1:
        return torch.lerp(earlier, delta, 1.0 + ahead[0])
    rows = zip(earlier.split(1, dim), delta.split(1, dim), ahead, strict=True)
    return torch.cat([torch.lerp(old, new, 1.0 + far) for old, new, far in rows], dim)


def _kind(state: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return state.shape, state.dtype, state.device
