"""Where a model's blocks are and which parts of them routers read and narrow: found in its graphs, stored as data."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from edit_compile.elastic.adapters import adapters_aside
from edit_compile.progress import shown
from passes.blocks.experts import dense_experts
from passes.graphs.batch_layout import Packing, Samples
from passes.graphs.graph import BlockSite, MlpSite
from passes.observe.adapt import packings_within
from passes.observe.statement import Statements
from passes.pipeline import PASSES as _COMPILING
from passes.pipeline import run_passes
from passes.program.compilation import Compilation, Group
from passes.program.coverage import Coverage

_PLAIN = Packing()

Place = tuple[str | int, ...]
"""Where a value stands among a call's arguments: its parameter's name, then keys; a number for a further position."""


class ElasticError(ValueError):
    """A model cannot be made elastic, or is not called as it was found: the message says where and why."""


@dataclass(frozen=True)
class MaskedInput:
    """Hidden channels of one MLP at the input of its down-projection.

    `module` is the down-projection's name inside the block; channels start .. start + hidden of its input, along
    dimension `dim` (-1 for a linear, 1 for a convolution), are the MLP's hidden channels in order. `packing` tells how
    that input holds the batch.
    """

    module: str
    start: int
    hidden: int
    dim: int = -1
    packing: Packing = _PLAIN


@dataclass(frozen=True)
class BlockLayout:
    """One block of the model.

    `name` is its qualified name. `leaves` is how many leaves a call's (args, kwargs) have; `states` pairs (output leaf,
    input leaf) of each token stream, `dim` is D of the first (routers read the streams of that width). `time` is the
    input leaf of the time embedding (B, `time_dim`), None where the router gets a sinusoidal embedding of the timestep,
    `time_dim` channels wide. `packings` tell how each state holds the batch (one row per sample in dimension 0 where
    there are none), `time_packing` how the time embedding does. `experts` names the modules whose experts all run on
    every token, as in the block's graph (see passes.blocks.experts), so that channels can be masked per sample.
    `places` and `time_place` are where states and time embedding stand by name, so that a call may pass them in another
    way, and leave out or add others; a layout stored before schema 3 has none, and counts leaves.
    """

    name: str
    leaves: int
    states: tuple[tuple[int, int], ...]
    dim: int
    time: int | None
    time_dim: int
    masks: tuple[MaskedInput, ...]
    packings: tuple[Packing, ...] = ()
    time_packing: Packing = _PLAIN
    experts: tuple[str, ...] = ()
    places: tuple[Place, ...] = ()
    time_place: Place | None = None

    def packing(self, state: int) -> Packing:
        """How state number `state` holds the batch."""
        return self.packings[state] if self.packings else _PLAIN


@dataclass(frozen=True)
class Layout:
    """All blocks in execution order; `timestep` is the keyword of the model's forward that holds the timestep.

    `samples` is where its keyword arguments tell the batch; needed for blocks that hold several rows per sample.
    """

    timestep: str
    blocks: tuple[BlockLayout, ...]
    samples: Samples | None = None

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Layout:
        """Read what `dataclasses.asdict` and JSON made of a layout; msgspec.ValidationError where it is none."""
        return msgspec.convert(data, Layout)


def positional_names(block: nn.Module) -> tuple[str, ...]:
    """Names of what the block's forward takes by position, in order."""
    parameters = list(inspect.signature(type(block).forward).parameters.values())[1:]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(parameter.name for parameter in parameters if parameter.kind in kinds)


def find_layout(
    model: nn.Module,
    inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    time_dim: int,
    timestep: str | None = None,
    narrow: Sequence[str] | None = None,
    stated: Statements = (),
) -> Layout:
    """Run the passes on `model` called with `inputs`, and keep what routers need.

    `timestep` names the argument that holds the timestep, where its name does not tell. `narrow` names the states whose
    MLPs are masked (see passes.mlp.written_states); without it, all are. Adapters of peft are left out of sight: blocks
    are found, and named, as they are without. `stated` is what cannot be found (see passes.observe.statement).

    Raises:
        ElasticError: no block was found; the message lists what was refused and why.
    """
    with adapters_aside(model), shown(f"finding the blocks of {type(model).__name__}"):
        found = run_passes(Compilation(model, inputs, timestep, narrow, stated=stated), PASSES, until="streams")
        layout = layout_of(found, time_dim)
    warning = Coverage.of(found).warning
    if warning is not None:
        warnings.warn(f"elasticize {warning}", stacklevel=2)
    return layout


class FindLayout:
    """Find what routers read of the blocks, and where MLPs are masked; nothing where no routers are to be made."""

    name = "layout"

    def run(self, compilation: Compilation) -> Compilation:
        """With a `layout`; raises ElasticError where routers cannot read a stream, or masks reach no MLP."""
        if compilation.time_dim is None or not compilation.groups:
            return compilation
        return replace(compilation, layout=layout_of(compilation, compilation.time_dim))


PASSES = _COMPILING.with_pass(FindLayout(), after="streams")
"""What `edit_compile.compile` runs; `elasticize` runs it as far as it needs."""


def layout_of(compilation: Compilation, time_dim: int) -> Layout:
    """The layout of a model whose MLPs were found; ElasticError where it has no block."""
    if not compilation.groups:
        refused = [refusal for report in compilation.reports for refusal in report.refused]
        reasons = "; ".join(f"{refusal.where}: {refusal.reason}" for refusal in refused) or "no candidates"
        raise ElasticError(f"no elastic block found in {type(compilation.model).__name__} ({reasons})")
    masks, discovery = _masks_of(compilation), compilation.discovery
    blocks = [
        _block_layout(site, compilation.groups[own], masks[own], time_dim)
        for site, own in zip(compilation.blocks, compilation.group_of, strict=True)
    ]
    return Layout(discovery.timestep, tuple(blocks), discovery.samples)


def fill_routers(routers: Sequence[nn.Module], layout: Layout, tensors: Sequence[Mapping[str, Tensor]]) -> None:
    """Load one mapping of parameters into each router; ElasticError where their number or a shape differs."""
    if len(tensors) != len(layout.blocks):
        raise ElasticError(f"there are parameters for {len(tensors)} routers, but {len(layout.blocks)} elastic blocks")
    for router, block, own in zip(routers, layout.blocks, tensors, strict=True):
        try:
            router.load_state_dict(own)
        except RuntimeError as error:
            raise ElasticError(f"the router's parameters do not fit {block.name}: {error}") from error


def _block_layout(site: BlockSite, group: Group, masks: tuple[MaskedInput, ...], time_dim: int) -> BlockLayout:
    leaves = site.calls[0].leaves
    streams = [_shape(leaves[source]) for _, source in group.states.pairs]
    if any(len(shape) < 3 for shape in streams):
        raise ElasticError(f"{site.name}: streams {streams} are not (B, ..., D), so that no router can read them")
    if site.time is not None:
        time_dim = _shape(leaves[site.time])[-1]
    # Positions and packings of the block's own call: hooks see that, not the adapted block's.
    inputs = site.adapter.inputs if site.adapter else [Packing(site.batch_dims.get(at, 0)) for at in range(len(leaves))]
    origins = site.adapter.origins if site.adapter else range(len(leaves))
    pairs = tuple((output, origins[source]) for output, source in group.states.pairs)
    packings = tuple(inputs[source] or _PLAIN for _, source in pairs)
    time = None if site.time is None else origins[site.time]
    time_packing = _PLAIN if time is None else inputs[time] or _PLAIN
    places = _places(site, len(inputs))
    return BlockLayout(
        site.name,
        len(inputs),
        pairs,
        streams[0][-1],
        time,
        time_dim,
        masks,
        packings,
        time_packing,
        group.graph.experts,
        tuple(places[source] for _, source in pairs),
        None if time is None else places[time],
    )


def _places(site: BlockSite, leaves: int) -> list[Place]:
    """Where each leaf of the block's own call stands."""
    names = positional_names(site.module)
    args, kwargs = pytree.tree_unflatten(range(leaves), site.adapter.spec if site.adapter else site.calls[0].spec)
    given = {(names[at] if at < len(names) else at): value for at, value in enumerate(args)} | kwargs
    found, _ = pytree.tree_flatten_with_path(given)
    return [tuple(_key(key) for key in path) for path, _ in sorted(found, key=lambda pair: pair[1])]


def _key(key: Any) -> str | int:
    """What leads to a child of a dict, a named tuple or another sequence."""
    return next(getattr(key, field) for field in ("key", "name", "idx") if hasattr(key, field))


def _shape(leaf: object) -> tuple[int, ...]:
    assert isinstance(leaf, Tensor)
    return tuple(leaf.shape)


def _masks_of(compilation: Compilation) -> list[tuple[MaskedInput, ...]]:
    """The masks of each group's blocks, found in the first of them."""
    pairs = [(group.first, group) for group in compilation.groups]
    found = {
        site.name: [mask for mlp in group.sites for mask in _masks(site.module, group.graph.weights, mlp)]
        for site, group in pairs
    }
    experts = {f"{s.name}.{name}": s.module.get_submodule(name) for s, group in pairs for name in group.graph.experts}
    names = [f"{block}.{mask.module}" for block, masks in found.items() for mask in masks]
    with dense_experts(experts):
        packings = packings_within(compilation.discovery, names)
    for name in names:
        if name not in packings or packings[name].shared:
            raise ElasticError(
                f"{name}: how its input holds the batch cannot be told, so that it cannot be masked for each sample: "
                "leave its stream out with narrow="
            )
    return [
        tuple(replace(mask, packing=packings[f"{block}.{mask.module}"]) for mask in masks)
        for block, masks in found.items()
    ]


def _masks(block: nn.Module, weights: Mapping[str, str], site: MlpSite) -> list[MaskedInput]:
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
