"""Processes that a test started, by Linux's /proc."""

from __future__ import annotations

from pathlib import Path


def descendants(process: int) -> set[int]:
    """Children of `process`, theirs, and so on."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        told = _stat(int(folder.name))
        if told is not None:
            parents[int(folder.name)] = int(told[1])
    found, new = set[int](), {process}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return found


def alive(process: int) -> bool:
    """Whether it runs; one that has ended and is not yet collected by its parent does not."""
    told = _stat(process)
    return told is not None and told[0] not in "ZX"


def _stat(process: int) -> list[str] | None:
    """State, parent and so on; None where there is no such process."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
