"""Find the MLPs of a block whose hidden channels may be narrowed (equations 13 and 16).

An MLP is y = W2 a + b2 with a[j] a function of hidden channel j alone, made by linear maps:
a = act(W1 x + b1), a = (V1 x) act(V2 x), or any composition of operators that keep channels apart.
Dropping channel j from every weight of its class (passes.mlp.channels) then equals zeroing a[j], and the
first s H channels are the first s H input columns of W2.

A site is a run of input columns of a contraction whose classes are shifted copies of each other
(column j+1 is tied to the neighbours of what column j is tied to), not poisoned, made by a linear map,
with an activation on the way, and contracted at least once from a tensor that carries the tokens of a
state: an MLP of the timestep alone is left as it is.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from passes.graphs.graph import BlockGraph, MlpSite, Refusal, Report, Slot
from passes.mlp.channels import Channels
from passes.mlp.rules import trace_channels

NAME = "mlp"


def find_sites(block: BlockGraph) -> tuple[tuple[MlpSite, ...], Report]:
    """All MLPs of the block that may be narrowed; every other contraction is refused with its reason."""
    channels = trace_channels(block)
    places = _Places(channels)
    sites: list[MlpSite] = []
    refused: list[Refusal] = []
    claimed: dict[str, int] = {}
    seen: set[int] = set()
    for weight in dict.fromkeys(contraction.weight for contraction in channels.contractions):
        reasons: dict[str, None] = {}
        for run in _runs(channels, places, weight):
            cls = int(channels.root[run.members[0]])
            if cls in seen:
                continue
            site = _site(block, channels, places, run)
            reason = _against(channels, site, cls) or _conflict(site, claimed)
            if reason:
                reasons[reason] = None
                continue
            seen.add(cls)
            claimed.update((slot.weight, slot.dim) for slot in site.slots)
            sites.append(site)
        refused += [Refusal(block.weights[weight], reason) for reason in reasons]
    return tuple(sites), Report(NAME, tuple(_line(site) for site in sites), tuple(refused))


@dataclass(frozen=True)
class _Run:
    """`size` adjacent columns of a contraction; `members` are all elements in the first one's class."""

    members: tuple[int, ...]
    size: int


class _Places:
    """Where an element lies: (weight, dimension, channel)."""

    def __init__(self, channels: Channels) -> None:
        flat = [
            (base, weight, dim)
            for weight, bases in channels.bases.items()
            for dim, base in enumerate(bases)
            if channels.shapes[weight][dim]
        ]
        self._bases = [base for base, _, _ in flat]
        self._names = [(weight, dim) for _, weight, dim in flat]
        self.contracted = {(contraction.weight, contraction.dim) for contraction in channels.contractions}
        self._order = np.argsort(channels.root, kind="stable")
        self._sorted = channels.root[self._order]

    def slot(self, element: int, size: int) -> Slot:
        """The slot of `size` channels that starts at an element."""
        index = bisect_right(self._bases, element) - 1
        return Slot(*self._names[index], element - self._bases[index], size)

    def members(self, root: int) -> tuple[int, ...]:
        """All elements of a class, ascending."""
        low, high = np.searchsorted(self._sorted, (root, root + 1))
        return tuple(self._order[low:high].tolist())

    def adjacent(self, members: tuple[int, ...], following: tuple[int, ...]) -> bool:
        """Whether every member of one class has its next neighbour, on the same weight, in the other."""
        return len(members) == len(following) and all(
            other == one + 1 and bisect_right(self._bases, one) == bisect_right(self._bases, other)
            for one, other in zip(members, following, strict=True)
        )


def _runs(channels: Channels, places: _Places, weight: str) -> Iterator[_Run]:
    """Maximal runs of adjacent columns; poisoned columns that share a reason make one run."""
    roots = channels.root[channels.of(weight, 1)].tolist()
    reasons = channels.reasons
    first = last = places.members(roots[0])
    size = 1
    for previous, root in pairwise(roots):
        members = places.members(root)
        both_poisoned = root in reasons and reasons[root] == reasons.get(previous)
        alive = root not in reasons and previous not in reasons
        if both_poisoned or (alive and places.adjacent(last, members)):
            size += 1
        else:
            yield _Run(first, size)
            first, size = members, 1
        last = members
    yield _Run(first, size)


def _site(block: BlockGraph, channels: Channels, places: _Places, run: _Run) -> MlpSite:
    slots = tuple(places.slot(member, run.size) for member in run.members)
    contractions = tuple(slot for slot in slots if (slot.weight, slot.dim) in places.contracted)
    names: Mapping[str, str] = {slot.weight: block.weights[slot.weight] for slot in slots}
    return MlpSite(run.size, slots, contractions, names)


def _against(channels: Channels, site: MlpSite, cls: int) -> str | None:
    """Why the columns of a class are no MLP, or None."""
    if cls in channels.reasons:
        return f"a channel that it contracts {channels.reasons[cls]}"
    if not channels.produced[cls]:
        return "no linear map of the block makes the channels that it contracts"
    if not channels.activated[cls]:
        return "no activation acts on the channels that it contracts"
    if site.hidden < 2:
        return "the channels that it contracts are tied to each other"
    ends = {slot.weight for slot in site.contractions}
    if not any(contraction.tokens for contraction in channels.contractions if contraction.weight in ends):
        return "the channels that it contracts carry no tokens of a state"
    return None


def _conflict(site: MlpSite, claimed: Mapping[str, int]) -> str | None:
    dims = dict(claimed)
    for slot in site.slots:
        if dims.setdefault(slot.weight, slot.dim) != slot.dim:
            return f"{site.weight_names[slot.weight]} would be narrowed along two dimensions"
    return None


def _line(site: MlpSite) -> str:
    ends = ", ".join(dict.fromkeys(site.weight_names[slot.weight] for slot in site.contractions))
    starts = ", ".join(dict.fromkeys(site.weight_names[slot.weight] for slot in site.slots if slot.dim == 0))
    return f"{site.hidden} hidden channels from {starts} to {ends}"
