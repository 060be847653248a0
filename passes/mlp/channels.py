"""Which channels of a block's tensors are tied to which channels of its weights.

Every channel of every weight (placeholder, dimension, index) is an element of one union-find. The graph
is walked forwards; each dimension of each tensor carries one element per channel, or FOREIGN where the
channels are not those of a weight. With u ~ v for "u and v are kept or dropped together":

    y = f(x, ..) elementwise      y[c] = x[c], and x[c] ~ z[c] for every operand z
    y = W x + b  (linear, conv)   y[i] = W[i, .], b[i] ~ W[i, .], x[j] ~ W[., j]
    cat, split, slice, permute, view that keeps the dimension: elements move with their channels

Whatever else touches a channel (a norm or a sum over it, attention, a residual, an output, an operator
without a rule) *poisons* its element, and with it the whole class, with the reason: a class may be
dropped in part only if every operator that sees it was understood. Dropping understood channels equals
zeroing them where they are contracted, because nothing else sees them.

Beside the elements, each dimension says whether it runs over tokens: over a dimension, other than the
first, of one of the block's states.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import fx

Elements = npt.NDArray[np.int64]
FOREIGN = -1


@dataclass(frozen=True)
class Dim:
    """One dimension of a tensor: its `elements` (None: all foreign) and whether it runs over tokens.

    `source` says in words where foreign channels come from.
    """

    elements: Elements | None = None
    tokens: bool = False
    source: str = ""


Dims = tuple[Dim, ...]


@dataclass(frozen=True)
class Contraction:
    """A sum over channels of an activation against dimension `dim` of a weight, at `node`."""

    node: fx.Node
    weight: str
    dim: int
    tokens: bool


@dataclass(frozen=True)
class Channels:
    """Result of the walk: classes of channels, and what is known of each.

    `bases[weight][dim]` is the element of channel 0. `root[e]` names the class of element e; the
    other arrays are indexed by root. `reasons` says for poisoned classes what poisoned them.
    `dims` maps each tensor node to its dimensions.
    """

    bases: Mapping[str, tuple[int, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    root: Elements
    reasons: Mapping[int, str]
    activated: npt.NDArray[np.bool_]
    produced: npt.NDArray[np.bool_]
    contractions: tuple[Contraction, ...]
    dims: Mapping[fx.Node, Dims]

    def of(self, weight: str, dim: int) -> Elements:
        """Elements of all channels of one dimension of a weight."""
        base = self.bases[weight][dim]
        return np.arange(base, base + self.shapes[weight][dim])


@dataclass
class Ledger:
    """What the walk writes down: ties, poison, activations, producers and contractions."""

    bases: dict[str, tuple[int, ...]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    count: int = 0
    ties: list[tuple[Elements, Elements]] = field(default_factory=list)
    poisoned: list[tuple[Elements, str]] = field(default_factory=list)
    activated: list[Elements] = field(default_factory=list)
    produced: list[Elements] = field(default_factory=list)
    contractions: list[Contraction] = field(default_factory=list)

    def enter(self, weight: str, shape: tuple[int, ...]) -> Dims:
        """New elements for every dimension of a weight."""
        self.shapes[weight] = shape
        dims, bases = [], []
        for size in shape:
            bases.append(self.count)
            dims.append(Dim(np.arange(self.count, self.count + size)))
            self.count += size
        self.bases[weight] = tuple(bases)
        return tuple(dims)

    def tie(self, one: Elements | None, other: Elements | None, reason: str) -> Elements | None:
        """Keep or drop `one` and `other` together; own channels tied to foreign ones are poisoned."""
        if one is None or other is None or len(one) != len(other):
            self.poison(one, reason)
            self.poison(other, reason)
            return None
        foreign = (one == FOREIGN) | (other == FOREIGN)
        self.poison(one[foreign], reason)
        self.poison(other[foreign], reason)
        self.ties.append((one[~foreign], other[~foreign]))
        return np.where(foreign, FOREIGN, one)

    def poison(self, elements: Elements | None, reason: str) -> None:
        """Never drop these channels, for this reason."""
        own = _own(elements)
        if len(own):
            self.poisoned.append((own, reason))

    def activate(self, elements: Elements | None) -> None:
        """Note that a nonlinearity was applied to these channels."""
        self.activated.append(_own(elements))

    def produce(self, elements: Elements | None) -> None:
        """Note that these channels are outputs of a linear map."""
        self.produced.append(_own(elements))

    def close(self, dims: Mapping[fx.Node, Dims]) -> Channels:
        """Solve the union-find."""
        root = _components(self.count, self.ties)
        reasons: dict[int, str] = {}
        for elements, reason in self.poisoned:
            for cls in np.unique(root[elements]):
                reasons.setdefault(int(cls), reason)
        return Channels(
            bases=self.bases,
            shapes=self.shapes,
            root=root,
            reasons=reasons,
            activated=_flags(root, self.activated),
            produced=_flags(root, self.produced),
            contractions=tuple(self.contractions),
            dims=dims,
        )


def _own(elements: Elements | None) -> Elements:
    if elements is None:
        return np.empty(0, dtype=np.int64)
    return elements[elements != FOREIGN]


def _flags(root: Elements, noted: list[Elements]) -> npt.NDArray[np.bool_]:
    flags = np.zeros(len(root), dtype=np.bool_)
    for elements in noted:
        flags[root[elements]] = True
    return flags


def _components(count: int, ties: list[tuple[Elements, Elements]]) -> Elements:
    """Smallest element of each connected component, by hooking larger roots onto smaller ones."""
    root = np.arange(count)
    if not ties:
        return root
    left = np.concatenate([one for one, _ in ties])
    right = np.concatenate([other for _, other in ties])
    while True:
        low = np.minimum(root[left], root[right])
        high = np.maximum(root[left], root[right])
        if np.array_equal(low, high):
            return root
        np.minimum.at(root, high, low)
        while not np.array_equal(root, root[root]):
            root = root[root]
