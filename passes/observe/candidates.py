"""Modules that may be blocks, found by a run that notes shapes alone.

A *block* is an entry of an ``nn.ModuleList``, ``nn.ModuleDict`` or ``nn.Sequential``, called exactly once per forward,
that has parameters, is more than a single layer, and returns a float tensor of tokens of the shape and dtype of one of
its inputs. Tokens have three or more dimensions; where nothing in the model has, two: rows of samples.
Lists inside a block are its own affair; lists inside an entry that is no block are looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from passes.graphs.cost import tallying
from passes.graphs.graph import Refusal, Work
from passes.graphs.record import Glimpse, survey
from passes.graphs.uncompiled import WRAPPER, only_compiled, unwrapped

_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def find_candidates(model: nn.Module, kwargs: Mapping[str, object]) -> tuple[dict[str, nn.Module], list[Refusal], Work]:
    """Modules to record, by name, the candidates refused, and the work of all."""
    candidates = dict(_candidates(model, ""))
    if not candidates:
        reason = "has no nn.ModuleList, ModuleDict or Sequential to look for blocks in"
        return {}, [Refusal(type(model).__name__, reason)], Work()
    with tallying(model) as flops:
        glimpses = survey(model, kwargs, candidates, flops)
        work = Work(flops(), {name: sum(one.flops for one in seen) for name, seen in glimpses.items()})
    dims = 3 if any(_keeps_shape(glimpse, 3) for seen in glimpses.values() for glimpse in seen) else 2
    watched: dict[str, nn.Module] = {}
    refused: list[Refusal] = []
    settled: list[str] = []
    for name, module in candidates.items():
        if any(name.startswith(f"{outer}.") for outer in settled):
            continue
        seen = glimpses[name]
        if not any(_keeps_shape(glimpse, dims) for glimpse in seen):
            reason = "returns no tensor of tokens shaped like an input" if seen else "was not called"
            refused.append(Refusal(name, reason))
            continue
        settled.append(name)
        objection = _objection(module, seen)
        if objection:
            refused.append(Refusal(name, objection))
        else:
            watched[name] = module
    return watched, refused, work


def _candidates(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Every entry of every list of modules under `module`, outer ones first, each module once.

    Single layers in a row are no blocks, and are not spoken of; what torch.compile was given stands for what it gave.
    """
    seen: set[nn.Module] = set()
    for name, entry in module.named_modules(prefix=prefix):
        for key, child in entry.named_children() if isinstance(entry, _LISTS) else ():
            inner = unwrapped(child)
            if inner in seen or (not isinstance(entry, nn.ModuleList) and _single_layer(inner)):
                continue
            seen.add(inner)
            path = f"{name}.{key}" if name else key
            while child is not inner:
                path, child = f"{path}.{WRAPPER}", child._modules[WRAPPER]  # type: ignore[assignment]
            yield path, inner


def _keeps_shape(glimpse: Glimpse, dims: int) -> bool:
    return any(
        len(shape) >= dims and dtype.is_floating_point and (shape, dtype) in glimpse.inputs
        for shape, dtype in glimpse.outputs
    )


def _objection(module: nn.Module, seen: Sequence[Glimpse]) -> str | None:
    """Why a module that keeps a shape is still no block."""
    if len(seen) != 1:
        return f"called {len(seen)} times in one forward: its calls would share one bank"
    if seen[0].wrote_inputs:
        return "writes into its inputs"
    if next(module.parameters(), None) is None:
        return "has no parameters"
    if _single_layer(module):
        return "is a single layer"
    for name, inner in module.named_modules():
        reason = _tampered(inner)
        if reason:
            return f"{name or 'it'} {reason}"
    return None


def _single_layer(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.") and next(module.children(), None) is None


def _tampered(module: nn.Module) -> str | None:
    """What makes calling `module` do more than its class says."""
    if module._forward_hooks or module._forward_pre_hooks:
        return "carries forward hooks, which a graph would freeze or lose"
    if "forward" in vars(module) and not only_compiled(module):
        return "has had its forward replaced (offloading, caching or quantisation hooks)"
    if type(module).__module__.partition(".")[0] == "peft":
        return "is an adapter layer: merge the adapter into the weights first"
    for name, parameter in module.named_parameters(recurse=False):
        if type(parameter) not in (nn.Parameter, Tensor):
            kind = type(parameter).__name__
            return (
                f"has a {name} that is a {kind} (quantised or sharded), which no graph takes: load it as a plain tensor"
            )
    return None
