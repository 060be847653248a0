"""What a compiled transformer is compared with its model on: few calls in which every plan runs at every width."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def mixed_widths(plans: Sequence[tuple[str, ...]], widths: Sequence[float]) -> list[tuple[float, ...]]:
    """A width for each block, as often as it takes for every plan to run at all `widths`.

    The k-th of n blocks with the same `plans` has width k + r n, counted around, in round r.
    """
    alike = Counter(plans)
    rounds = max(-(-len(widths) // count) for count in alike.values())
    nth = [plans[:at].count(own) for at, own in enumerate(plans)]
    return [
        tuple(widths[(k + turn * alike[own]) % len(widths)] for k, own in zip(nth, plans, strict=True))
        for turn in range(rounds)
    ]
