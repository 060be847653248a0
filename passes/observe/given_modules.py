"""Modules that blocks are given as arguments (rotary tables), whose tensors become constants of the blocks' graphs.

They must not change from call to call: a tensor is the same while it is the same object, and not written to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from passes.graphs.graph import Call
from passes.graphs.naming import held_tensors, spoken
from passes.graphs.record import version

Marks = dict[str, tuple[Tensor, int]]


@dataclass(frozen=True)
class Given:
    """The modules among the arguments of some calls, and what their tensors were then."""

    marks: Mapping[nn.Module, Marks]

    @staticmethod
    def of(calls: Iterable[Call]) -> Given:
        """Those of `calls`, as they are now."""
        return Given({leaf: marks_of(leaf) for call in calls for leaf in call.leaves if isinstance(leaf, nn.Module)})

    def objection(self, block: nn.Module, call: Call, written: Mapping[int, str]) -> str | None:
        """Why a block must not be given what it is: a module that has changed since, or was `written` to meanwhile."""
        for at, leaf in enumerate(call.leaves):
            if isinstance(leaf, nn.Module):
                changed = first_changed(self.marks[leaf], marks_of(leaf))
                changed = changed or next((written[id(one)] for one in leaf.modules() if id(one) in written), None)
                if changed:
                    kind = type(leaf).__name__
                    return f"{spoken(block, call, at)} is a {kind} whose {changed} changes from call to call: pass that"
        return None


def marks_of(module: nn.Module) -> Marks:
    """Which tensors `module` and its children hold beside parameters, and how often each was written to."""
    return {name: (tensor, version(tensor)) for name, tensor in held_tensors(module).items()}


@contextmanager
def noting_writes() -> Iterator[dict[int, str]]:
    """Inside the ``with`` block, the attribute that was set last on each module, by the module's id."""
    noted: dict[int, str] = {}
    own = nn.Module.__setattr__

    def noting(module: nn.Module, name: str, value: Any) -> None:
        noted[id(module)] = name
        own(module, name, value)

    nn.Module.__setattr__ = noting  # type: ignore[method-assign, assignment]
    try:
        yield noted
    finally:
        nn.Module.__setattr__ = own  # type: ignore[method-assign]


def first_changed(before: Marks, after: Marks) -> str | None:
    """The name of a tensor that is another one now, or was written to; None where all are as they were."""
    for name, (tensor, written) in after.items():
        if name not in before or before[name][0] is not tensor or before[name][1] != written:
            return name
    return next((name for name in before if name not in after), None)
