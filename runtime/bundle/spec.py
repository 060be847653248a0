"""What a bundle says: the frozen data that compiler and runtime share.

Everything here is plain data, written to and read from ``manifest.json`` by msgspec. A *plan* is
the code of one kind of block, a *variant* that code at one MLP width, a *block* one
place in the model that runs a plan with its own weights, a *glue* the rest of the model at one set
of input shapes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from runtime.bundle.tiers import StoredPolicy, Tier

SCHEMA = 2


@dataclass(frozen=True)
class RouterConfig:
    """Form of a router (paper section 3.2, equations 4-6); all routers of a model share it.

    A router reads the states of its block that are as wide as the first, joined along tokens.
    `hidden` is H_r. `activation` names a function of `torch.nn.functional`. `modulation` is
    "full" (time embedding -> 2D), "low_rank" (through `rank`) or "none" (gamma = delta = 0, the
    router sees time only through the tokens). `time_activation` names a function of
    `torch.nn.functional` that the time embedding goes through before that; None leaves it
    as it is. `time_dim` is the width of the sinusoidal embedding used for blocks whose inputs hold
    no time embedding. `widths` is S, ascending, ending in 1. Of each stream every `token_stride`-th
    token is read, from the first on: the mean over fewer is the cheaper.
    """

    hidden: int = 128
    activation: str = "silu"
    modulation: str = "full"
    time_activation: str | None = None
    rank: int = 16
    time_dim: int = 256
    eps: float = 1e-6
    widths: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    token_stride: int = 1


@dataclass(frozen=True)
class PlanInput:
    """One tensor input of a plan, in calling order.

    `shape` has None where the size may differ between calls (the batch, and token counts that
    differ between shape buckets). `batch_dim` is the dimension that holds the rows of the batch,
    None for an input that all rows share (rotary tables).
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]
    batch_dim: int | None


@dataclass(frozen=True)
class Variant:
    """A plan at one MLP width.

    `rows[j]` is how many leading rows (dim 0) of the plan's weight j this variant reads: weights
    are laid out so that every width is a contiguous prefix (equation 16).
    """

    width: float
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """Code of one kind of block.

    Called as ``plan(*weights, *inputs) -> tuple(states)``: output k continues input
    ``inputs[states[k]]`` with equal shape and dtype. `time` indexes the input that is the time
    embedding (B, E) of the router, None where the block has none. With `single_row` it takes one row
    of the batch per call (shapes have 1 where they would have the batch). `buckets` are the sets of shapes that it was
    compiled for: one shape per input, None at the batch alone. Files of a variant: ``plans/<id>-w<percent>.onnx`` and
    ``plans/<id>-w<percent>.pt2``.
    """

    id: str
    kind: str
    inputs: tuple[PlanInput, ...]
    states: tuple[int, ...]
    time: int | None
    weights: tuple[str, ...]
    variants: tuple[Variant, ...]
    single_row: bool = False
    buckets: tuple[tuple[tuple[int | None, ...], ...], ...] = ()

    def variant_at(self, width: float) -> int:
        """Index of the variant for `width`; the full one where the plan has no MLP to narrow."""
        for index, variant in enumerate(self.variants):
            if abs(variant.width - width) < 1e-9:
                return index
        return len(self.variants) - 1

    def takes(self, shapes: Sequence[Sequence[int]]) -> bool:
        """Whether inputs of `shapes`, their rows aside, are what the plan was made for."""
        return len(shapes) == len(self.inputs) and all(
            len(given.shape) == len(shape)
            and all(
                want is None or want == have or dim == given.batch_dim
                for dim, (want, have) in enumerate(zip(given.shape, shape, strict=True))
            )
            for shape, given in zip(shapes, self.inputs, strict=True)
        )


def plan_file(plan: Plan, variant: int, suffix: str) -> str:
    """Name of a variant's file in the bundle, as in ``plans/<id>-w050.onnx``."""
    return f"plans/{plan.id}-w{round(100 * plan.variants[variant].width):03d}.{suffix}"


@dataclass(frozen=True)
class Form:
    """One way in which a block is called: its plan, and the key in weights.safetensors of each plan weight."""

    plan: str
    weights: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """One block of the model, in the form in which the first trace called it; `others` are those found since.

    A block's position in the manifest is its number, for ever: its router, residuals and decisions go by it.
    """

    name: str
    plan: str
    weights: tuple[str, ...]
    others: tuple[Form, ...] = ()

    @property
    def forms(self) -> tuple[Form, ...]:
        """All forms; a guard of a glue says which one it calls the block in."""
        return (Form(self.plan, self.weights), *self.others)

    def plan_among(self, plans: Collection[str]) -> str | None:
        """The first plan of its forms that is among `plans`, those that a glue uses."""
        return next((form.plan for form in self.forms if form.plan in plans), None)


@dataclass(frozen=True)
class Cost:
    """Work of one variant of a plan, at one glue's shapes.

    `flops` and `row_bytes` (inputs and states) are those of one row of the batch. `weight_bytes` is
    what a call reads once, however many rows it has: the weights, and inputs that all rows share.
    """

    plan: str
    variant: int
    flops: int
    weight_bytes: int
    row_bytes: int


@dataclass(frozen=True)
class GlueInput:
    """One tensor argument of the model's forward, by keyword.

    `shape` has None at the batch dimension where the glue takes any batch size.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Glue:
    """The model around its blocks at one shape bucket.

    `file` is ``glue/<id>.pt2``, called as ``glue(*weights, *inputs) -> tuple(outputs)``; None for
    a hosted glue (the model's own forward). `constants` are the non-tensor arguments it was traced
    with. `outputs` names what the model gives: nothing where that is one bare tensor, positions where it
    is a tuple and nothing else. `flops` is the work of the glue itself per row, `costs` that of the blocks.
    `latents` pairs (input, position among the outputs): the tensors that a sampler advances by that output.
    `sized_by` names the inputs whose values, not shapes, set sizes inside (the lengths that a mask tells).
    """

    id: str
    file: str | None
    inputs: tuple[GlueInput, ...]
    constants: dict[str, bool | int | float | str | None]
    weights: tuple[str, ...]
    outputs: tuple[str, ...]
    flops: int
    costs: tuple[Cost, ...]
    latents: tuple[tuple[str, int], ...] = ()
    sized_by: tuple[str, ...] = ()


@dataclass(frozen=True)
class Policy:
    """RoutingPolicy's fields as stored (see runtime.routing.policy.RoutingPolicy)."""

    threshold: float = 0.5
    margin: float = 0.1
    max_reuse: int = 5
    warmup_steps: int = 0


@dataclass(frozen=True)
class Manifest:
    """All a bundle says of itself. `arguments` are the names of the model's forward, in order.

    `batch` is the number of samples that it was first compiled with.
    `telling_none` are those to which None says something else than leaving them out, "**" for all others.
    `attributes` are the model's own plain ones beside its configuration, which some pipelines read.
    `policy` decides where no tier is chosen; `tiers` are further ones by name, in the order in which they were added.
    """

    schema: int
    model: str
    config: dict[str, object]
    dtype: str
    timestep: str
    arguments: tuple[str, ...]
    widths: tuple[float, ...]
    plans: tuple[Plan, ...]
    blocks: tuple[Block, ...]
    glues: tuple[Glue, ...]
    router: RouterConfig | None
    policy: Policy
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    attributes: dict[str, bool | int | float | str | None] = field(default_factory=dict)
    tiers: dict[str, Tier[StoredPolicy]] = field(default_factory=dict)
    telling_none: tuple[str, ...] = ()
    batch: int = 1
