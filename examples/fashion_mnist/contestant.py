"""A way to sample with less compute, as `rivals` tries, times and judges it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

import edit_compile

Draw = Callable[[Tensor, int], Tensor]
"""Gives what the sampler ends with (B, tokens, channels), for labels (B,) and a seed."""


@dataclass(frozen=True)
class Contestant:
    """A way to sample, by whom it is, and its settings in words; `prepare` makes what draws.

    `same_as` names another that draws the same images in other time: then quality is that one's, once a batch of both
    has been compared. `compiled` is the model that counts its own work.
    """

    who: str
    settings: str
    prepare: Callable[[], Draw]
    same_as: str = ""
    compiled: edit_compile.CompiledTransformer | None = None

    @property
    def name(self) -> str:
        """By whom, and how."""
        return f"{self.who}: {self.settings}"
