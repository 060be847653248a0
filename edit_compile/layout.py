"""Where a model's blocks are and which parts of them routers read and narrow: found in its graphs, stored as data."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

log = logging.getLogger(__name__)


class ElasticError(ValueError):
    """A model cannot be made elastic, or is not called as it was found: the message says where and why."""


@dataclass(frozen=True)
class MaskedInput:
    """Hidden channels of one MLP at the input of its down-projection.

    `module` is the down-projection's name inside the block; channels start .. start + hidden of its input, along
    dimension `dim` (counted from the end for a linear, -1; 1 for a convolution), are the MLP's hidden channels in order.
    """

    module: str
    start: int
    hidden: int
    dim: int = -1


@dataclass(frozen=True)
class BlockLayout:
    """One block of the model.

    `name` is its qualified name. `leaves` is how many leaves a call's (args, kwargs) have; `states` pairs (output leaf,
    input leaf) of each token stream, `dim` is D. `time` is the input leaf of the time embedding (B, `time_dim`), None
    where the router gets a sinusoidal embedding of the timestep, `time_dim` channels wide.
    """

    name: str
    leaves: int
    states: tuple[tuple[int, int], ...]
    dim: int
    time: int | None
    time_dim: int
    masks: tuple[MaskedInput, ...]


@dataclass(frozen=True)
class Layout:
    """All blocks in execution order; `timestep` is the keyword of the model's forward that holds the timestep."""

    timestep: str
    blocks: tuple[BlockLayout, ...]

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Layout:
        """Read what `dataclasses.asdict` and JSON made of a layout."""
        blocks = tuple(
            BlockLayout(
                **{
                    **block,
                    "states": tuple((int(a), int(b)) for a, b in block["states"]),
                    "masks": tuple(MaskedInput(**mask) for mask in block["masks"]),
                }
            )
            for block in data["blocks"]
        )
        return Layout(timestep=data["timestep"], blocks=blocks)


def find_layout(model: nn.Module, inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]], time_dim: int) -> Layout:
    """Run the passes on `model` called with `inputs`, and keep what routers need.

    Raises:
        ElasticError: no block was found; the message lists what was refused and why.
    """
    from passes.dedupe import group_blocks
    from passes.discover import discover
    from passes.export import export_block
    from passes.mlp import find_sites
    from passes.states import find_states

    discovery, report = discover(model, inputs)
    if not discovery.blocks:
        reasons = "; ".join(f"{refusal.where}: {refusal.reason}" for refusal in report.refused) or "no candidates"
        raise ElasticError(f"no elastic block found in {type(model).__name__} ({reasons})")
    layouts: dict[str, BlockLayout] = {}
    for group in group_blocks(discovery.blocks):
        first = group[0]
        states, _ = find_states(first)
        graph, _ = export_block(first, states, discovery.runs)
        sites, site_report = find_sites(graph)
        for refusal in site_report.refused:
            log.info("%s: MLP site refused at %s: %s", first.name, refusal.where, refusal.reason)
        masks = tuple(mask for site in sites for mask in _masks(first.module, graph.weights, site))
        for block in group:
            layouts[block.name] = _block_layout(block, states.pairs, masks, time_dim)
    return Layout(discovery.timestep, tuple(layouts[block.name] for block in discovery.blocks))


def _block_layout(block: Any, pairs: Any, masks: tuple[MaskedInput, ...], time_dim: int) -> BlockLayout:
    leaves = block.calls[0].leaves
    streams = [leaves[source] for _, source in pairs]
    widths = {stream.shape[-1] for stream in streams}
    if len(widths) != 1 or any(stream.ndim != 3 for stream in streams):
        shapes = [tuple(stream.shape) for stream in streams]
        raise ElasticError(f"{block.name}: streams {shapes} are not (B, L, D) of one D, so that no router can read them")
    time = leaves[block.time].shape[-1] if block.time is not None else time_dim
    return BlockLayout(block.name, len(leaves), tuple(pairs), widths.pop(), block.time, int(time), masks)


def _masks(block: nn.Module, weights: Mapping[str, str], site: Any) -> list[MaskedInput]:
    found = []
    for slot in site.contractions:
        name = site.weight_names.get(slot.weight) or weights[slot.weight]
        owner, _, _ = name.rpartition(".")
        module = block.get_submodule(owner)
        weight: Tensor = block.get_parameter(name)
        if slot.dim != 1 or not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            raise ElasticError(
                f"{name} ({type(module).__name__}, {tuple(weight.shape)}): a down-projection must be an nn.Linear or "
                "nn.Conv module whose input channels are dimension 1 of its weight, for its input to be masked"
            )
        found.append(MaskedInput(owner, slot.start, slot.size, -1 if isinstance(module, nn.Linear) else 1))
    return found
