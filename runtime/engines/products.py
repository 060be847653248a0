"""Products in half precision on CPUs without instructions for it.

torch multiplies x W there in good time only where W lies column by column, as the weight of a linear does. That of an
MLP's second linear is kept row by row, so that every width is a prefix of it, and then the product takes many times as
long (`python -m benchmarks.products`). Inside `quickened` such a W is laid out anew before its product, which takes a
small part of it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_RIGHT: dict[Any, int] = {torch.ops.aten.mm.default: 1, torch.ops.aten.addmm.default: 2}
"""The argument of a product that is W."""
_INSTRUCTIONS = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
"""What tells whether the CPU has instructions for a dtype."""


class Relaid(TorchDispatchMode):
    """Inside the ``with`` block, W of a product is laid out column by column where it is not."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """`func`, on W in another layout where it is one of the products."""
        at = _RIGHT.get(func)
        if at is not None and args[at].is_contiguous():
            args = (*args[:at], args[at].t().contiguous().t(), *args[at + 1 :])
        return func(*args, **kwargs or {})


def quickened(weight: Tensor | None) -> AbstractContextManager[object]:
    """A context for products with weights like `weight`: `Relaid` where they would be slow, else nothing."""
    return Relaid() if weight is not None and _slow(weight.device.type, weight.dtype) else nullcontext()


def _slow(device: str, dtype: torch.dtype) -> bool:
    asked = _INSTRUCTIONS.get(dtype)
    if device != "cpu" or asked is None:
        return False
    return not (torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, asked)())
