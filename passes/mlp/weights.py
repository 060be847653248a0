"""A block at several MLP widths over one copy of its weights (equation 16).

A width s keeps the first k(s) = ceil(s H / a) a (at most H) of a site's H hidden channels, a being the
alignment. Every narrowed weight is stored in pieces such that a width is a prefix of the first dimension:

    producer  W1 [H, D] as it is; a packed gate [2H, D] as two pieces [H, D]
    consumer  W2 [D, H] transposed, [H, D]; over cat(attention, hidden) one piece [A + H, D], prefix A + k

so that W1[:, :k] and W2[:k, :] of the equation are the same memory at every width. The graphs are
rewritten by passes.mlp.rewrite.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from passes.graphs.graph import BlockGraph, MlpSite, PlanGraph, Report, Slot, WeightPiece
from passes.mlp.channels import Channels
from passes.mlp.rewrite import narrow
from passes.mlp.rules import trace_channels

NAME = "widths"


def site_rows(hidden: int, width: float, alignment: int = 1) -> int:
    """How many of `hidden` channels a width keeps: rounded up to the alignment, at most all."""
    return min(hidden, math.ceil(width * hidden / alignment - 1e-9) * alignment)


def at_widths(
    block: BlockGraph, sites: Sequence[MlpSite], widths: Sequence[float], alignment: int = 1
) -> tuple[PlanGraph, Report]:
    """The block's graph at every width; a block without sites has the full one alone.

    Raises:
        ValueError: widths do not ascend within (0, 1] to 1, or the sites are not sites of this block.
    """
    chosen = tuple(widths) if sites else (1.0,)
    _check_widths(widths)
    channels = trace_channels(block)
    rows = [tuple(site_rows(site.hidden, width, alignment) for width in chosen) for site in sites]
    pieces = tuple(_pieces(block, channels, sites, rows, len(chosen)))
    variants = tuple(
        narrow(block, channels, _kept(channels, sites, [row[v] for row in rows]), pieces, v) for v in range(len(chosen))
    )
    done = (_line(width, sites, [row[v] for row in rows]) for v, width in enumerate(chosen))
    return PlanGraph(block, chosen, pieces, variants), Report(NAME, tuple(done))


def _check_widths(widths: Sequence[float]) -> None:
    ascending = all(one < other for one, other in pairwise(widths))
    if not widths or not ascending or widths[0] <= 0 or widths[-1] != 1:
        raise ValueError(f"widths must ascend within (0, 1] to 1, not {tuple(widths)}")


def _kept(channels: Channels, sites: Sequence[MlpSite], rows: Sequence[int]) -> npt.NDArray[np.bool_]:
    """Which elements a variant keeps: all but the last hidden channels of every slot, and only those."""
    slots = np.ones(len(channels.root), dtype=np.bool_)
    for site, count in zip(sites, rows, strict=True):
        for slot in site.slots:
            slots[channels.of(slot.weight, slot.dim)[slot.start + count : slot.start + slot.size]] = False
    classes = np.ones(len(channels.root), dtype=np.bool_)
    classes[channels.root[~slots]] = False
    kept: npt.NDArray[np.bool_] = classes[channels.root]
    if not np.array_equal(kept, slots) or any(not classes[cls] for cls in channels.reasons):
        raise ValueError("these sites would drop channels that others of the block need")
    return kept


def _pieces(
    block: BlockGraph, channels: Channels, sites: Sequence[MlpSite], rows: Sequence[tuple[int, ...]], count: int
) -> Iterator[WeightPiece]:
    """The pieces of all weights, in the order of the block's weights."""
    found: dict[str, list[tuple[Slot, tuple[int, ...]]]] = {}
    for site, row in zip(sites, rows, strict=True):
        for slot in site.slots:
            found.setdefault(slot.weight, []).append((slot, row))
    for weight in block.weights:
        shape = channels.shapes[weight]
        if weight in found:
            yield from _cut(weight, shape, sorted(found[weight], key=lambda item: item[0].start), count)
        else:
            size = shape[0] if shape else 1
            yield WeightPiece(weight, weight, 0, 0, size, False, (size,) * count)


def _cut(
    weight: str, shape: tuple[int, ...], slots: Sequence[tuple[Slot, tuple[int, ...]]], count: int
) -> list[WeightPiece]:
    """Cut one weight after every slot; channels before a slot share its piece in a consumer only."""
    dim = slots[0][0].dim
    ranges: list[tuple[int, int, tuple[int, ...]]] = []
    start = 0
    for slot, row in slots:
        ahead = slot.start - start
        if dim == 0 and ahead:
            ranges.append((start, ahead, (ahead,) * count))
            start, ahead = slot.start, 0
        ranges.append((start, ahead + slot.size, tuple(ahead + kept for kept in row)))
        start = slot.start + slot.size
    if start < shape[dim]:
        ranges.append((start, shape[dim] - start, (shape[dim] - start,) * count))
    names = [weight] if len(ranges) == 1 else [f"{weight}_piece{index}" for index in range(len(ranges))]
    return [
        WeightPiece(name, weight, dim, begin, size, dim != 0, row)
        for name, (begin, size, row) in zip(names, ranges, strict=True)
    ]


def _line(width: float, sites: Sequence[MlpSite], rows: Sequence[int]) -> str:
    kept = ", ".join(f"{row} of {site.hidden}" for site, row in zip(sites, rows, strict=True))
    return f"width {width:g}: {kept or 'no'} hidden channels"
