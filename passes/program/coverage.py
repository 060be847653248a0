"""How much of a model's work is in guarded blocks, and which lists of modules with much of it are left alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from passes.program.compilation import Compilation

_MUCH = 0.1
"""Share of the FLOPs from which a list that is left alone is spoken of."""


@dataclass(frozen=True)
class Part:
    """A list of modules: how many of them, their share of the model's FLOPs, and why they are not guarded, if so."""

    name: str
    count: int
    share: float
    reason: str | None = None


@dataclass(frozen=True)
class Coverage:
    """The lists with guarded blocks, and those without; `model` is the model's class."""

    model: str
    guarded: tuple[Part, ...]
    left: tuple[Part, ...]

    @property
    def share(self) -> float:
        """Share of the FLOPs in guarded blocks."""
        return sum(part.share for part in self.guarded)

    @property
    def warning(self) -> str | None:
        """What to say of lists with much of the work that are left alone; None where there are none."""
        much = [part for part in self.left if part.share >= _MUCH]
        told = "; ".join(f"{part.name} ({part.share:.0%}): {part.reason}" for part in much)
        return f"guards {self.share:.0%} of the FLOPs of {self.model}; always computed: {told}" if much else None

    @staticmethod
    def of(compilation: Compilation) -> Coverage:
        """What the blocks that are accepted so far cover."""
        work, guarded = compilation.discovery.work, [site.name for site in compilation.discovery.blocks]
        total = max(work.total, 1)
        inside = {n: sum(work.candidates.get(one, 0) for one in guarded if _in(one, n)) for n in work.candidates}
        outer = [name for name in work.candidates if not any(_in(name, other) for other in work.candidates)]
        left = [name for name in outer if name not in guarded]
        reasons = {refusal.where: refusal.reason for report in compilation.reports for refusal in report.refused}
        return Coverage(
            type(compilation.discovery.model).__name__,
            tuple(_parts([(name, work.candidates.get(name, 0) / total, None) for name in guarded])),
            tuple(
                _parts([(n, (work.candidates[n] - inside[n]) / total, _reason(n, reasons)) for n in left]),
            ),
        )


def _parts(entries: list[tuple[str, float, str | None]]) -> Iterator[Part]:
    """Entries (name, share, reason) by the list that they are in, in order."""
    lists: dict[str, list[tuple[float, str | None]]] = {}
    for name, share, reason in entries:
        lists.setdefault(name.rpartition(".")[0] or name, []).append((share, reason))
    for name, own in lists.items():
        yield Part(name, len(own), sum(share for share, _ in own), next((why for _, why in own if why), None))


def _reason(name: str, reasons: dict[str, str]) -> str:
    found = next((why for where, why in reasons.items() if _in(where, name) or where == name), "was not found")
    return found.removeprefix(f"{name}: ")


def _in(name: str, outer: str) -> bool:
    return name.startswith(f"{outer}.")
