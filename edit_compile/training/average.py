"""The exponential moving average of a model's weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from edit_compile.training.sharding import spread_like


class Ema:
    """Exponential moving average of a module's trained parameters and floating-point buffers, by name.

    Parameters that need no gradient are left out. Without a `decay` (None or 0) there is no average: `values` is empty.
    """

    def __init__(self, module: nn.Module, decay: float | None, values: Mapping[str, Tensor] | None = None) -> None:
        self.decay = decay
        frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
        kept = {name: t.detach() for name, t in module.state_dict().items() if decay and name not in frozen}
        known = values or {}
        self.values = {n: spread_like(known[n], t) if n in known else t.clone() for n, t in kept.items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move towards the module's values; the decay is min(decay, (1 + step) / (10 + step))."""
        if not self.decay:
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        current = module.state_dict()
        moving = [name for name, value in self.values.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.values[n] for n in moving], [current[n] for n in moving], 1 - decay)
