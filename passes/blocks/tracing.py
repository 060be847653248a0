"""A block's code followed by torch.export, as a function of the tensors that it is called with.

All else that it is called with is baked in: plain values, modules that hold no parameters (their tensors become
constants), numbers that the code reads where these are the same in every call (passes.blocks.reading), and what it
reads of the attributes of modules (passes.graphs.held).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.attention.flex_attention import BlockMask
from torch.utils import _pytree as pytree

from passes.blocks.quiet_export import exported, stopping_quietly, why
from passes.blocks.reading import LARGEST, Reading, same_numbers
from passes.graphs.graph import BlockSite, Call, States
from passes.graphs.held import PLAIN, Name, held_by, modules_in, noting_reads
from passes.graphs.naming import held_tensors, spoken
from passes.graphs.record import undisturbed
from passes.graphs.weightless import hollow
from passes.observe.settled import Settled
from runtime.base.errors import EditError
from runtime.face.arguments import exactly


class ExportError(EditError):
    """A block that has no faithful graph; the message says why."""


class ReadError(ExportError):
    """A block whose code reads numbers out of a tensor, so that it has no graph."""


def check_constants(site: BlockSite) -> None:
    """Every leaf that is no tensor must be a plain value, a module without parameters or a mask of flex attention.

    It must be the same in all runs: a mask, the same object.
    """
    for at, leaf in enumerate(site.calls[0].leaves):
        if isinstance(leaf, Tensor):
            continue
        name, kind = spoken(site.module, site.calls[0], at), type(leaf).__name__
        if isinstance(leaf, nn.Module):
            if next(leaf.parameters(), None) is not None:
                raise ExportError(
                    f"{site.name}: {name} is a {kind} with parameters: hold it in the block, or pass what it gives"
                )
        elif not isinstance(leaf, (*PLAIN, BlockMask)):
            raise ExportError(f"{site.name}: {name} is a {kind}: pass tensors and plain values")
        if any(exactly(call.leaves[at]) != exactly(leaf) for call in site.calls):
            told = f"a {kind}" if isinstance(leaf, nn.Module | BlockMask) else repr(leaf)
            raise ExportError(f"{site.name}: {name} ({told}) is no tensor and differs between runs")


class _Flat(nn.Module):
    """The block as a function of its tensor leaves; modules among the others are held, so that their tensors are seen.

    `known` are numbers of leaves, by position, `held` those of the block's own tensors, by name.
    """

    def __init__(
        self,
        site: BlockSite,
        call: Call,
        tensors: Sequence[int],
        outputs: Sequence[int],
        known: Mapping[int, Tensor],
        held: Mapping[str, Tensor],
        reading: Reading,
    ) -> None:
        super().__init__()
        self.block = site.module
        self.given = nn.ModuleList(modules_in(call.leaves))
        self.looked_at: set[Name] = set()
        self._call = Call(
            tuple(None if at in tensors else leaf for at, leaf in enumerate(call.leaves)), call.spec, (), call.spec
        )
        self._tensors, self._outputs, self._known, self._held = tuple(tensors), tuple(outputs), known, held
        self.names = [spoken(site.module, call, at) for at in tensors]
        self._reading = reading

    def forward(self, *inputs: Tensor) -> tuple[object, ...]:
        leaves, reading = list(self._call.leaves), self._reading
        for at, name, value in zip(self._tensors, self.names, inputs, strict=True):
            leaves[at] = value
            reading.follow(value, name, self._known.get(at))
        for name, value in held_tensors(self.block).items():
            reading.follow(value, f"its {name}", self._held.get(name))
        args, kwargs = pytree.tree_unflatten(leaves, self._call.spec)
        with stopping_quietly(), reading, noting_reads(self.block, [*self.given]) as looked_at:
            results = pytree.tree_leaves(self.block(*args, **kwargs))
        self.looked_at |= looked_at
        return tuple(results[at] for at in self._outputs)


def trace(
    site: BlockSite,
    states: States,
    call: Call,
    moving: Mapping[int, tuple[int, ...]],
    settled: Settled | None,
) -> tuple[ExportedProgram, dict[int, Tensor], dict[Name, dict[str, object]]]:
    """The block exported as it was called, free in the dimensions that are `moving`; the numbers of leaves in it; and
    what is baked in of the attributes of the block and of the modules that it is given.

    With `settled`, numbers are known of the tensors that the block holds, and of these leaves where no dimension moves.

    Raises ExportError; ReadError where the code reads numbers that are not known.
    """
    known = {at: row for at in settled or () if not moving[at] and (row := _known(site, at, call)) is not None}
    tensors = {} if settled is None else held_tensors(site.module)
    steady = (name for name, value in tensors.items() if value.numel() <= LARGEST and (-1, name) not in site.changing)
    held = {name: tensors[name].clone() for name in steady if not hollow(tensors[name])}
    before = held_by(site.module, modules_in(call.leaves))
    reading = Reading()
    own = {at: value.clone() for at, value in known.items()}
    flat = _Flat(site, call, list(moving), [output for output, _ in states.pairs], own, held, reading)
    example = tuple(leaf.clone() for leaf in (call.leaves[at] for at in moving) if isinstance(leaf, Tensor))
    free = [dict.fromkeys(dims, Dim.AUTO) for dims in moving.values()]
    try:
        with undisturbed(flat):
            program = exported(flat, example, free)
    except Exception as error:
        if reading.place:
            raise ReadError(f"{site.name}: {_told_of_read(reading)} ({why(error)})") from error
        raise ExportError(f"{site.name}: torch.export cannot follow its code: {why(error)}") from error
    for name in sorted(flat.looked_at & site.changing):
        raise ExportError(_told_of_change(site, call, *name))
    read = {at: known[at] for at, name in zip(moving, flat.names, strict=True) if name in reading.read}
    buffers = {(-1, name) for name, _ in site.module.named_buffers() if f"its {name}" not in reading.read}
    return program, read, {name: before[name] for name in flat.looked_at & before.keys() - buffers}


def _told_of_change(site: BlockSite, call: Call, given: int, name: str) -> str:
    if given < 0:
        return (
            f"{site.name}: its {name} changes from call to call: pass what the forward of the model, or of the block, "
            "sets there to the block as an argument"
        )
    at = [at for at, leaf in enumerate(call.leaves) if isinstance(leaf, nn.Module)][given]
    kind = type(call.leaves[at]).__name__
    return f"{spoken(site.module, call, at)} is a {kind} whose {name} changes from call to call: pass that"


def _told_of_read(reading: Reading) -> str:
    what = " and ".join(sorted(reading.unknown)) or "a tensor"
    return (
        f"torch.export cannot follow its code: it reads numbers of {what} at {reading.place}, which other calls may "
        "set otherwise: pass them as plain integers, or compute with tensors"
    )


def _known(site: BlockSite, at: int, call: Call) -> Tensor | None:
    """What leaf `at` of `call` holds, a row of it where `call` is one, if it is the same everywhere."""
    value = call.leaves[at]
    assert isinstance(value, Tensor)
    return value if _small(value) and is_known(site, at, value) else None


def is_known(site: BlockSite, at: int, value: Tensor) -> bool:
    """Whether leaf `at` holds `value` in every recorded call, in every row where it carries the batch."""
    dim = site.batch_dims.get(at)
    return all(same_numbers(call.leaves[at], value, dim) for call in site.calls)


def _small(value: Tensor) -> bool:
    return not hollow(value) and value.numel() <= LARGEST
