"""Whether a call's latents continue those of the calls before it.

A sampler makes its next latents from the last ones and from what the model gave, x' = a x + b_1 v_1 + ... + b_m v_m,
with outputs of guidance's other branches and of earlier steps among the v. Another generation's latents have noise of
their own, which no such sum gives. With d = x' - x and the Gram matrix of (d, x, v_1, ..., v_m):

    r = |d - projection of d onto x|            what is left once a scale is taken out
    s = |d - projection of d onto x, v_1 ...|   what is left once the outputs are, too

the latents continue where s < r / 2, where r is no more than rounding of x', and where d is less than a tenth of x' and
the timestep goes on under the same conditioning. A half leaves room for what samplers do beside the sum (guidance
rescaled token by token, clipping, a region that is painted over). Only what moved is looked at: what the model gives
for an image beside the latents the sampler does not use. Latents are compared by up to `SAMPLE` of their numbers a row.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SAMPLE = 1 << 14
OUTPUTS = 6
"""Outputs of the last calls that are kept to explain the next latents by: two steps of guidance with three calls."""
MOST = 14
"""Outputs, and those of other rows, that are looked at at once (``decide.cu`` has room for two vectors more)."""
GLANCE = 1 << 10
"""Numbers of a row that say whether another has the same latents."""
PEERS = 2
"""Other rows whose outputs guidance may join with those of a row."""
NUMBERS = 8
"""Each of them needs so many numbers of the latents; fewer could be explained by anything."""
NEAR = 0.1
EXPLAINED = 0.5
PART = 1 / 8
"""Where less than such a part of a row moved, all of it is looked at."""
RIDGE = 1e-6
"""Added to the diagonal of the normalised Gram matrix: outputs may be nearly the same."""


class Chain:
    """The last calls, with latents of one shape: samples (rows, numbers) float32 of latents and of outputs.

    `latents` are those of the first call, rows first, and `output` what the model gave for them: what both have of each
    dimension is what the sampler advances, and so what is looked at. `shape` is that of the latents, without rows.
    `first` are the latents that the generation began with: those, if they are `new` (or () bool), else nan.
    """

    def __init__(self, latents: Tensor, output: Tensor, new: Tensor | bool) -> None:
        self.shape = tuple(latents.shape[1:])
        self._advanced = [slice(min(pair)) for pair in zip(latents.shape[1:], output.shape[1:], strict=True)]
        self._last = self.sample(latents)
        if isinstance(new, Tensor):
            self.first = self._last.masked_fill(~new, torch.nan)
        else:
            self.first = self._last if new else torch.full_like(self._last, torch.nan)
        self._outputs = [self.sample(output)]

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        return self.first.nbytes + self._last.nbytes + sum(output.nbytes for output in self._outputs)

    def sample(self, tensor: Tensor) -> Tensor:
        """What is looked at of latents or an output, as a copy."""
        rows = tensor.detach()[:, *self._advanced].flatten(1)
        stride = -(-rows.shape[1] // SAMPLE) | 1  # odd, so that it meets all channels
        return rows[:, ::stride].to(torch.float32, copy=True)

    def gram(self, sample: Tensor) -> Tensor:
        """Gram matrices (rows, k, k) float64 of (d, x, v_1, ...) for a call's latents.

        Where the call has another number of rows, each goes with the nearest of those before. Does not synchronise
        with the device.
        """
        before, peers = self._last, _peers(self._last)
        outputs = [*self._outputs, *(one.index_select(0, rows) for one in self._outputs for rows in peers)]
        outputs = outputs[: min(max(sample.shape[1] // NUMBERS, 1), MOST)]
        if len(before) != len(sample):
            nearest = _nearest(sample, before)
            before, outputs = before[nearest], [output[nearest] for output in outputs]
        moved = sample - before
        there = moved != 0
        there |= there.sum(1, keepdim=True) < PART * sample.shape[1]
        vectors = torch.stack([moved, before, *outputs], 1).mul_(there[:, None])
        return (vectors @ vectors.mT).double()

    def begins_again(self, sample: Tensor) -> Tensor:
        """Whether every row has latents of the first call: () bool. Does not synchronise with the device."""
        if len(sample) == len(self.first):
            return (sample == self.first).all()
        return (sample[:, None] == self.first).all(-1).any(1).all()

    def begin_where(self, new: Tensor, sample: Tensor) -> None:
        """Take `sample` for that of the first call where `new` () bool. Does not synchronise with the device."""
        rows = torch.arange(max(len(sample), len(self.first)), device=sample.device)
        self.first = torch.where(new, sample[rows % len(sample)], self.first[rows % len(self.first)])
        self._outputs = [output.masked_fill(new, 0.0) for output in self._outputs]

    def note(self, sample: Tensor, output: Tensor) -> None:
        """Take in a call: a sample of its latents, and its output."""
        kept = self._outputs
        if len(self._last) != len(sample):  # a sampler of a higher order goes on with what guidance gave before
            nearest = _nearest(sample, self._last)
            peers = [nearest, *(rows[nearest] for rows in _peers(self._last))]
            kept = [one[rows] for one in kept for rows in peers]
        self._last = sample
        self._outputs = [self.sample(output), *kept[: OUTPUTS - 1]]


def continues(gram: np.ndarray, eps: float, near: bool) -> bool:
    """Whether latents of the precision `eps` continue, by Gram matrices (rows, k, k); `near`: being near is enough."""
    with np.errstate(all="ignore"):  # latents that are not finite do not continue
        return all(_row_continues(row, eps, near) for row in gram)


def _row_continues(gram: np.ndarray, eps: float, near: bool) -> bool:
    moved, own = gram[0, 0], gram[0, 0] + 2 * gram[0, 1] + gram[1, 1]
    if moved == 0.0:
        return True
    if near and moved <= NEAR**2 * own:
        return True
    unscaled = _unexplained(gram[:2, :2])
    return bool(unscaled <= (2 * eps) ** 2 * own or _unexplained(gram) < EXPLAINED**2 * unscaled)


def _unexplained(gram: np.ndarray) -> float:
    """Squared length of d without its projection onto the others."""
    lengths = np.sqrt(np.diag(gram)[1:])
    there = lengths > 0
    lengths = lengths[there]
    others = gram[1:, 1:][np.ix_(there, there)] / np.outer(lengths, lengths)
    along = gram[0, 1:][there] / lengths
    parts = np.linalg.solve(others + RIDGE * np.eye(len(lengths)), along)
    return max(float(gram[0, 0] - along @ parts), 0.0)


def _nearest(rows: Tensor, others: Tensor) -> Tensor:
    """For each of `rows`, the number of the nearest of `others`."""
    return torch.cdist(rows, others).argmin(1)


def _peers(latents: Tensor) -> list[Tensor]:
    """For each row the next one with the same latents, and the one after that: guidance joins rows of a batch so.

    A row that has none is its own. Does not synchronise with the device.
    """
    count = len(latents)
    if count == 1:
        return []
    latents = latents[:, :: -(-latents.shape[1] // GLANCE)]
    same = (latents[:, None] == latents).all(-1)
    rows = (same[0] | True).cumsum(0) - 1
    ahead = ((rows - rows[:, None]) % count).masked_fill(same.logical_not(), count)  # a row is 0 ahead of itself
    found = ahead.sort(1).values[:, 1 : PEERS + 1]
    return [(rows + ahead) % count for ahead in found.masked_fill(found == count, 0).unbind(1)]
