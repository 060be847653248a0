"""Eager runs of a model under observation: what its modules were called with and what they returned.

Two kinds of observation: a *survey* notes only shapes and counts, so that it may watch every
candidate of a large model; a *recording* keeps tensors, by reference. A tensor that is written in
place after it was seen would make a reference lie, so versions are compared when the run ends and
such a run is recorded again with copies. Hooks see the calls of the thread that looks alone: others may be running
the same modules.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from passes.graphs.graph import Call
from passes.graphs.uncompiled import uncompiled
from runtime.face.output import tensors_of

Sight = tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True)
class Glimpse:
    """One call without its tensors: shapes and dtypes of those that went in and came out, and its work."""

    inputs: tuple[Sight, ...]
    outputs: tuple[Sight, ...]
    wrote_inputs: bool
    flops: int = 0


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluate `model` without gradients, uncompiled, inside the ``with`` block; every training flag returns."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), uncompiled():
            yield
    finally:
        for module, flag in flags.items():
            module.training = flag


def survey(
    model: nn.Module,
    kwargs: Mapping[str, object],
    watched: Mapping[str, nn.Module],
    flops: Callable[[], int] = lambda: 0,
) -> dict[str, list[Glimpse]]:
    """Run ``model(**kwargs)`` once and note every call of the `watched` modules, in order of return.

    `flops` tells the work that was done so far.
    """
    seen: dict[str, list[Glimpse]] = {name: [] for name in watched}
    begun: list[tuple[list[int], int]] = []

    def before(_module: nn.Module, args: object, kwargs: object) -> None:
        begun.append(([version(tensor) for tensor in tensors_in((args, kwargs))], flops()))

    def after(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: object, kwargs: object, output: object) -> None:
            inputs = tensors_in((args, kwargs))
            versions, before = begun.pop()
            wrote = versions != [version(tensor) for tensor in inputs]
            seen[name].append(Glimpse(_sights(inputs), _sights(tensors_in(output)), wrote, flops() - before))

        return hook

    with watching(watched, before, after):
        model(**own(kwargs))
    return seen


def record(
    model: nn.Module, kwargs: Mapping[str, object], watched: Mapping[str, nn.Module]
) -> tuple[dict[str, Call], object]:
    """Run ``model(**kwargs)`` once; the call of each watched module in order, and what the model gave.

    Each watched module must be called at most once (`survey` tells).
    """
    calls, output, stale = _record(model, kwargs, watched, copy=False)
    if stale:
        calls, output, _ = _record(model, kwargs, watched, copy=True)
    return calls, output


def _record(
    model: nn.Module, kwargs: Mapping[str, object], watched: Mapping[str, nn.Module], copy: bool
) -> tuple[dict[str, Call], object, bool]:
    calls: dict[str, Call] = {}
    arguments: list[tuple[tuple[object, ...], pytree.TreeSpec]] = []
    versions: list[tuple[Tensor, int]] = []

    def keep(leaf: object) -> object:
        if not isinstance(leaf, Tensor):
            return leaf
        if copy:
            return leaf.detach().clone()
        versions.append((leaf, version(leaf)))
        return leaf.detach()

    def before(_module: nn.Module, args: object, kwargs: object) -> None:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        arguments.append((tuple(keep(leaf) for leaf in leaves), spec))

    def after(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: object, _kwargs: object, output: object) -> None:
            leaves, spec = pytree.tree_flatten(output)
            calls[name] = Call(*arguments.pop(), tuple(keep(leaf) for leaf in leaves), spec)

        return hook

    with watching(watched, before, after):
        output = [tensor.clone() for tensor in tensors_of(model(**own(kwargs)))]  # later runs may write into them
    stale = any(version(tensor) != seen for tensor, seen in versions)
    return calls, output, stale


@contextmanager
def watching(
    watched: Mapping[str, nn.Module], before: Callable[..., None], after: Callable[[str], Callable[..., None]]
) -> Iterator[None]:
    """Inside the ``with`` block `before` and ``after(name)`` are hooks of the modules, in this thread."""
    with ExitStack() as hooks:
        for name, module in watched.items():
            hooks.enter_context(module.register_forward_pre_hook(here(before), with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(here(after(name)), with_kwargs=True))
        yield


def here(hook: Callable[..., object]) -> Callable[..., object]:
    """`hook`, which does nothing in other threads than this one."""
    thread = threading.get_ident()
    return lambda *args: hook(*args) if threading.get_ident() == thread else None


def own(kwargs: Mapping[str, object]) -> dict[str, object]:
    """`kwargs` with copies of its tensors, so that a model that writes into them spoils no other run."""
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, dict(kwargs))


def tensors_in(tree: object) -> list[Tensor]:
    """The tensors among the leaves of `tree`, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def version(tensor: Tensor) -> int:
    """How often a tensor has been written to, where that is counted."""
    return 0 if tensor.is_inference() else tensor._version


def _sights(tensors: Sequence[Tensor]) -> tuple[Sight, ...]:
    return tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors)
