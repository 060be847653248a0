"""What a block's code reads out of tensors into Python while it is traced.

torch.export gives a number that is read a symbol of its own, of which nothing is known, so that code which goes by it
cannot be followed. Where the numbers of a tensor are known to be the same in every call, they are computed beside the
trace, and what is read is the number itself:

    item(f(k))  =  f(k) as a number          for k known, and f of nothing but what is known
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from passes.graphs.record import tensors_in

_READS = frozenset(
    getattr(Tensor, name)
    for name in ("item", "tolist", "numpy", "__array__", "__int__", "__float__", "__bool__", "__index__", "__complex__")
)
_MADE_OF_NUMBERS = frozenset((torch.arange, torch.zeros, torch.ones, torch.full, torch.tensor, torch.linspace))
_NOWHERE: frozenset[str] = frozenset()
LARGEST = 4096
"""Elements of the largest tensor that is known: tables are not read number by number."""


class Reading(TorchFunctionMode):
    """Notes what is read inside the ``with`` block; what is `known` is read as it is.

    `read` are the names of what known numbers came from, `place` is where the first number that is not known was read,
    and `unknown` what that came from.
    """

    def __init__(self) -> None:
        super().__init__()
        self.read: set[str] = set()
        self.unknown: frozenset[str] = _NOWHERE
        self.place = ""
        self._seen: dict[int, tuple[Tensor, frozenset[str], Tensor | None]] = {}

    def follow(self, tensor: Tensor, name: str, value: Tensor | None) -> None:
        """`tensor` is called `name`, and holds `value` where that is known; `value` is written to as `tensor` is."""
        self._seen[id(tensor)] = (tensor, frozenset([name]), value)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = tensors_in((args, kwargs))
        if func in _READS:
            return self._number(func, args, kwargs)
        if func is Tensor.__iter__:
            with self:
                return iter(args[0].unbind(0))
        values = [self._value(tensor) for tensor in given]
        known = all(value is not None for value in values) and (given or func in _MADE_OF_NUMBERS)
        real = self._computed(func, args, kwargs) if known else None
        result = func(*args, **kwargs)
        names = _NOWHERE.union(*(self._names(tensor) for tensor in given))
        made = tensors_in(result)
        if real is None and _writes(func):
            made = [*made, *given]
            self._forget()
        told = real if real is not None and len(real) == len(made) else [None] * len(made)
        for tensor, value in zip(made, told, strict=True):
            self._seen[id(tensor)] = (tensor, names, value)
        return result

    def _number(self, func: Any, args: Any, kwargs: Any) -> Any:
        value = self._value(args[0])
        if value is not None:
            self.read |= self._names(args[0])
            with _disable_current_modes():
                return func(value, *args[1:], **kwargs)
        if not self.place:
            self.unknown, self.place = self._names(args[0]), _place()
        return func(*args, **kwargs)

    def _value(self, tensor: Tensor) -> Tensor | None:
        return self._seen[id(tensor)][2] if id(tensor) in self._seen else None

    def _names(self, tensor: Tensor) -> frozenset[str]:
        return self._seen[id(tensor)][1] if id(tensor) in self._seen else _NOWHERE

    def _computed(self, func: Any, args: Any, kwargs: Any) -> list[Tensor] | None:
        """The same with numbers; None where it depends on sizes that are symbols."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if any(isinstance(leaf, SymInt) for leaf in leaves):
            return None
        values = [self._value(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        own_args, own_kwargs = pytree.tree_unflatten(values, spec)
        try:
            with _disable_current_modes():
                result = tensors_in(func(*own_args, **own_kwargs))
        except Exception:  # whatever it is, the trace will meet it too, or does without
            return None
        return result if sum(value.numel() for value in result) <= LARGEST else None

    def _forget(self) -> None:
        """After a write of what is not known: views of what was written are not told apart."""
        self._seen = {key: (tensor, names, None) for key, (tensor, names, _) in self._seen.items()}


def _writes(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return name in ("__setitem__", "set_") or (name.endswith("_") and not name.endswith("__"))


def _place() -> str:
    """File and line of the code that reads."""
    own = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames: Iterable[traceback.FrameSummary] = reversed(traceback.extract_stack())
    frame = next((frame for frame in frames if not frame.filename.startswith(own)), None)
    return "" if frame is None else f"{Path(frame.filename).name}:{frame.lineno}"


def same_numbers(tensor: Any, value: Tensor, dim: int | None) -> bool:
    """Whether `tensor` holds `value`, in every row of its dimension `dim` where that carries a batch."""
    if not isinstance(tensor, Tensor):
        return False
    rows = [tensor] if dim is None else tensor.split(1, dim)
    return all(torch.equal(row, value.to(row.device)) for row in rows)
