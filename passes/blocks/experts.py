"""Routed experts as a sum over all of them.

A mixture of experts E_1 .. E_n sends every token x to the k of them that its gate picked, G(x) = (indices, weights,
...). Which rows go where is read on the host, and no graph holds that. As a function of tensors it is

    y(x) = sum over e of g_e E_e(x) + sum over c of C_c(x)        g_e = sum over j of weights_j [indices_j = e]

with C_c whatever else the module holds, each of which every token goes through. It is the same function at the price
of every expert on every token. A module has this form where its children are one ``nn.ModuleList`` of two or more
modules of one class, one child that returns integers and floats of one shape first (the gate), and children that
return what is shaped like x; and which has no parameters beside them, that y would not read. That the module's own
code then computes y is not seen here: the block's graph is run against its recorded calls (passes.blocks.export). A
limit on how many tokens an expert takes, which no recorded call has met, is not seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


def find_experts(block: nn.Module) -> dict[str, nn.Module]:
    """The modules inside `block` that hold routed experts, by name."""
    return {name: module for name, module in block.named_modules() if name and _experts(module) is not None}


@contextmanager
def dense_experts(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside the ``with`` block each of `modules` (see `find_experts`) computes the sum over all its experts.

    One that is no mixture after all, as its children show when they are called, does what it always does.
    """
    replaced = {module: vars(module).get("forward") for module in modules.values()}
    for module in replaced:
        module.forward = partial(_sum_over_all, module)
    try:
        yield
    finally:
        for module, forward in replaced.items():
            del module.forward
            if forward is not None:
                module.forward = forward


def _experts(module: nn.Module) -> nn.ModuleList | None:
    """The experts of `module` where it may be a mixture: a list of modules of one class beside a gate, at least."""
    if any(True for _ in chain(module.parameters(recurse=False), module.buffers(recurse=False))):
        return None
    lists = [child for child in module.children() if isinstance(child, nn.ModuleList)]
    if len(lists) != 1 or len(lists[0]) < 2 or len({type(expert) for expert in lists[0]}) != 1:
        return None
    return lists[0] if sum(1 for _ in module.children()) > 1 else None


def _sum_over_all(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    experts = _experts(module)
    assert experts is not None
    others = [child for child in module.children() if child is not experts]
    picked = _picked(others, *args, **kwargs)
    if picked is None:
        return type(module).forward(module, *args, **kwargs)
    (x,), (indices, weights, common) = args, picked
    total = torch.zeros_like(x)
    for number, expert in enumerate(experts):
        share = torch.where(indices == number, weights, 0).sum(-1, keepdim=True)
        total = total + (share * torch.where(share != 0, expert(x), 0)).to(x.dtype)  # 0 times infinity is no number
    for result in common:
        total = total + result
    return total


def _picked(others: Sequence[nn.Module], *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, list[Tensor]] | None:
    """What the gate among `others` picks for each token (..., k), and what the rest gives; None for no mixture."""
    if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
        return None
    (x,) = args
    try:
        results = [child(x) for child in others]
    except (RuntimeError, TypeError, ValueError):
        return None
    picks = [pick for pick in map(_pick, results) if pick is not None]
    common = [result for result in results if isinstance(result, Tensor) and result.shape == x.shape]
    if len(picks) != 1 or len(common) + 1 != len(results):
        return None
    indices, weights = (tensor.reshape(*x.shape[:-1], -1) for tensor in picks[0])
    return indices, weights, common


def _pick(result: object) -> tuple[Tensor, Tensor] | None:
    """Indices and weights of the experts picked for each token, where `result` starts with them."""
    if not isinstance(result, tuple | list) or len(result) < 2:
        return None
    indices, weights = result[:2]
    if not isinstance(indices, Tensor) or not isinstance(weights, Tensor) or indices.shape != weights.shape:
        return None
    return (indices, weights) if weights.is_floating_point() and not indices.is_floating_point() else None
