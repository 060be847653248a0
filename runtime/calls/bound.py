"""A program's blocks made ready to run: plans loaded, weights bound, routers folded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from runtime import engines
from runtime.base.errors import BundleError, EditError, InnerShapeError
from runtime.base.rows import RowByRow
from runtime.bundle.program import Program
from runtime.bundle.spec import Block, Plan
from runtime.engines import Bound, Kernel
from runtime.routing.folded import Routers


class ReadyBlock:
    """One block: its plan bound to its weights at every width, and where its rows and states are."""

    def __init__(self, plan: Plan, bound: Sequence[Bound], name: str = "") -> None:
        self.name = name
        self.plan = plan
        self.states = plan.states
        self.time = plan.time
        self.batch_dims = tuple(given.batch_dim for given in plan.inputs)
        apart = [RowByRow(one, self.batch_dims, plan.states) for one in bound] if plan.single_row else None
        self.bound: tuple[Bound, ...] = tuple(apart or bound)
        self.state_dims = tuple(self.batch_dims[index] or 0 for index in plan.states)
        self._variants: dict[float, int] = {}

    def variant_for(self, width: float) -> int:
        """The narrowest variant that is at least `width` wide."""
        found = self._variants.get(width)
        if found is None:
            wide = [v for v, variant in enumerate(self.plan.variants) if variant.width >= width - 1e-9]
            found = min(wide, key=lambda v: self.plan.variants[v].width) if wide else len(self.plan.variants) - 1
            self._variants[width] = found
        return found

    def rows(self, inputs: Sequence[Tensor]) -> int:
        """Rows of the batch in a call with `inputs`."""
        return inputs[self.states[0]].shape[self.state_dims[0]]

    def takes(self, inputs: Sequence[Tensor]) -> bool:
        """Whether `inputs`, their rows aside, have shapes that the plan was made for."""
        return len(inputs) == len(self.plan.inputs) and all(
            tensor.dim() == len(given.shape)
            and all(
                want in (None, have) or dim == given.batch_dim
                for dim, (want, have) in enumerate(zip(given.shape, tensor.shape, strict=True))
            )
            for tensor, given in zip(inputs, self.plan.inputs, strict=True)
        )

    def check_shapes(self, inputs: Sequence[Tensor]) -> None:
        """InnerShapeError where an input, its rows aside, has another shape than the plan was made for."""
        for tensor, given in zip(inputs, self.plan.inputs, strict=True):
            pairs = enumerate(zip(given.shape, tensor.shape, strict=True))
            if any(want not in (None, have) for dim, (want, have) in pairs if dim != given.batch_dim):
                raise InnerShapeError(
                    f"{given.name} of block {self.name} is {tuple(tensor.shape)}, compiled for {given.shape}: that "
                    "depends on what the model's inputs hold, so compile with inputs of both kinds"
                )

    def calls(self, rows: int) -> int:
        """Calls of the engine that compute `rows` rows."""
        return rows if self.plan.single_row else 1

    def rows_first(self, states: Sequence[Tensor]) -> list[Tensor]:
        """`states` with the rows of the batch as dimension 0, as routers read them."""
        return [state.movedim(dim, 0) if dim else state for state, dim in zip(states, self.state_dims, strict=True)]

    def take(self, inputs: Sequence[Tensor], index: Tensor, rows: int) -> list[Tensor]:
        """`inputs` with only the rows `index` (int64); what all rows share is left as it is."""
        return [
            tensor if dim is None or tensor.shape[dim] != rows else tensor.index_select(dim, index)
            for tensor, dim in zip(inputs, self.batch_dims, strict=True)
        ]


def called(forms: Sequence[ReadyBlock], inputs: Sequence[Tensor], form: int, checked: bool) -> ReadyBlock:
    """The block in a form, or in that which takes `inputs` and the fewest others; InnerShapeError where none does.

    A form that is named is only looked at where `checked`.
    """
    fitting = [one for one in forms if one.takes(inputs)] if form < 0 else [forms[form]]
    ready = min(fitting or forms[:1], key=lambda one: sum(given.shape.count(None) for given in one.plan.inputs))
    if checked or form < 0:
        ready.check_shapes(inputs)
    return ready


class ReadyBlocks:
    """All blocks of a program on one engine; shared by all calls and threads.

    Weights are held once, by `program`: variants are bound to views of their leading rows.
    """

    def __init__(self, program: Program, engine: str) -> None:
        manifest = program.manifest
        loader = engines.make(engine, program)
        plans = {plan.id: plan for plan in manifest.plans}
        kernels = {
            plan.id: [loader.load(plan, variant, program.files) for variant in range(len(plan.variants))]
            for plan in manifest.plans
        }
        self.engine = loader
        self._bind = lambda: [
            self._ready(program, block, plans[block.plan], kernels[block.plan]) for block in manifest.blocks
        ]
        self.blocks = self._bind()
        self.forms = [
            [
                first,
                *(
                    self._ready(program, Block(block.name, one.plan, one.weights), plans[one.plan], kernels[one.plan])
                    for one in block.others
                ),
            ]
            for first, block in zip(self.blocks, manifest.blocks, strict=True)
        ]
        self.routers = None
        if manifest.router is not None and program.routers:
            _check_routers(manifest.blocks, program.routers)
            self.routers = Routers(manifest.router, len(manifest.blocks), program.routers)

    def bound_again(self) -> list[ReadyBlock]:
        """The blocks with bindings of their own: what an engine keeps for a binding is not shared with `blocks`."""
        return self._bind()

    @staticmethod
    def _ready(program: Program, block: Block, plan: Plan, kernels: Sequence[Kernel]) -> ReadyBlock:
        missing = [key for key in block.weights if key not in program.weights]
        if missing:
            raise BundleError(f"weights.safetensors lacks {missing[0]!r} of block {block.name}: compile again")
        weights = [program.weights[key] for key in block.weights]
        bound = []
        for kernel, variant in zip(kernels, plan.variants, strict=True):
            heads = [engines.head(w, rows) for w, rows in zip(weights, variant.rows, strict=True)]
            bound.append(kernel.bind(heads, block.name))
        return ReadyBlock(plan, bound, block.name)


def _check_routers(blocks: Sequence[Block], parameters: Iterable[str]) -> None:
    """EditError where only some of `blocks` have a router."""
    routed = {key.split(".", 1)[0] for key in parameters}
    for index, block in enumerate(blocks):
        if str(index) not in routed:
            raise EditError(f"block {block.name} has no router while others have one: give all of them one, or none")
