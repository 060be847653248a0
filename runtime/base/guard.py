"""The guard operator: the one opaque call that stands for a block in a glue graph.

``edit_compile::guard(Tensor[] inputs, int[] states, int block, int form=0) -> Tensor[]`` takes a block's tensor
inputs in plan order and gives its states after the block. `form` says in which of its forms the block is called
(`runtime.bundle.spec.Block.forms`); ANY leaves it to the shapes of the inputs, `any_but` to these among
all but some. Which dispatcher answers is set per thread and per task by `answering`, so that two compiled models never
see each other.

``edit_compile::checked(Tensor value, Tensor right, str told) -> Tensor`` gives a copy of `value`, or raises InputError
where `right` does not hold: of what values of the model's inputs tell, and no shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from runtime.base.errors import EditError, InputError

Answer = Callable[[int, Sequence[Tensor], int], list[Tensor]]
"""From a block's number, its inputs and its form to its states."""

ANY = -1
"""The form that goes by the shapes of the inputs: the model's own Python may call a block with others each time."""


def any_but(forms: Iterable[int]) -> int:
    """The form that goes by the shapes of the inputs, and is none of `forms`: ANY, or a number below it."""
    bits = sum(1 << form for form in set(forms))
    if bits.bit_length() > _MOST:
        raise EditError(f"a block is called in more than {_MOST} forms: compile the model anew for those still needed")
    return ANY - bits


def admits(form: int, number: int) -> bool:
    """Whether the form `number` is none that the guard's `form`, where this is ANY or below, leaves out."""
    return form >= 0 or not (ANY - form) >> number & 1


_MOST = 62  # bits of an operator's integer

_answer: ContextVar[Answer] = ContextVar("edit_compile_guard")
_check: ContextVar[Callable[[Tensor, str], None]] = ContextVar("edit_compile_check")
_library = torch.library.Library("edit_compile", "DEF")
_library.define("guard(Tensor[] inputs, int[] states, int block, int form=0) -> Tensor[]")


def _guard(inputs: Sequence[Tensor], states: Sequence[int], block: int, form: int = 0) -> list[Tensor]:
    return _answer.get()(block, inputs, form)


def _fake_guard(inputs: Sequence[Tensor], states: Sequence[int], block: int, form: int = 0) -> list[Tensor]:
    return [torch.empty_like(inputs[index]) for index in states]


_library.impl("guard", _guard, "CompositeExplicitAutograd")
torch.library.register_fake("edit_compile::guard", _fake_guard, lib=_library)

guard = torch.ops.edit_compile.guard.default


def refuse_unless(right: Tensor, told: str) -> None:
    """InputError where `right` does not hold. Synchronises with the device."""
    if not right:
        raise InputError(told)


def _checked(value: Tensor, right: Tensor, told: str) -> Tensor:
    _check.get(refuse_unless)(right, told)
    return value.clone()


_library.define("checked(Tensor value, Tensor right, str told) -> Tensor")
_library.impl("checked", _checked, "CompositeExplicitAutograd")
torch.library.register_fake("edit_compile::checked", lambda value, right, told: torch.empty_like(value), lib=_library)

checked = torch.ops.edit_compile.checked.default


@contextmanager
def answering(answer: Answer, check: Callable[[Tensor, str], None] = refuse_unless) -> Iterator[None]:
    """Let `answer(block, inputs, form) -> states` serve the guards run inside the ``with`` block.

    `check` looks at what is checked there.
    """
    token, other = _answer.set(answer), _check.set(check)
    try:
        yield
    finally:
        _answer.reset(token)
        _check.reset(other)
