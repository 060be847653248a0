"""What a call shows of the generation that it belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from runtime.base.transfer import to_host
from runtime.requests.evidence import Chain

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Sighting:
    """A call as its request sees it.

    `timestep`: one, or one per row. `latents`: what the sampler advances, rows first; None where none is known.
    `conditioning`: all other tensors, by name. `constants`: its other arguments. `context`: its cache context.

    The rest is there once the call was seen `beside` earlier ones. `times`: the timesteps, one where all rows have the
    same. `sample`: of the latents. `gram`: see `Chain.gram`; None where nothing of this shape came before. `first`:
    whether the latents are those that the generation began with; None as before. `astray`: whether a row of them is
    nearer to another row than to its own.
    """

    timestep: Tensor
    latents: Tensor | None
    conditioning: Mapping[str, Tensor]
    context: str | None
    constants: Mapping[str, object]
    times: tuple[float, ...] = ()
    sample: Tensor | None = None
    gram: np.ndarray | None = None
    first: bool | None = None
    astray: bool = False

    def part(self, start: int, stop: int, rows: int, dims: Mapping[str, int]) -> Sighting:
        """Rows `start` to `stop` of a call of `rows`, which tensors of the conditioning have in `dims`, by name."""
        span = slice(start, stop)
        conditioning = {
            name: tensor.narrow(dims[name], start, stop - start) if name in dims else tensor
            for name, tensor in self.conditioning.items()
        }
        return replace(
            self,
            timestep=self.timestep[span] if self.timestep.ndim and len(self.timestep) == rows else self.timestep,
            latents=None if self.latents is None else self.latents[span],
            conditioning=conditioning,
        )

    @property
    def shape(self) -> Shape | None:
        """Of the latents, without rows."""
        return None if self.latents is None else tuple(self.latents.shape[1:])

    @property
    def eps(self) -> float:
        """Precision of the latents."""
        return 0.0 if self.latents is None else torch.finfo(self.latents.dtype).eps

    @property
    def moved(self) -> bool:
        """Whether its latents are others than those of the last call."""
        return self.gram is None or bool(self.gram[:, 0, 0].any())

    def beside(self, chain: Chain | None) -> Sighting:
        """This call beside earlier ones with latents of its shape.

        One transfer to the host, which brings the timesteps too.
        """
        times = self.timestep.detach().reshape(-1).double()
        if chain is None or self.latents is None:
            return replace(self, times=one_if_equal(to_host(times)))
        sample = chain.sample(self.latents)
        gram = chain.gram(sample)
        told_of = torch.stack([chain.begins_again(sample), chain.astray(sample)])
        facts = [times.to(gram.device), told_of.double(), gram.reshape(-1)]
        told = to_host(torch.cat(facts))
        count = times.numel()
        return replace(
            self,
            times=one_if_equal(told[:count]),
            sample=sample,
            gram=np.array(told[count + 2 :]).reshape(gram.shape),
            first=bool(told[count]),
            astray=bool(told[count + 1]),
        )


def one_if_equal(times: Sequence[float]) -> tuple[float, ...]:
    """The timesteps of a call's rows, one where all have the same."""
    return tuple(times[:1] if len(set(times)) == 1 else times)
