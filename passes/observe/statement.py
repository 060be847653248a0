"""What a user states of a model's blocks and batch where running the model cannot tell.

A statement takes the place of a guess alone. What is stated is compared with the numbers of the same runs as what is
found: a pairing with what the zeroed block passes on, a batch dimension with a run of twice the samples.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from passes.graphs.graph import BlockSite, Refusal
from passes.graphs.naming import argument_names, output_names
from passes.graphs.uncompiled import WRAPPER
from runtime.base.errors import EditError


class StatementError(EditError, ValueError):
    """A statement does not fit the model; the message names the argument or the block, and what to do."""


@dataclass(frozen=True)
class BlockStatement:
    """What holds of some of a model's blocks, and of its arguments, where it cannot be found.

    `names` are the blocks that it speaks of: names of modules in which ``*`` stands for a part between dots
    (``"blocks.*"``), one or several; without any, all blocks. `continues` maps outputs of such a block, by position or
    name, to the parameter of its forward that each one continues (``{0: "hidden_states"}``; an entry of a list or dict
    as ``"states.0"``). `batch` maps parameters of the model's forward to the dimension that holds the samples, in all
    tensors of the argument; None says that it holds none, and is one for all samples.
    """

    names: str | tuple[str, ...] = ()
    continues: Mapping[int | str, str] = field(default_factory=dict)
    batch: Mapping[str, int | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = (self.names,) if isinstance(self.names, str) else tuple(self.names)
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "continues", {str(output): name for output, name in self.continues.items()})
        object.__setattr__(self, "batch", dict(self.batch))

    def speaks_of(self, name: str) -> bool:
        """Whether the module called `name` is one of `names`."""
        parts = [part for part in name.split(".") if part != WRAPPER]
        return not self.names or any(
            len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))
            for wanted in (glob.split(".") for glob in self.names)
        )


Statements = tuple[BlockStatement, ...]


def as_statements(given: BlockStatement | Sequence[BlockStatement] | None) -> Statements:
    """One statement, several or none, as a tuple."""
    if given is None or isinstance(given, BlockStatement):
        return () if given is None else (given,)
    return tuple(given)


def stated_continues(statements: Statements, block: str) -> dict[str, str]:
    """Output to parameter, as stated of the block called `block`; StatementError where an output is spoken of twice."""
    found: dict[str, str] = {}
    for output, name in (pair for one in statements if one.speaks_of(block) for pair in one.continues.items()):
        first = found.setdefault(str(output), name)
        if first != name:
            raise StatementError(f"output {output} of {block} is stated to continue {first!r} and {name!r}: state one")
    return found


def stated_batch(statements: Statements) -> dict[str, int | None]:
    """Parameter of the model to batch dimension, as stated; StatementError where one is stated in two ways."""
    found: dict[str, int | None] = {}
    for name, dim in (pair for one in statements for pair in one.batch.items()):
        if found.setdefault(name, dim) != dim:
            raise StatementError(f"the batch of argument {name!r} is stated twice: as {found[name]} and as {dim}")
    return found


def check_blocks(
    statements: Statements, model: nn.Module, found: Mapping[str, nn.Module], refused: Sequence[Refusal]
) -> None:
    """StatementError where a statement speaks of no module, of none that can be a block, or of unknown parameters.

    `found` are the modules that can be blocks, and `refused` what was left alone.
    """
    names = [name for name, _ in model.named_modules()]
    for one in statements:
        for glob in one.names:
            single = BlockStatement(glob)
            if not any(single.speaks_of(name) for name in names):
                lists = sorted({name.rpartition(".")[0] + ".*" for name in found})
                raise StatementError(
                    f"no module of {type(model).__name__} is called {glob!r}"
                    + (f": the lists of blocks are {', '.join(lists)}" if lists else "")
                )
            if not any(single.speaks_of(name) for name in found):
                told = next((f": {own.where} {own.reason}" for own in refused if single.speaks_of(own.where)), "")
                raise StatementError(f"no module called {glob!r} can be a block{told}: name a list of blocks")
        for name, module in found.items():
            for parameter in one.continues.values() if one.speaks_of(name) else ():
                _check_parameter(name, module, parameter.partition(".")[0])


def check_batch(statements: Statements, model: nn.Module, buckets: Sequence[Mapping[str, object]]) -> None:
    """StatementError where a batch dimension is stated of an unknown parameter, or one that no tensor of it has."""
    for name, dim in stated_batch(statements).items():
        if not any(name in kwargs for kwargs in buckets):
            _check_parameter(type(model).__name__, model, name)
        for value in (kwargs[name] for kwargs in buckets if name in kwargs):
            tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
            if dim is not None and not any(-leaf.ndim <= dim < leaf.ndim for leaf in tensors):
                held = f"holds tensors of {max(leaf.ndim for leaf in tensors)} dimensions" if tensors else "has none"
                raise StatementError(f"argument {name!r} {held}: state another batch dimension than {dim}, or None")


def stated_sizes(batch: Mapping[str, int | None], kwargs: Mapping[str, object]) -> list[int]:
    """The size of the batch where `batch` states its dimension; StatementError where two arguments differ in it."""
    sizes: dict[int, str] = {}
    for name, dim in batch.items():
        value = kwargs.get(name)
        if isinstance(value, Tensor) and dim is not None:
            sizes.setdefault(value.shape[dim], f"{value.shape[dim]} in dimension {dim} of {name!r}")
    if len(sizes) > 1:
        raise StatementError(f"the batch is stated as {' and as '.join(sizes.values())}: state where both hold samples")
    return list(sizes)


def stated_pairs(site: BlockSite, statements: Statements) -> dict[int, int]:
    """Output leaf to input leaf of a block's call, as stated.

    StatementError where the call has no such output, or no tensor for such a parameter.
    """
    call = site.calls[-1]
    outputs, inputs = output_names(call), [".".join(name) for name in argument_names(site.module, call)]
    pairs: dict[int, int] = {}
    for output, name in stated_continues(statements, site.name).items():
        places = [at for at, own in enumerate(outputs) if own == output] or [*_number(output, len(outputs))]
        if not places:
            raise StatementError(f"{site.name} returns no output {output!r}: it has {', '.join(outputs)}")
        at = next((at for at, own in enumerate(inputs) if own in (name, f"{name}.0" if site.adapter else name)), None)
        if at is None or not isinstance(call.leaves[at], Tensor):
            tensors = [own for own, leaf in zip(inputs, call.leaves, strict=True) if isinstance(leaf, Tensor)]
            raise StatementError(
                f"argument {name!r} of {site.name}, which output {output} is stated to continue, is no tensor in these "
                f"inputs; there are {', '.join(tensors)}"
            )
        pairs[places[0]] = at
    return pairs


def _number(output: str, count: int) -> Iterator[int]:
    if output.isdecimal() and int(output) < count:
        yield int(output)


def _check_parameter(where: str, module: nn.Module, name: str) -> None:
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    kinds = {parameter.kind for parameter in parameters}
    if name not in {parameter.name for parameter in parameters} and inspect.Parameter.VAR_KEYWORD not in kinds:
        told = ", ".join(parameter.name for parameter in parameters)
        raise StatementError(f"{where} takes no argument {name!r}: it takes {told}")
