"""Which output of a block continues which of its inputs.

A residual block is x_k' = x_k + F_k(x_1, ..., x_n, c) for every stream k, and F vanishes with the
block's parameters. So with all parameters zero, every other float input zero and x_k filled with
noise,

    output_k = x_k    exactly, bit for bit

and no other output equals x_k. Candidates for x_k are the float inputs of tokens (three or more
dimensions) that carry the batch and have the shape and dtype of an output.

Two kinds of block need more than this:

    x + f, times a mask     zero inputs make the mask zero. With the parameters zero and every input as recorded,
                            the output equals one candidate, bit for bit (and that is not all zero).
    x + p + f               both x and p pass. The state is the one that data flow continues: the recorded input that
                            is an output of another block, or else the argument that it is in blocks of the class;
                            where it is stated (passes.observe.statement), that one.

A block that is no plain residual (a skip block mixes two streams through a linear first) has no such
proof of its own. Then the proof of another block of the same class is taken over, if the arguments
it speaks of have the same names and shapes here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils import _pytree as pytree

from passes.graphs.graph import BlockSite, Call, Refusal, Report, States
from passes.graphs.naming import argument_names, spoken
from passes.graphs.record import undisturbed
from passes.graphs.weightless import hollow, known_zeros, proving_call, same, zeros_for
from passes.observe.statement import StatementError, Statements, stated_pairs


def find_states(site: BlockSite, others: Sequence[BlockSite] = (), stated: Statements = ()) -> tuple[States, Report]:
    """Pairs (output leaf, input leaf) of `site`, in output order; no pairs and a refusal where not all are found.

    `others` are blocks of the same model (any class): those of the site's class may lend their proof.
    Every tensor that the block returns must be a state, since a skipped block returns nothing else. `stated` says which
    of several inputs it is that numbers allow; StatementError where they do not allow it.
    """
    pairs, report = _found_states(site, others, stated)
    _check_stated(site, pairs, report, stated_pairs(site, stated))
    return States(pairs), report


def _found_states(
    site: BlockSite, others: Sequence[BlockSite], stated: Statements
) -> tuple[tuple[tuple[int, int], ...], Report]:
    pairs, reason = _proof(site, others, stated)
    if reason is None:
        return pairs, Report("states", (_sentence(site, pairs, "its zeroed copy"),))
    for other in others:
        if other.module is site.module or type(other.module) is not type(site.module):
            continue
        lent = _transfer(site, other, others, stated)
        if lent:
            return lent, Report("states", (_sentence(site, lent, other.name),))
    return (), Report("states", refused=(Refusal(site.name, reason),))


def _check_stated(site: BlockSite, pairs: Sequence[tuple[int, int]], report: Report, said: Mapping[int, int]) -> None:
    """StatementError where what was shown is not what is `said`."""
    shown, names = dict(pairs), [".".join(name) for name in argument_names(site.module, site.calls[-1])]
    for output, at in said.items():
        if shown.get(output) != at:
            told = f"it continues {names[shown[output]]!r}" if output in shown else report.refused[0].reason
            raise StatementError(
                f"output {output} of {site.name} is stated to continue argument {names[at]!r}, but by its numbers "
                f"{told}: state another argument, or leave the output out"
            )


def _proof(
    site: BlockSite, others: Sequence[BlockSite], stated: Statements
) -> tuple[tuple[tuple[int, int], ...], str | None]:
    """Pairs shown by the zeroed block; with the reason where they do not cover every output tensor."""
    said = stated_pairs(site, stated)
    call = proving_call(site)
    outputs = [at for at, leaf in enumerate(call.outputs) if isinstance(leaf, Tensor)]
    odd = [at for at, leaf in enumerate(call.outputs) if leaf is not None and at not in outputs]
    if odd or not outputs:
        return (), f"returns something that is no tensor (leaf {odd[0]})" if odd else "returns no tensor"
    found: dict[int, int] = {}
    for output, inputs in _passing(site, call).items():
        at = said[output] if said.get(output) in inputs else None
        at = inputs[0] if len(inputs) == 1 else at if at is not None else _flowing(site, inputs, others)
        if at is None:
            names = [spoken(site.module, site.calls[-1], at) for at in inputs]
            return (), (
                f"output {output} equals more than one input once its parameters are zero ({' and '.join(names)}): "
                "state which one it continues with blocks="
            )
        found[output] = at
    missing = [at for at in outputs if at not in found]
    if missing:
        return (), f"output {missing[0]} is not an input plus something that vanishes with the parameters"
    if len(set(found.values())) != len(found):
        return (), "two outputs continue the same input"
    return tuple(sorted(found.items())), None


def _passing(site: BlockSite, call: Call) -> dict[int, list[int]]:
    """For each output, the inputs that the zeroed block passes on to it."""
    found: dict[int, list[int]] = {}
    with undisturbed(site.module):
        candidates = _candidates(site, call)
        for at in candidates:
            for output in _continuing(site, call, at):
                found.setdefault(output, []).append(at)
        missing = [at for at, leaf in enumerate(call.outputs) if isinstance(leaf, Tensor) and at not in found]
        if missing and candidates:
            outputs = _zeroed(site, call, call.leaves)
            for output in missing:
                equal = [at for at in candidates if _same(outputs[output], call.leaves[at])]
                if len(equal) == 1:
                    found[output] = equal
    return found


def _flowing(site: BlockSite, inputs: Sequence[int], others: Sequence[BlockSite]) -> int | None:
    """The one of several `inputs` that another block made; else the one that blocks of the class agree on."""
    made = _made(site, inputs, others)
    if made:
        return made[0] if len(made) == 1 else None
    paths = set()
    for other in others:
        if type(other.module) is type(site.module):
            theirs = {path: at for at, path in enumerate(leaf_paths(other.calls[-1]))}
            here = leaf_paths(site.calls[-1])
            same = [theirs[here[at]] for at in inputs if here[at] in theirs]
            paths |= {leaf_paths(other.calls[-1])[at] for at in _made(other, same, others)}
    agreed = [at for at in inputs if leaf_paths(site.calls[-1])[at] in paths]
    return agreed[0] if len(agreed) == 1 else None


def _made(site: BlockSite, inputs: Sequence[int], others: Sequence[BlockSite]) -> list[int]:
    """Those of `inputs` that are an output of another block, as recorded."""
    results = [leaf for other in others if other.name != site.name for leaf in other.calls[-1].outputs]
    return [at for at in inputs if any(_same(result, site.calls[-1].leaves[at]) for result in results)]


def _same(value: object, leaf: object) -> bool:
    if not isinstance(value, Tensor) or not isinstance(leaf, Tensor) or not same(value, leaf):
        return False
    return hollow(leaf) or bool(leaf.any())


def _candidates(site: BlockSite, call: Call) -> list[int]:
    results = [(leaf.shape, leaf.dtype) for leaf in call.outputs if isinstance(leaf, Tensor) and _is_tokens(leaf)]
    return [
        at
        for at, leaf in enumerate(call.leaves)
        if isinstance(leaf, Tensor) and at in site.batch_dims and (leaf.shape, leaf.dtype) in results
    ]


def _is_tokens(leaf: Tensor) -> bool:
    return leaf.is_floating_point() and leaf.ndim >= 3


def _continuing(site: BlockSite, call: Call, at: int) -> list[int]:
    """Outputs of the zeroed block that equal input `at` when it alone holds anything."""
    generator = torch.Generator().manual_seed(at)
    leaves = [
        torch.zeros_like(leaf) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
        for leaf in call.leaves
    ]
    original = call.leaves[at]
    assert isinstance(original, Tensor)
    alone = torch.randn(original.shape, generator=generator).to(original)
    leaves[at] = alone.clone()
    outputs = _zeroed(site, call, leaves)
    return [k for k, output in enumerate(outputs) if isinstance(output, Tensor) and torch.equal(output, alone)]


def _zeroed(site: BlockSite, call: Call, leaves: Sequence[object]) -> list[object]:
    """What the block gives for `leaves` with every parameter zero."""
    args, kwargs = pytree.tree_unflatten(leaves, call.spec)
    with known_zeros(site.module):
        return pytree.tree_leaves(functional_call(site.module, zeros_for(site.module), args, kwargs))


def _transfer(
    site: BlockSite, other: BlockSite, others: Sequence[BlockSite], stated: Statements
) -> tuple[tuple[int, int], ...] | None:
    """The pairs of `other`, spoken in the names of `site`'s arguments."""
    pairs, reason = _proof(other, others, stated)
    if reason is not None or other.calls[-1].output_spec != site.calls[-1].output_spec:
        return None
    here = {path: at for at, path in enumerate(leaf_paths(site.calls[-1]))}
    there = leaf_paths(other.calls[-1])
    lent = []
    for output, at in pairs:
        position = here.get(there[at])
        if position is None or position not in _candidates(site, site.calls[-1]):
            return None
        result, leaf = site.calls[-1].outputs[output], site.calls[-1].leaves[position]
        if not isinstance(result, Tensor) or not isinstance(leaf, Tensor) or result.shape != leaf.shape:
            return None
        lent.append((output, position))
    return tuple(lent)


def leaf_paths(call: Call) -> list[str]:
    """Where each leaf of a call sits, as text: ``[0][1]`` positional, ``[1]['temb']`` by keyword."""
    tree = pytree.tree_unflatten(call.leaves, call.spec)
    return [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(tree)[0]]


def _sentence(site: BlockSite, pairs: Sequence[tuple[int, int]], source: str) -> str:
    paths = leaf_paths(site.calls[-1])
    told = ", ".join(f"output {output} continues {paths[at]}" for output, at in pairs)
    return f"{site.name}: {told} (shown by {source})"
