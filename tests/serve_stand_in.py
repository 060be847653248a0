"""A sampler without a model, whose calls a test lets through one by one."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

from examples.serve.jobs import Ask, Refused


@dataclass(frozen=True)
class Count:
    """A drawing that counts its steps."""

    name: str
    ask: Ask
    step: int = 0

    @property
    def done(self) -> bool:
        return self.step == self.ask.steps


class Counting:
    """Draws (label, seed, steps); `calls` has who was in each call, at which step; `ended` whose residuals went.

    Calls with a job of a tier named "bad" raise. While `gated`, each call waits for `let_through`.
    """

    most_together = 16

    def __init__(self, gated: bool = False) -> None:
        self.calls: list[list[tuple[str, int]]] = []
        self.ended: list[str] = []
        self.gated = gated
        self._gate = threading.Semaphore(0)
        self._reached = threading.Semaphore(0)
        self._passed = threading.Semaphore(0)

    def let_through(self, calls: int = 1) -> None:
        """Wait until a call is there, and let it go on until it is in `calls`; so many times."""
        for _ in range(calls):
            assert self._reached.acquire(timeout=30)
            self._gate.release()
            assert self._passed.acquire(timeout=30)

    def open(self) -> None:
        """Let all calls through from now on."""
        self.gated = False
        self._gate.release()

    def wait_for_call(self) -> None:
        """Return when a call stands at the gate; it stays there."""
        assert self._reached.acquire(timeout=30)
        self._reached.release()

    def check(self, ask: Ask) -> Ask:
        if ask.tier not in (None, "bad", "unusable"):
            raise Refused(f"no tier is called {ask.tier!r}")
        return replace(ask, steps=ask.steps or 3)

    def begin(self, name: str, ask: Ask) -> Count:
        if ask.tier == "unusable":
            raise ValueError("cannot begin")
        return Count(name, ask)

    def advance(self, drawings: Sequence[Count]) -> list[Count]:
        if self.gated:
            self._reached.release()
            assert self._gate.acquire(timeout=30)
        self.calls.append([(drawing.name, drawing.step) for drawing in drawings])
        self._passed.release()
        if any(drawing.ask.tier == "bad" and drawing.step == 1 for drawing in drawings):
            raise ArithmeticError("one of these is bad")
        return [replace(drawing, step=drawing.step + 1) for drawing in drawings]

    def image(self, drawing: Count) -> tuple[int, int, int | None]:
        return drawing.ask.label, drawing.ask.seed, drawing.ask.steps

    def flops_share(self, drawing: Count) -> float:
        return 1.0

    def end(self, name: str) -> None:
        self.ended.append(name)
