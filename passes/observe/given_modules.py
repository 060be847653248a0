"""Modules that blocks are given as arguments (rotary tables), whose tensors become constants of the blocks' graphs.

They must not change from call to call: a tensor is the same while it is the same object, and not written to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from passes.graphs.graph import Call
from passes.graphs.naming import held_tensors, spoken
from passes.graphs.record import version

_Marks = dict[str, tuple[Tensor, int]]


@dataclass(frozen=True)
class Given:
    """The modules among the arguments of some calls, and what their tensors were then."""

    marks: Mapping[nn.Module, _Marks]

    @staticmethod
    def of(calls: Iterable[Call]) -> Given:
        """Those of `calls`, as they are now."""
        return Given({leaf: _marks(leaf) for call in calls for leaf in call.leaves if isinstance(leaf, nn.Module)})

    def objection(self, block: nn.Module, call: Call) -> str | None:
        """Why a block must not be given what it is: a module that has changed since."""
        for at, leaf in enumerate(call.leaves):
            if isinstance(leaf, nn.Module):
                changed = _changed(self.marks[leaf], _marks(leaf))
                if changed:
                    kind = type(leaf).__name__
                    return f"{spoken(block, call, at)} is a {kind} whose {changed} changes from call to call: pass that"
        return None


def _marks(module: nn.Module) -> _Marks:
    return {name: (tensor, version(tensor)) for name, tensor in held_tensors(module).items()}


def _changed(before: _Marks, after: _Marks) -> str | None:
    for name, (tensor, written) in after.items():
        if name not in before or before[name][0] is not tensor or before[name][1] != written:
            return name
    return next((name for name in before if name not in after), None)
