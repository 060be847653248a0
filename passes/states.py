"""Which output of a block continues which of its inputs.

A residual block is x_k' = x_k + F_k(x_1, ..., x_n, c) for every stream k, and F vanishes with the
block's parameters. So with all parameters zero, every other float input zero and x_k filled with
noise,

    output_k = x_k    exactly, bit for bit

and no other output equals x_k. Candidates for x_k are the float inputs of tokens (three or more
dimensions) that carry the batch and have the shape and dtype of an output.

A block that is no plain residual (a skip block mixes two streams through a linear first) has no such
proof of its own. Then the proof of another block of the same class is taken over, if the arguments
it speaks of have the same names and shapes here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils import _pytree as pytree

from passes.graph import BlockSite, Call, Refusal, Report, States
from passes.record import undisturbed


def find_states(site: BlockSite, others: Sequence[BlockSite] = ()) -> tuple[States, Report]:
    """Pairs (output leaf, input leaf) of `site`, in output order; no pairs and a refusal where not all are found.

    `others` are blocks of the same model (any class): those of the site's class may lend their proof.
    Every tensor that the block returns must be a state, since a skipped block returns nothing else.
    """
    pairs, reason = _proof(site)
    if reason is None:
        return States(pairs), Report("states", (_sentence(site, pairs, "its zeroed copy"),))
    for other in others:
        if other.module is site.module or type(other.module) is not type(site.module):
            continue
        lent = _transfer(site, other)
        if lent:
            return States(lent), Report("states", (_sentence(site, lent, other.name),))
    return States(()), Report("states", refused=(Refusal(site.name, reason),))


def _proof(site: BlockSite) -> tuple[tuple[tuple[int, int], ...], str | None]:
    """Pairs shown by the zeroed block; with the reason where they do not cover every output tensor."""
    call = site.calls[-1]
    outputs = [at for at, leaf in enumerate(call.outputs) if isinstance(leaf, Tensor)]
    odd = [at for at, leaf in enumerate(call.outputs) if leaf is not None and at not in outputs]
    if odd or not outputs:
        return (), f"returns something that is no tensor (leaf {odd[0]})" if odd else "returns no tensor"
    found: dict[int, int] = {}
    with undisturbed(site.module):
        for at in _candidates(site, call):
            for output in _continuing(site, call, at):
                if output in found:
                    return (), f"output {output} equals more than one input once its parameters are zero"
                found[output] = at
    missing = [at for at in outputs if at not in found]
    if missing:
        return (), f"output {missing[0]} is not an input plus something that vanishes with the parameters"
    if len(set(found.values())) != len(found):
        return (), "two outputs continue the same input"
    return tuple(sorted(found.items())), None


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
    args, kwargs = pytree.tree_unflatten(leaves, call.spec)
    outputs = pytree.tree_leaves(functional_call(site.module, _zeros(site), args, kwargs))
    return [k for k, output in enumerate(outputs) if isinstance(output, Tensor) and torch.equal(output, alone)]


def _zeros(site: BlockSite) -> dict[str, Tensor]:
    """A zero for every parameter, in no memory of its own."""
    return {
        name: torch.zeros((), dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)
        for name, parameter in site.module.named_parameters()
    }


def _transfer(site: BlockSite, other: BlockSite) -> tuple[tuple[int, int], ...] | None:
    """The pairs of `other`, spoken in the names of `site`'s arguments."""
    pairs, reason = _proof(other)
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
