"""A program's blocks on an engine: plans loaded, bound to each block's weights in each of its forms, routers folded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from runtime import engines
from runtime.base.errors import BundleError, EditError, InnerShapeError, inside
from runtime.base.guard import admits
from runtime.base.rows import RowByRow
from runtime.bundle import archive
from runtime.bundle.program import Program
from runtime.bundle.spec import Block, Form, Glue, Plan
from runtime.engines import Bound, Kernel
from runtime.routing.folded import Routers


class BoundBlock:
    """One form of a block: its plan bound to its weights at every width, and where its rows and states are."""

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

    def fits(self, inputs: Sequence[Tensor]) -> bool:
        """Whether `inputs`, their rows aside, are what the plan was made for."""
        return self.plan.takes([tensor.shape for tensor in inputs])

    def rows_first(self, states: Sequence[Tensor]) -> list[Tensor]:
        """`states` with the rows of the batch as dimension 0, as routers read them."""
        return [state.movedim(dim, 0) if dim else state for state, dim in zip(states, self.state_dims, strict=True)]

    def take(self, inputs: Sequence[Tensor], index: Tensor, rows: int) -> list[Tensor]:
        """`inputs` with only the rows `index` (int64); what all rows share is left as it is."""
        return [
            tensor if dim is None or tensor.shape[dim] != rows else tensor.index_select(dim, index)
            for tensor, dim in zip(inputs, self.batch_dims, strict=True)
        ]


class BoundBlocks:
    """All blocks of a program on one engine, by number and form; shared by all calls and threads. It only grows.

    Weights are held once, by the program: variants are bound to views of their leading rows.
    """

    def __init__(self, program: Program, engine: str) -> None:
        self.engine = engines.make(engine, program)
        self.forms: list[list[BoundBlock]] = [[] for _ in program.manifest.blocks]
        self.routers: Routers | None = None
        self._program = program
        self._kernels: dict[str, list[Kernel]] = {}
        manifest = program.manifest
        if manifest.router is not None and program.routers:
            _check_routers(manifest.blocks, program.routers)
            self.routers = Routers(manifest.router, len(manifest.blocks), program.routers)
        self.grow(program)

    def __len__(self) -> int:
        return len(self.forms)

    def grow(self, program: Program) -> None:
        """Take in the forms of blocks that `program` has more than there were."""
        self._program = program
        pairs = zip(self.forms, program.manifest.blocks, strict=True)
        new = [[self._bind(block, form) for form in block.forms[len(own) :]] for own, block in pairs]
        for own, forms in zip(self.forms, new, strict=True):  # all of them or, where one does not bind, none
            own.extend(forms)

    def named(self, block: int, form: int) -> BoundBlock:
        """`form` of `block`; the first where the form is ANY."""
        return self.forms[block][max(form, 0)]

    def fitting(self, block: int, form: int, inputs: Sequence[Tensor], glue: Glue) -> BoundBlock:
        """`form` of `block` if `inputs` are what it is for, else that which is for them and the fewest others.

        Shapes do not tell what else plans differ in, as numbers that are baked into them: only plans that were made
        for calls of this `glue` serve it, and none of a form that the guard leaves out. InnerShapeError, naming the
        arguments that set sizes in the glue (all where there are none), where there is no such form.
        """
        forms = self.forms[block]
        if form >= 0 and forms[form].fits(inputs):
            return forms[form]
        made = self._made_for(glue)
        fitting = [
            ready
            for number, ready in enumerate(forms)
            if ready.plan.id in made and admits(form, number) and ready.fits(inputs)
        ]
        if fitting:
            return min(fitting, key=lambda ready: sum(given.shape.count(None) for given in ready.plan.inputs))
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in inputs)
        told = f"the values of {', '.join(glue.sized_by)}" if glue.sized_by else "the values of the model's arguments"
        raise InnerShapeError(
            f"block {forms[0].name} is called with shapes ({shapes}) that were not compiled. They depend on {told}: "
            "compile with inputs of this kind, too"
        )

    def _made_for(self, glue: Glue) -> set[str]:
        """The plans of calls of `glue`, which may have more since a call began."""
        now = next((own for own in self._program.manifest.glues if own.id == glue.id), glue)
        return {cost.plan for cost in now.costs}

    def bound_again(self, block: int, form: int) -> BoundBlock:
        """A form of a block with bindings of its own: what an engine keeps for a binding is shared with nobody."""
        manifest = self._program.manifest
        return self._bind(manifest.blocks[block], manifest.blocks[block].forms[max(form, 0)])

    def _bind(self, block: Block, form: Form) -> BoundBlock:
        program = self._program
        plan = next(plan for plan in program.manifest.plans if plan.id == form.plan)
        if plan.id not in self._kernels:
            variants = range(len(plan.variants))
            self._kernels[plan.id] = [self.engine.load(plan, variant, program.files) for variant in variants]
        missing = [key for key in form.weights if key not in program.weights]
        if missing:
            raise BundleError(f"weights.safetensors lacks {missing[0]!r} of block {block.name}: compile again")
        weights = [program.weights[key] for key in form.weights]
        bound = []
        for kernel, variant in zip(self._kernels[plan.id], plan.variants, strict=True):
            bound.append(kernel.bind(engines.heads(weights, variant), block.name))
        return BoundBlock(plan, bound, block.name)


def glue_graph(program: Program, glue: Glue, device: torch.device) -> Callable[..., tuple[Tensor, ...]]:
    """The graph of a glue that is not hosted, with its weights: a function of the glue's inputs, on `device`."""
    assert glue.file is not None
    graph = archive.load(program.files[glue.file], glue.file, device)
    weights, name = [program.weights[key] for key in glue.weights], glue.file

    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        with inside(name):
            return graph(*weights, *inputs)

    return call


def _check_routers(blocks: Sequence[Block], parameters: Iterable[str]) -> None:
    """EditError where only some of `blocks` have a router."""
    routed = {key.split(".", 1)[0] for key in parameters}
    for index, block in enumerate(blocks):
        if str(index) not in routed:
            raise EditError(f"block {block.name} has no router while others have one: give all of them one, or none")
