"""What is being done with a model, shown on a terminal's standard error where it takes more than two seconds."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from passes.graphs.progress import telling

_PATIENCE = 2.0
log = logging.getLogger(__name__)


@contextmanager
def shown(title: str, console: Console | None = None) -> Iterator[None]:
    """Inside the ``with`` block the passes' work is shown under `title`; elsewhere than on a terminal it is logged."""
    console = console or Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task(title, total=None)

    def progress(what: str, done: int, total: int) -> None:
        log.info("%s: %s (%d of %d)", title, what, done, total)
        bar.update(task, description=f"{title}: {what}", completed=done, total=total)

    timer = threading.Timer(_PATIENCE, bar.start)
    timer.daemon = True
    timer.start()
    try:
        with telling(progress):
            yield
    finally:
        timer.cancel()
        timer.join()
        bar.stop()
