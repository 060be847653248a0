"""Errors that the runtime raises for what a user can put right; each message says how."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class EditError(Exception):
    """Base of the errors of a compiled transformer."""


class BundleError(EditError):
    """A bundle cannot be read or written; the message names the file and what to do."""


class EngineError(EditError):
    """An engine cannot run this program here; the message names one that can."""


class PolicyError(EditError, ValueError):
    """A routing policy or schedule makes no sense, or does not fit the call."""


class InputError(EditError, ValueError):
    """An argument of a compiled transformer's forward is missing, unknown or unusable."""


class ShapeError(InputError):
    """The input shapes (or constants) are none of those that were compiled."""


class InnerShapeError(ShapeError):
    """A block was called with other shapes than it was compiled for: they depend on what its model's inputs hold."""


class BusyError(EditError):
    """The same request is running in another thread."""


class NotFiniteError(EditError):
    """A step gives NaN or infinity where the model at full width does not, or nothing can be decided for that."""


class RecordError(EditError):
    """Steps cannot be recorded, to be replayed on the device, of this program here; the message says why."""


@contextmanager
def inside(what: str) -> Iterator[None]:
    """Around work of the graph `what`, whose name is noted on an exception that comes out (see `where`)."""
    try:
        yield
    except Exception as error:
        error.add_note(f"{_IN}{what}")
        raise


def where(error: BaseException) -> str:
    """The innermost graph that `error` came out of, as `inside` noted it; "" where it was none."""
    notes = [note for note in getattr(error, "__notes__", ()) if note.startswith(_IN)]
    return notes[0].removeprefix(_IN) if notes else ""


_IN = "in the graph "


def refuse_infinite(names: Sequence[str]) -> None:
    """InputError that names the inputs, if any, that are not finite."""
    if names:
        raise InputError(f"input {', '.join(names)} holds NaN or infinity")
