"""Whether a call's latents continue those of the calls before it.

A sampler makes its next latents from the last ones and from what the model gave, x' = a x + b_1 v_1 + ... + b_m v_m,
with outputs of guidance's other branches and of earlier steps among the v. Another generation's latents have noise of
their own, which no such sum gives. With d = x' - x and the Gram matrix of (d, x, v_1, ..., v_m):

    r = |d - projection of d onto x|            what is left once a scale is taken out
    s = |d - projection of d onto x, v_1 ...|   what is left once the outputs are, too

the latents continue where s < r / 2, where d is no more than rounding of x', and where d is less than a tenth of x' and
the timestep goes on under the same conditioning. Where r is less than a hundredth of d, they do not: no sampler only
scales, but noise at a later start is scaled noise. A half leaves room for what samplers do beside the sum (guidance
rescaled token by token, clipping, a region that is painted over). Where other images may be about (`rule.Grounds`),
none is left: s < r / 10; and at a timestep that is repeated, s is less than half of what is left without v_1, the last
output, since images made side by side of one noise are sums of earlier outputs, too. Only what moved is looked at:
what the model gives for an image beside the latents the sampler does not use. Latents are compared by up to `SAMPLE` of
their numbers a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from runtime.requests.rule import Grounds

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
STRICT = 0.1
SCALED = 1e-4
LAST = 2
"""The last output among the vectors of a Gram matrix."""
PART = 1 / 8
"""Where less than such a part of a row moved, all of it is looked at."""
RIDGE = 1e-6
"""Added to the diagonal of the normalised Gram matrix: outputs may be nearly the same."""


class Chain:
    """The last calls, with latents of one shape: samples (rows, numbers) float32 of latents and of outputs.

    `latents` are those of the first call, rows first, and `output` what the model gave for them: where it has fewer of
    a dimension (channels of an image stand beside the latents), it is 0. `shape` is that of the latents, without rows.
    `first` are the latents that the generation began with: those, if they are `new` (or () bool), else nan.
    """

    def __init__(self, latents: Tensor, output: Tensor, new: Tensor | bool) -> None:
        self.shape = tuple(latents.shape[1:])
        self._last = self.sample(latents)
        if isinstance(new, Tensor):
            self.first = self._last.masked_fill(~new, torch.nan)
        else:
            self.first = self._last if new else torch.full_like(self._last, torch.nan)
        self._outputs = [self.sample(self._beside_latents(output))]

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        return self.first.nbytes + self._last.nbytes + sum(output.nbytes for output in self._outputs)

    def sample(self, tensor: Tensor) -> Tensor:
        """What is looked at of latents or an output, as a copy."""
        rows = tensor.detach().flatten(1)
        stride = -(-rows.shape[1] // SAMPLE) | 1  # odd, so that it meets all channels
        return rows[:, ::stride].to(torch.float32, copy=True)

    def gram(self, sample: Tensor) -> Tensor:
        """Gram matrices (rows, k, k) float64 of (d, x, v_1, ...) for a call's latents.

        Where the call has another number of rows, each goes with the nearest of those before. Does not synchronise
        with the device.
        """
        before, same = self._last, _same_latents(self._last)
        # a host knows at no cost whether there are peers; elsewhere those that are not there are zeros
        peers = _peers(same) if same.device.type != "cpu" or int(same.sum()) > len(same) else []
        outputs = [*self._outputs, *(peer.of(one) for one in self._outputs for peer in peers)]
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
            peers = _peers(_same_latents(self._last))
            kept = [rows[nearest] for one in kept for rows in (one, *(peer.of(one) for peer in peers))]
        self._last = sample
        self._outputs = [self.sample(self._beside_latents(output)), *kept[: OUTPUTS - 1]]

    def astray(self, sample: Tensor) -> Tensor:
        """Whether a row is nearer to where another one was than to where it was itself: () bool."""
        if len(sample) == 1 or len(sample) != len(self._last):
            return sample.new_zeros((), dtype=torch.bool)
        apart = torch.cdist(sample, self._last)
        return (apart.amin(1) < apart.diagonal() / 3).any()

    def _beside_latents(self, output: Tensor) -> Tensor:
        """`output` in the latents' shape: cut, or 0 where it has nothing."""
        missing = [have - given for have, given in zip(self.shape, output.shape[1:], strict=True)]
        return (
            pad(output.detach(), [side for more in reversed(missing) for side in (0, more)]) if any(missing) else output
        )


def continues(gram: np.ndarray, eps: float, on: Grounds) -> bool:
    """Whether latents of the precision `eps` continue, by Gram matrices (rows, k, k)."""
    with np.errstate(all="ignore"):  # latents that are not finite do not continue
        return bool(_rows_continue(gram, eps, on).all())


def _rows_continue(gram: np.ndarray, eps: float, on: Grounds) -> np.ndarray:
    """Which rows do: (rows,) bool."""
    moved, along, last = gram[:, 0, 0], gram[:, 0, 1], gram[:, 1, 1]
    own = moved + 2 * along + last
    rounding = (2 * eps) ** 2 * own
    still: np.ndarray = moved <= 4 * rounding
    if still.all():
        return still
    before = unscaled = moved - np.where(last > 0, along**2 / last, 0.0)
    left = _unexplained(gram)
    if on.repeated:
        earlier = [index for index in range(gram.shape[1]) if index != LAST]
        before = np.minimum(before, _unexplained(gram[:, earlier][:, :, earlier]))
    if on.strict:
        explained = (before > 4 * rounding) & (left <= STRICT**2 * before + rounding)
    else:
        explained = left < EXPLAINED**2 * before
    near = (moved <= NEAR**2 * own) & on.near
    return still | ~(unscaled <= SCALED * moved) & (near | explained)


def _unexplained(gram: np.ndarray) -> np.ndarray:
    """Squared length (rows,) of each d without its projection onto the others; those of no length have no part."""
    lengths = np.sqrt(np.diagonal(gram, axis1=1, axis2=2)[:, 1:])
    lengths = np.where(lengths > 0, lengths, 1.0)
    others = gram[:, 1:, 1:] / (lengths[:, :, None] * lengths[:, None])
    along = gram[:, 0, 1:] / lengths
    parts = np.linalg.solve(others + RIDGE * np.eye(lengths.shape[1]), along[..., None])[..., 0]
    return np.maximum(gram[:, 0, 0] - (along * parts).sum(1), 0.0)


def _nearest(rows: Tensor, others: Tensor) -> Tensor:
    """For each of `rows`, the number of the nearest of `others`."""
    return torch.cdist(rows, others).argmin(1)


@dataclass(frozen=True)
class _Peers:
    """For each of some rows another one, `rows` (rows,) int64, where `found` (rows, 1) bool."""

    rows: Tensor
    found: Tensor

    def of(self, output: Tensor) -> Tensor:
        """Their rows of an output, 0 where there is none."""
        return output.index_select(0, self.rows) * self.found


def _same_latents(latents: Tensor) -> Tensor:
    """Which rows have the same latents: (rows, rows) bool. Does not synchronise with the device."""
    latents = latents[:, :: -(-latents.shape[1] // GLANCE)]
    return (latents[:, None] == latents).all(-1)


def _peers(same: Tensor) -> list[_Peers]:
    """For each row the next one with the same latents, and the one after that: guidance joins rows of a batch so.

    Does not synchronise with the device.
    """
    count = len(same)
    if count == 1:
        return []
    rows = (same[0] | True).cumsum(0) - 1
    ahead = ((rows - rows[:, None]) % count).masked_fill(same.logical_not(), count)  # a row is 0 ahead of itself
    found = ahead.sort(1).values[:, 1 : PEERS + 1]
    return [_Peers((rows + ahead) % count, (ahead < count)[:, None]) for ahead in found.unbind(1)]
