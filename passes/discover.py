"""Find the transformer blocks of a model by running it.

A *block* is an entry of a ``nn.ModuleList``, called exactly once per forward, that has parameters,
is more than a single layer, and returns a float tensor of tokens (three or more dimensions) of the
shape and dtype of one of its inputs. Lists inside a block are its own affair; lists inside an entry
that is no block are looked at.

Runs, for S shape buckets of batch B_s: a survey of bucket 0 (which also warms lazy caches), every
bucket as given, every bucket with its batch doubled (passes.doubling), and bucket 0 with another
timestep. From these:

    d carries the batch in a leaf   <=>  size(d) is B in the given run and 2B in the doubled run,
                                         and every other dimension is equal
    a leaf is the time embedding    <=>  it is a float (B, E) and changes when only the timestep does
    rows are independent            <=>  the first B rows of a doubled run equal the given run
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from passes.doubling import batch_of, doublings, other_steps
from passes.graph import BlockSite, Call, Discovery, Refusal, Report, Run
from passes.record import Glimpse, record, survey, undisturbed
from runtime.errors import EditError

_STEP_NAMES = ("timestep", "timesteps", "t", "time", "sigma", "sigmas")
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


class DiscoveryError(EditError):
    """The model could not be observed; the message says what stood in the way."""


@dataclass(frozen=True)
class _Observation:
    """What one run of the model showed."""

    calls: dict[str, Call]
    output: object


def discover(
    model: nn.Module, inputs: Mapping[str, object] | Sequence[Mapping[str, object]], timestep: str | None = None
) -> tuple[Discovery, Report]:
    """Blocks of `model` in execution order, each with its call in every run.

    `inputs` are keyword arguments of ``model.forward``, one mapping per shape bucket; `timestep` is
    the keyword that holds the timestep where it has an unusual name. Runs are ordered: every bucket
    as given, then every bucket doubled. The model's training flags and the grad mode are restored.

    Raises DiscoveryError where no argument is the timestep, where no batch can be told, or where the
    rows of a batch influence one another.
    """
    buckets = [inputs] if isinstance(inputs, Mapping) else list(inputs)
    if not buckets:
        raise DiscoveryError("no inputs were given")
    step = timestep or _step_name(buckets)
    with undisturbed(model):
        watched, refused = _blocks(model, buckets[0])
        runs, seen = _observe(model, buckets, step, watched)
        times = _times(model, buckets[0], step, watched, seen[0])
    sites: list[BlockSite] = []
    for name in (name for name in seen[0].calls if name in watched):
        calls = tuple(observation.calls.get(name) for observation in seen)
        site = _site(name, watched[name], calls, runs, times[name])
        if isinstance(site, Refusal):
            refused.append(site)
        else:
            sites.append(site)
    done = tuple(_sentence(site) for site in sites)
    return Discovery(model, runs, tuple(sites), step), Report("discover", done, tuple(refused))


def _step_name(buckets: Sequence[Mapping[str, object]]) -> str:
    for name in _STEP_NAMES:
        if all(name in kwargs for kwargs in buckets):
            return name
    raise DiscoveryError(f"no argument is called any of {', '.join(_STEP_NAMES)}: say which one is with timestep=")


def _blocks(model: nn.Module, kwargs: Mapping[str, object]) -> tuple[dict[str, nn.Module], list[Refusal]]:
    """Modules to record, by name, and the candidates refused."""
    candidates = dict(_candidates(model, ""))
    glimpses = survey(model, kwargs, candidates)
    watched: dict[str, nn.Module] = {}
    refused: list[Refusal] = []
    settled: list[str] = []
    for name, module in candidates.items():
        if any(name.startswith(f"{outer}.") for outer in settled):
            continue
        seen = glimpses[name]
        if not any(_keeps_shape(glimpse) for glimpse in seen):
            reason = "returns no tensor of tokens shaped like an input" if seen else "was not called"
            refused.append(Refusal(name, reason))
            continue
        settled.append(name)
        objection = _objection(module, seen)
        if objection:
            refused.append(Refusal(name, objection))
        else:
            watched[name] = module
    return watched, refused


def _candidates(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Every entry of every module list under `module`, outer ones first, each module once."""
    seen: set[nn.Module] = set()
    for name, entry in module.named_modules(prefix=prefix):
        for key, child in entry.named_children() if isinstance(entry, nn.ModuleList) else ():
            if child not in seen:
                seen.add(child)
                yield f"{name}.{key}" if name else key, child


def _keeps_shape(glimpse: Glimpse) -> bool:
    return any(
        len(shape) >= 3 and dtype.is_floating_point and (shape, dtype) in glimpse.inputs
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
    if type(module).__module__.startswith("torch.nn.") and next(module.children(), None) is None:
        return "is a single layer"
    for name, inner in module.named_modules():
        reason = _tampered(inner)
        if reason:
            return f"{name or 'it'} {reason}"
    return None


def _tampered(module: nn.Module) -> str | None:
    """What makes calling `module` do more than its class says."""
    if module._forward_hooks or module._forward_pre_hooks:
        return "carries forward hooks, which a graph would freeze or lose"
    if "forward" in vars(module):
        return "has had its forward replaced (offloading, caching or quantisation hooks)"
    if type(module).__module__.partition(".")[0] == "peft":
        return "is an adapter layer: merge the adapter into the weights first"
    return None


def _observe(
    model: nn.Module, buckets: Sequence[Mapping[str, object]], step: str, watched: Mapping[str, nn.Module]
) -> tuple[tuple[Run, ...], list[_Observation]]:
    """Every bucket as given, then every bucket doubled."""
    given: list[tuple[Run, _Observation]] = []
    doubled: list[tuple[Run, _Observation]] = []
    for index, kwargs in enumerate(buckets):
        batch = batch_of(kwargs, step)
        if batch is None:
            raise DiscoveryError(f"bucket {index}: neither {step} nor any float tensor has a batch dimension")
        first = _Observation(*record(model, kwargs, watched))
        given.append((Run(kwargs, batch, index), first))
        doubled.append(_double_run(model, Run(kwargs, batch, index), step, watched, first))
    pairs = given + doubled
    return tuple(run for run, _ in pairs), [observation for _, observation in pairs]


def _double_run(
    model: nn.Module, run: Run, step: str, watched: Mapping[str, nn.Module], first: _Observation
) -> tuple[Run, _Observation]:
    reasons: list[str] = []
    for kwargs in doublings(run.kwargs, step, run.batch):
        try:
            second = _Observation(*record(model, kwargs, watched))
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
            reasons.append(f"{type(error).__name__}: {error}")
            continue
        different = _difference(first, second)
        if different is None:
            return Run(kwargs, 2 * run.batch, run.bucket), second
        reasons.append(different)
    raise DiscoveryError(f"bucket {run.bucket}: the batch of {run.batch} could not be doubled ({reasons[0]})")


def _difference(first: _Observation, second: _Observation) -> str | None:
    """Where the leading rows of the doubled run are not those of the given run."""
    for name, call in first.calls.items():
        if name not in second.calls:
            return f"{name} was not called"
        if not _leads(call.outputs, second.calls[name].outputs):
            return f"rows of one sample changed at {name} when other samples joined the batch"
    if first.calls and not any(_grew(call.outputs, second.calls[name].outputs) for name, call in first.calls.items()):
        return "no block saw a larger batch"
    if not _leads(pytree.tree_leaves(first.output), pytree.tree_leaves(second.output)):
        return "rows of one sample changed at the model's output when other samples joined the batch"
    return None


def _grew(given: Sequence[object], doubled: Sequence[object]) -> bool:
    pairs = zip(given, doubled, strict=False)
    return any(isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape != b.shape for a, b in pairs)


def _leads(given: Sequence[object], doubled: Sequence[object]) -> bool:
    """Whether each tensor of `given` equals the leading part of its counterpart."""
    if len(given) > len(doubled):
        return False
    for small, large in zip(given, doubled, strict=False):
        if not isinstance(small, Tensor) or not small.is_floating_point():
            continue
        if not isinstance(large, Tensor) or small.ndim != large.ndim:
            return False
        lead = large[tuple(slice(size) for size in small.shape)]
        scale = small.abs().max() if small.numel() else 1
        if lead.shape != small.shape or (lead - small).abs().max() > _TOLERANCE[small.dtype] * scale:
            return False
    return True


def _times(
    model: nn.Module,
    kwargs: Mapping[str, object],
    step: str,
    watched: Mapping[str, nn.Module],
    given: _Observation,
) -> dict[str, list[int]]:
    """Per block, the (B, E) float leaves that change with the timestep alone."""
    probe, _ = record(model, dict(kwargs) | {step: other_steps(kwargs[step])}, watched)
    return {
        name: [
            position
            for position, (leaf, other) in enumerate(zip(call.leaves, probe[name].leaves, strict=False))
            if isinstance(leaf, Tensor)
            and isinstance(other, Tensor)
            and leaf.ndim == 2
            and leaf.is_floating_point()
            and leaf.shape == other.shape
            and not torch.equal(leaf, other)
        ]
        for name, call in given.calls.items()
        if name in probe
    }


def _site(
    name: str, module: nn.Module, calls: Sequence[Call | None], runs: Sequence[Run], times: Sequence[int]
) -> BlockSite | Refusal:
    whole = tuple(call for call in calls if call is not None)
    if len(whole) != len(calls):
        return Refusal(name, "was called in some shape buckets only")
    if any(call.spec != whole[0].spec or call.output_spec != whole[0].output_spec for call in whole):
        return Refusal(name, "is called in another way in another run")
    batch_dims = _batch_dims(whole, runs)
    if isinstance(batch_dims, str):
        return Refusal(name, batch_dims)
    if not _batched_tokens(whole[0], batch_dims):
        return Refusal(name, "returns no tokens that carry the batch")
    return BlockSite(name, module, whole, batch_dims, next((at for at in times if batch_dims.get(at) == 0), None))


def _batched_tokens(call: Call, batch_dims: Mapping[int, int]) -> bool:
    """Whether some output has the shape of an input of tokens that carries the batch."""
    shapes = [leaf.shape for leaf in (call.leaves[at] for at in batch_dims) if isinstance(leaf, Tensor)]
    return any(isinstance(leaf, Tensor) and leaf.ndim >= 3 and leaf.shape in shapes for leaf in call.outputs)


def _batch_dims(calls: Sequence[Call], runs: Sequence[Run]) -> dict[int, int] | str:
    """Dimension that carries the batch, per leaf position; or why it cannot be told."""
    found: dict[int, int] = {}
    half = len(calls) // 2
    for position, leaf in enumerate(calls[0].leaves):
        if not isinstance(leaf, Tensor):
            continue
        dims = {
            _batch_dim(given.leaves[position], doubled.leaves[position], run.batch)
            for given, doubled, run in zip(calls[:half], calls[half:], runs, strict=False)
        }
        if len(dims) != 1 or -1 in dims:
            return f"leaf {position} of its arguments does not hold one row per sample in one dimension"
        dim = dims.pop()
        if dim is not None:
            found[position] = dim
    return found


def _batch_dim(given: object, doubled: object, batch: int) -> int | None:
    """The dimension that doubled from `batch`, None where the shapes are equal, -1 where it is neither."""
    if not isinstance(given, Tensor) or not isinstance(doubled, Tensor) or given.ndim != doubled.ndim:
        return -1
    changed = [dim for dim in range(given.ndim) if given.shape[dim] != doubled.shape[dim]]
    if not changed:
        return None
    (dim, *others) = changed
    return dim if not others and given.shape[dim] == batch and doubled.shape[dim] == 2 * batch else -1


def _sentence(site: BlockSite) -> str:
    tensors = sum(isinstance(leaf, Tensor) for leaf in site.calls[0].leaves)
    time = "no time embedding" if site.time is None else f"time embedding at leaf {site.time}"
    return f"{site.name}: {type(site.module).__name__}, {tensors} tensors in, {time}"
