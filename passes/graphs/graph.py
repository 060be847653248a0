"""The data that passes hand to each other: what was seen of a model, and the graph of a block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, fx, nn
from torch.utils._pytree import TreeSpec

from passes.graphs.batch_layout import Adapter, Samples
from runtime.base.rows import row_by_row
from runtime.engines.products import quickened


@dataclass(frozen=True)
class Refusal:
    """Why something was left alone: `where` (a module or node name) and `reason` (a sentence)."""

    where: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What a pass did: its name, one line per thing done, and every refusal with its reason."""

    name: str
    done: tuple[str, ...] = ()
    refused: tuple[Refusal, ...] = ()


@dataclass(frozen=True)
class Call:
    """One recorded call of a block: (args, kwargs) flattened by pytree, and what it returned.

    `leaves` and `outputs` are the pytree leaves (tensors detached), `spec` and `output_spec` put
    them back together.
    """

    leaves: tuple[object, ...]
    spec: TreeSpec
    outputs: tuple[object, ...]
    output_spec: TreeSpec


@dataclass(frozen=True)
class Run:
    """One eager run of the model: its keyword arguments, batch size and bucket, and what it gave where that is kept."""

    kwargs: Mapping[str, object]
    batch: int
    bucket: int
    output: object = None


@dataclass(frozen=True)
class BlockSite:
    """A block as discovery found it.

    `calls[r]` is its call in run r. `batch_dims` maps a leaf's position to the dimension that
    carries the batch (only tensor leaves that carry it appear). `time` is the position of the leaf
    that is the time embedding (B, E), or None. `adapter` is there where the block does not hold one
    row per sample itself: then `module` is the adapted copy, and everything here is as that sees it. `changing` are
    attributes (passes.graphs.held.Name) that the block, or a module that it is given, does not hold in every call.
    """

    name: str
    module: nn.Module
    calls: tuple[Call, ...]
    batch_dims: Mapping[int, int]
    time: int | None
    adapter: Adapter | None = None
    changing: frozenset[tuple[int, str]] = frozenset()


@dataclass(frozen=True)
class Work:
    """Floating-point operations of one forward of a model, and of each candidate for a block among its modules."""

    total: int = 0
    candidates: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Discovery:
    """Blocks of a model in execution order, with the runs in which they were seen.

    `timestep` is the keyword of the model's forward that holds the timestep; `samples` says where its
    arguments tell the batch, None where none of them tells it in every bucket. `written` are the attributes, by name,
    that the model's forward was seen to set to something else.
    """

    model: nn.Module
    runs: tuple[Run, ...]
    blocks: tuple[BlockSite, ...]
    timestep: str
    samples: Samples | None = None
    work: Work = Work()
    written: frozenset[str] = frozenset()

    @property
    def buckets(self) -> tuple[tuple[Run, Run], ...]:
        """(as given, doubled) for each shape bucket."""
        half = len(self.runs) // 2
        return tuple(zip(self.runs[:half], self.runs[half:], strict=True))


@dataclass(frozen=True)
class States:
    """Which output leaf continues which input leaf: pairs (output position, input position)."""

    pairs: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class BlockGraph:
    """A block as a function of tensors: ``graph(*weights, *inputs) -> tuple(states)``.

    Placeholders of `module` are the weights (parameters and buffers, in the order of `weights`)
    followed by the inputs. `weights` maps placeholder name to the qualified name inside the block.
    `leaves[i]` is the position of input i among the call's leaves; `states[k]` indexes `inputs`:
    output k continues it. Nodes carry ``meta["val"]`` (fake tensors). Where `row_dims` is there the graph
    takes one row of the batch per call, and `row_dims` is the dimension of each input that carries it.
    `experts` names the modules inside the block whose routed experts it sums up (see passes.blocks.experts).
    `read` are the numbers (of one row, where they carry the batch) that leaves must hold, since the code read them,
    and `held` the attributes (passes.graphs.held) that it read of the block and of the modules that it is given.
    """

    module: fx.GraphModule
    weights: Mapping[str, str]
    inputs: tuple[str, ...]
    leaves: tuple[int, ...]
    states: tuple[int, ...]
    row_dims: tuple[int | None, ...] | None = None
    experts: tuple[str, ...] = ()
    read: Mapping[int, Tensor] = field(default_factory=dict)
    held: Mapping[tuple[int, str], Mapping[str, object]] = field(default_factory=dict)

    def run(self, module: fx.GraphModule, weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
        """The states that `module`, this graph in some form, gives for inputs of any batch."""
        with quickened(next(iter(weights), None)):
            if self.row_dims is None:
                return list(module(*weights, *inputs))
            return row_by_row(lambda row: module(*weights, *row), inputs, self.row_dims, self.states)


@dataclass(frozen=True)
class Slot:
    """Channels of one weight that belong to an MLP's hidden dimension.

    Along dimension `dim` of the weight placeholder `weight`, the channels ``start .. start+size``
    are hidden channels 0..size of the site, in order.
    """

    weight: str
    dim: int
    start: int
    size: int


@dataclass(frozen=True)
class MlpSite:
    """One MLP of a block whose hidden channels may be narrowed together (equations 13 and 16).

    `hidden` is H. `slots` are all weights tied to it: producers (dim 0, biases too; twice for a
    packed GLU) and consumers. `contractions` are the consumers' slots alone (the down-projections:
    masking their *input* channels start..start+size masks the MLP). `weight_names` maps the
    placeholders of all slots to qualified names in the block.
    """

    hidden: int
    slots: tuple[Slot, ...]
    contractions: tuple[Slot, ...]
    weight_names: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class WeightPiece:
    """How one weight of a plan is cut from one weight of the block (passes.mlp.weights).

    The stored tensor is ``source`` narrowed along `dim` to ``start .. start+size``, then moved so
    that `dim` comes first when `transposed`; contiguous. `rows[v]` leading rows serve variant v.
    A scalar is stored as one row.
    """

    name: str
    source: str
    dim: int
    start: int
    size: int
    transposed: bool
    rows: tuple[int, ...]

    def cut(self, weight: Tensor) -> Tensor:
        """The stored tensor for the block's `weight`; shares memory where it is the whole of it."""
        weight = weight if weight.dim() else weight.reshape(1)
        piece = weight.narrow(self.dim, self.start, self.size)
        return (piece.transpose(0, self.dim) if self.transposed else piece).contiguous()


@dataclass(frozen=True)
class PlanGraph:
    """A block's graph at every width, over one copy of the weights.

    ``variants[v](*pieces, *inputs) -> tuple(states)`` with placeholders named like `pieces` then
    `inputs`; piece j is passed as its first ``pieces[j].rows[v]`` rows. `widths[v]` ascends to 1.
    Placeholders alone carry ``meta["val"]``.
    """

    block: BlockGraph
    widths: tuple[float, ...]
    pieces: tuple[WeightPiece, ...]
    variants: tuple[fx.GraphModule, ...]
