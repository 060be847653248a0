"""How far a model is on its way through the passes, for whoever looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Progress = Callable[[str, int, int], object]
"""Is told what is being done, how much of it is done, and how much there is."""

_looking: ContextVar[Progress | None] = ContextVar("edit_compile_progress", default=None)


def tell(what: str, done: int, total: int) -> None:
    """Tell whoever looks that of `total` parts of the work `what`, `done` are done."""
    progress = _looking.get()
    if progress is not None:
        progress(what, done, total)


@contextmanager
def telling(progress: Progress) -> Iterator[None]:
    """Inside the ``with`` block `progress` is told, in this thread."""
    token = _looking.set(progress)
    try:
        yield
    finally:
        _looking.reset(token)
