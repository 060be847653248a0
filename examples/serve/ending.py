"""Whether the server ends, as all of its processes on this machine see at once: by a file, not by a message.

A message to the replicas goes from the process that got the signal through Ray to the loop of each replica, which waits
behind whatever is computed there. A file is looked up by the replica before it takes a job, so none is taken after.
"""

from __future__ import annotations

from pathlib import Path


class Ending:
    """The end of the server whose processes share `folder`."""

    def __init__(self, folder: str | Path) -> None:
        self._file = Path(folder) / "ending"

    def begin(self) -> None:
        """From now on `begun` is true, in every process."""
        self._file.touch()

    def begun(self) -> bool:
        """Whether it has begun."""
        return self._file.exists()
