"""Standing between an object and those who call it, for the time of a ``with`` block."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Around = Callable[..., Any]
"""Called with the method that it stands before, then the method's arguments; returns what the caller gets."""


@contextmanager
def attribute_wrapped(owner: Any, name: str, around: Around) -> Iterator[None]:
    """Calls of ``owner.name`` go to `around`. The object is given an attribute of its own: its type stays."""
    own = vars(owner)
    before = own.get(name)
    own[name] = functools.partial(around, getattr(owner, name))
    try:
        yield
    finally:
        if before is None:
            del own[name]
        else:
            own[name] = before


@contextmanager
def method_overridden(owner: Any, name: str, around: Around) -> Iterator[None]:
    """Calls of the method `name` of `owner` go to `around`, those by syntax (``owner(...)``) too.

    The object is given a subclass of its type, by the same name. A copy of the object has that type as well, and is
    left alone: an attribute would bind the copy's method to the original. TypeError where the type cannot be changed.
    """
    kind = type(owner)
    method = getattr(kind, name)

    @functools.wraps(method)
    def override(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is not owner:
            return method(self, *args, **kwargs)
        return around(functools.partial(method, self), *args, **kwargs)

    body = {name: override, "__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    owner.__class__ = types.new_class(kind.__name__, (kind,), exec_body=lambda namespace: namespace.update(body))
    try:
        yield
    finally:
        owner.__class__ = kind
