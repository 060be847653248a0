"""How far numbers may be off: one measure, and one table of what is allowed.

distance  =  max |value - reference| / max |reference|
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_ALLOWED = {
    "rows": (1e-9, 1e-4, 2e-2, 5e-2),  # of a sample, when other samples come or go
    "graph": (1e-9, 1e-5, 5e-3, 3e-2),  # of a block, against its code
    "model": (1e-6, 1e-4, 2e-2, 6e-2),  # guarded or narrowed, against the model; many blocks on end
    "engine": (1e-3, 1e-3, 1e-2, 2e-2),  # with its own kernels, against the model or torch; for GPUs a guess
}
TOLERANCE: Mapping[str, Mapping[torch.dtype, float]] = {
    what: dict(zip(_DTYPES, limits, strict=True)) for what, limits in _ALLOWED.items()
}
"""The largest distance that is allowed, by what is compared and the reference's dtype."""


def distance(value: Tensor, reference: Tensor) -> float:
    """Largest difference, relative to the reference's largest magnitude; NaN where one of them holds NaN.

    Of whole numbers and bools 0 where they are equal, else infinite.
    """
    if not (reference.is_floating_point() or reference.is_complex()):
        return 0.0 if torch.equal(value, reference) else math.inf
    scale = reference.abs().max().clamp_min(torch.finfo(reference.dtype).tiny)
    return float((value - reference).abs().max() / scale)


def largest(values: Iterable[float]) -> float:
    """The largest; NaN where one of them is, which `max` would tell or not by their order."""
    return max(values, key=lambda value: (value != value, value))
