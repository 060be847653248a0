"""The hidden channels of a model's MLPs: which parts of which weights hold them, and where they are contracted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from passes.graphs.graph import BlockGraph, MlpSite, Slot
from passes.program.compilation import Compilation

Holder = tuple[int, str]
"""A module, by its id, and the name that it has for a tensor."""


@dataclass(frozen=True)
class Part:
    """Channels start .. start + size along `dim` of a weight: hidden channels 0 .. size, in order."""

    weight: Tensor
    dim: int
    start: int
    size: int
    holder: Holder

    @property
    def key(self) -> tuple[int, int, int, int]:
        """What tells parts apart."""
        return id(self.weight), self.dim, self.start, self.size

    def values(self) -> Tensor:
        """A view of the channels."""
        return self.weight.detach().narrow(self.dim, self.start, self.size)

    def take(self, order: Tensor) -> None:
        """Write into channel i what channel order[i] holds."""
        values = self.values()
        values.copy_(values.index_select(self.dim, order.to(values.device)))


@dataclass(frozen=True)
class Contracted:
    """Where hidden channels are contracted: by `part` of the weight of `module`, a linear or a convolution."""

    module: nn.Module
    part: Part

    def rows(self, value: Tensor) -> Tensor:
        """The hidden channels of the module's input, (numbers of each channel, H), as a view or a copy."""
        dim = -1 if isinstance(self.module, nn.Linear) else 1
        channels = value.narrow(dim, self.part.start, self.part.size)
        return channels.movedim(dim, -1).flatten(0, -2)

    def lengths(self) -> Tensor:
        """Squared norm of what the weight makes of each channel, (H,) float64 on the CPU."""
        columns = self.part.values().movedim(self.part.dim, 0).flatten(1)
        return columns.to("cpu", torch.float64).square().sum(1)


@dataclass(frozen=True)
class HiddenChannels:
    """The H hidden channels of an MLP: all `parts` of weights that are ordered together.

    `name` is that of its first down-projection in the model; `size` is H; `reason` says why its channels have to stay
    where they are, None where they may be ordered.
    """

    name: str
    size: int
    parts: tuple[Part, ...]
    contracted: tuple[Contracted, ...]
    reason: str | None = None

    def take(self, order: Tensor) -> None:
        """Put channel order[i], of all weights, at place i."""
        for part in {part.key: part for part in self.parts}.values():
            part.take(order)


def hidden_channels(model: nn.Module, compilation: Compilation) -> tuple[HiddenChannels, ...]:
    """All MLPs that the passes found in `model`, in order of execution; each once, also where blocks share it."""
    found: dict[frozenset[tuple[int, ...]], HiddenChannels] = {}
    for block, owner in zip(compilation.blocks, compilation.group_of, strict=True):
        group = compilation.groups[owner]
        for site in group.sites:
            own = _of_site(block.name, model.get_submodule(block.name), group.graph, site)
            key = frozenset(part.key for part in own.parts) or frozenset({(len(found), 0, 0, 0)})
            other = found.get(key)
            found[key] = own if other is None else _joined(other, own)
    holders = _holders(model)
    return tuple(_checked(channels, holders) for channels in found.values())


def _of_site(name: str, block: nn.Module, graph: BlockGraph, site: MlpSite) -> HiddenChannels:
    names = {slot.weight: site.weight_names.get(slot.weight) or graph.weights[slot.weight] for slot in site.slots}
    first = f"{name}.{names[site.contractions[0].weight].rpartition('.')[0]}"
    strange = [told for told in names.values() if _held(block, told) is None]
    if strange:
        return HiddenChannels(first, site.hidden, (), (), f"{strange[0]} is no parameter of the block")
    contracted = tuple(
        Contracted(block.get_submodule(names[slot.weight].rpartition(".")[0]), _part(block, names[slot.weight], slot))
        for slot in site.contractions
    )
    odd = [one for one in contracted if not isinstance(one.module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    reason = f"{type(odd[0].module).__name__} is neither an nn.Linear nor an nn.Conv" if odd else None
    parts = tuple(_part(block, names[slot.weight], slot) for slot in site.slots)
    return HiddenChannels(first, site.hidden, parts, contracted, reason)


def _part(block: nn.Module, name: str, slot: Slot) -> Part:
    held = _held(block, name)
    assert held is not None
    return Part(held[0], slot.dim, slot.start, slot.size, held[1])


def _held(block: nn.Module, name: str) -> tuple[Tensor, Holder] | None:
    """The parameter or buffer of that name, and what holds it."""
    owner, _, own = name.rpartition(".")
    try:
        module: Any = block.get_submodule(owner)
    except AttributeError:
        return None
    tensor = module._parameters.get(own, module._buffers.get(own))
    return None if tensor is None else (tensor, (id(module), own))


def _joined(one: HiddenChannels, other: HiddenChannels) -> HiddenChannels:
    contracted = {(id(place.module), place.part.key): place for place in (*one.contracted, *other.contracted)}
    parts, reason = one.parts + other.parts, one.reason or other.reason
    return replace(one, parts=parts, contracted=tuple(contracted.values()), reason=reason)


def _holders(model: nn.Module) -> dict[int, set[Holder]]:
    """All places where each tensor of the model is held."""
    holders: dict[int, set[Holder]] = {}
    for module in model.modules():
        own: Iterable[Mapping[str, Tensor | None]] = (module._parameters, module._buffers)
        for name, tensor in (pair for tensors in own for pair in tensors.items()):
            if tensor is not None:
                holders.setdefault(id(tensor), set()).add((id(module), name))
    return holders


def _checked(channels: HiddenChannels, holders: Mapping[int, set[Holder]]) -> HiddenChannels:
    """The same, to stay where it is if one of its weights is used by something else too."""
    known = {part.holder for part in channels.parts}
    shared = any(holders[id(part.weight)] - known for part in channels.parts)
    if channels.reason is not None or not shared:
        return channels
    return replace(channels, reason="one of its weights is used elsewhere in the model too")
