"""What became of a tier beside plain sampling steps."""

from __future__ import annotations

from enum import StrEnum


class Verdict(StrEnum):
    """Whether a tier is better than plain sampling steps in its time."""

    EQUAL = "equal"
    TIER = "the tier"
    UNDECIDED = "undecided"
    """The interval of the gain holds 0."""
    FEWER_STEPS = "STEPS INSTEAD"
    NOT_FASTER = "NOT FASTER"
    """All steps fit in its time."""
