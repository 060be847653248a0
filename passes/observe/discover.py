"""Find the transformer blocks of a model by running it, among the candidates that its lists of modules hold.

Runs, for S shape buckets of batch B_s: a survey of bucket 0 (which also warms lazy caches), every
bucket as given, every bucket with its batch doubled (passes.observe.batch_probe), and bucket 0 with another
timestep. A model of rows takes one sample (passes.observe.adapt) where nothing can be doubled, nothing that was
gave a block several rows for each, and all timesteps are one; instead of being doubled, that sample is
disturbed. From these:

    d carries the batch in a leaf   <=>  size(d) alone grows from the given run to the doubled run,
                                         from B to 2B, or as passes.observe.adapt says
    a leaf is the time embedding    <=>  it is a float (B, E) and changes when only the timestep does
    rows are independent            <=>  the first B rows of a doubled run equal the given run

A model that keeps something of its arguments for later calls is refused (passes.observe.kept).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from passes.graphs.batch_layout import Adapter, Samples
from passes.graphs.graph import BlockSite, Call, Discovery, Refusal, Report, Run
from passes.graphs.held import Held, differing, held_by
from passes.graphs.naming import told_of_structure
from passes.graphs.progress import tell
from passes.graphs.record import own, record, undisturbed
from passes.graphs.weightless import changed_by, hollow, same
from passes.observe.adapt import adapted, check_alone, find_adapter, leads, leads_in_runs, lone, unpacked
from passes.observe.batch_probe import batches_of, disturbed_all, doublings, entries_alone, opaque, other_steps, told_by
from passes.observe.candidates import find_candidates
from passes.observe.kept import Attributes, find_kept
from passes.observe.sights import Sights
from passes.observe.statement import StatementError, Statements, check_batch, check_blocks, stated_batch, stated_sizes
from runtime.base.errors import EditError

_STEP_NAMES = ("timestep", "timesteps", "t", "time", "sigma", "sigmas")


class DiscoveryError(EditError):
    """The model could not be observed; the message says what stood in the way."""


@dataclass(frozen=True)
class _Observation:
    """What one run of the model showed."""

    calls: dict[str, Call]
    output: object
    held: Mapping[str, Held]


@dataclass(frozen=True)
class _Watch:
    """Runs `model` and tells what its `sights.watched` modules were called with; `sights` keeps what they held."""

    model: nn.Module
    sights: Sights

    def see(self, kwargs: Mapping[str, object]) -> _Observation:
        with self.sights.taken() as held:
            return _Observation(*record(self.model, kwargs, self.sights.watched), held)

    def count(self, observation: _Observation) -> _Observation:
        self.sights.keep(observation.held)
        return observation


def discover(
    model: nn.Module,
    inputs: Mapping[str, object] | Sequence[Mapping[str, object]],
    timestep: str | None = None,
    only: Collection[str] | None = None,
    stated: Statements = (),
) -> tuple[Discovery, Report]:
    """Blocks of `model` in execution order, each with its call in every run; those named in `only`, if it is given.

    `inputs` are keyword arguments of ``model.forward``, one mapping per shape bucket; `timestep` is
    the keyword that holds the timestep where it has an unusual name; `stated` is what else cannot be
    told. Runs are ordered: every bucket as given, then every bucket doubled. The model's training flags
    and the grad mode are restored.

    Raises DiscoveryError where no argument is the timestep, where no batch can be told, where the rows of
    a batch influence one another, or where the model keeps what it makes of an argument; StatementError where what
    is `stated` does not fit the model.
    """
    buckets = [inputs] if isinstance(inputs, Mapping) else list(inputs)
    if not buckets:
        raise DiscoveryError("no inputs were given")
    step = timestep or _step_name(buckets)
    if any(step not in kwargs for kwargs in buckets):
        raise DiscoveryError(f"the timestep is said to be {step!r}, but the inputs are {', '.join(buckets[0])}")
    check_batch(stated, model, buckets)
    with undisturbed(model):
        before = Attributes.of(model)
        watched, refused, work = find_candidates(model, buckets[0])
        check_blocks(stated, model, watched, refused)
        kept = find_kept(model, buckets[0], step, before)
        if kept is not None:
            raise DiscoveryError(kept)
        strange = [] if only is None else [name for name in watched if name not in only]
        refused += [Refusal(name, "was no block when the model was first traced") for name in strange]
        watched = {name: module for name, module in watched.items() if name not in strange}
        watch = _Watch(model, Sights(watched))
        runs, seen = _observe(watch, buckets, step, stated_batch(stated))
        tell("running the model", len(buckets), len(buckets) + 1)
        held = held_by(model)
        moved = dict(buckets[0]) | {step: other_steps(buckets[0][step])}
        probe = changed_by(moved[step], lambda: watch.count(watch.see(moved)).calls, seen[0].calls)
        watch.sights.see_otherwise(lambda kwargs: model(**own(kwargs)), buckets[0])
        written = differing(held, held_by(model))
    samples = _samples(runs)
    sites: list[BlockSite] = []
    for name in (name for name in seen[0].calls if name in watched):
        calls = (*(observation.calls.get(name) for observation in seen), probe.get(name))
        site = _site(name, watched[name], calls, runs, samples)
        site = site if isinstance(site, Refusal) else replace(site, changing=watch.sights.changing(name))
        if isinstance(site, Refusal):
            refused.append(site)
        else:
            sites.append(site)
    done = tuple(_sentence(site) for site in sites)
    if lone(runs):
        done = ("the inputs are taken as one sample, since nothing in them can be doubled", *done)
    discovery = Discovery(model, runs, tuple(sites), step, samples, work, written)
    return discovery, Report("discover", done, tuple(refused))


def _step_name(buckets: Sequence[Mapping[str, object]]) -> str:
    for name in _STEP_NAMES:
        if all(name in kwargs for kwargs in buckets):
            return name
    raise DiscoveryError(f"no argument is called any of {', '.join(_STEP_NAMES)}: say which one is with timestep=")


def _observe(
    watch: _Watch, buckets: Sequence[Mapping[str, object]], step: str, stated: Mapping[str, int | None]
) -> tuple[tuple[Run, ...], list[_Observation]]:
    """Every bucket as given, then every bucket doubled."""
    given: list[tuple[Run, _Observation]] = []
    doubled: list[tuple[Run, _Observation]] = []
    for index, kwargs in enumerate(buckets):
        tell("running the model", index, len(buckets) + 1)
        first = watch.count(watch.see(kwargs))
        run, twice, second = _double_run(watch, kwargs, index, step, first, stated)
        watch.count(second)
        given.append((run, first))
        doubled.append((twice, second))
    pairs = given + doubled
    return tuple(run for run, _ in pairs), [observation for _, observation in pairs]


def _double_run(
    watch: _Watch,
    given: Mapping[str, object],
    bucket: int,
    step: str,
    first: _Observation,
    stated: Mapping[str, int | None],
) -> tuple[Run, Run, _Observation]:
    """The run as given, now that its batch is known, and the doubled one with what it showed."""
    sizes = stated_sizes(stated, given)
    batches = sizes or batches_of(given, step)
    if not batches:
        raise DiscoveryError(f"bucket {bucket}: neither {step} nor any float tensor has a batch dimension")
    reasons: list[str] = []
    lone = not sizes and _only_rows(first) and _one_time(given[step]) and not any(opaque(given))
    for batch, kwargs in ((size, kwargs) for size in batches for kwargs in doublings(given, step, size, stated)):
        try:
            second = watch.see(kwargs)
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
            reasons.append(f"{type(error).__name__}: {error}")
            continue
        different = _difference(first, second, batch)
        if different is None:
            return Run(given, batch, bucket, first.output), Run(kwargs, 2 * batch, bucket, second.output), second
        reasons.append(different)
        lone = lone and not (entries_alone(given, kwargs, batch) and _gained_tokens(first, second, batch))
    if lone:
        kwargs = disturbed_all(given, step)
        second = watch.see(kwargs)
        return Run(given, 1, bucket, first.output), Run(kwargs, 1, bucket, second.output), second
    if sizes:
        places = " and ".join(
            f"not in {name!r}" if dim is None else f"dimension {dim} of {name!r}" for name, dim in stated.items()
        )
        raise StatementError(
            f"bucket {bucket}: the batch is stated to be {places}, but {batches[0]} samples could not be doubled there "
            f"({reasons[0]}): state another dimension, or leave it out"
        )
    told = "".join(
        f"; {strange}, which cannot be doubled: give its tensors as a list or dict, and make it of them in a "
        "forward of your own"
        for strange in opaque(given)
    )
    raise DiscoveryError(f"bucket {bucket}: the batch of {batches[0]} could not be doubled ({reasons[0]}{told})")


def _one_time(steps: object) -> bool:
    """Whether all timesteps are one: tokens of one sample share it."""
    return not isinstance(steps, Tensor) or hollow(steps) or bool((steps == steps.reshape(-1)[0]).all())


def _only_rows(observation: _Observation) -> bool:
    """Whether there are blocks, and all that they return are rows (N, D)."""
    outputs = [leaf for call in observation.calls.values() for leaf in call.outputs if isinstance(leaf, Tensor)]
    return bool(outputs) and all(leaf.ndim == 2 for leaf in outputs)


def _gained_tokens(first: _Observation, second: _Observation, batch: int) -> bool:
    """Whether `batch` more samples gave a block several more rows each: then there is a batch."""
    for name, call in first.calls.items():
        pairs = zip(call.outputs, second.calls[name].outputs if name in second.calls else (), strict=False)
        grown = (len(b) - len(a) for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor))
        if any(more > batch and more % batch == 0 for more in grown):
            return True
    return False


def _samples(runs: Sequence[Run]) -> Samples | None:
    """The first place of the arguments that tells the batch in every bucket."""
    if lone(runs):
        return Samples((), None)
    half = len(runs) // 2
    pairs = zip(runs[:half], runs[half:], strict=True)
    first, *others = ([*told_by(given.kwargs, doubled.kwargs, given.batch)] for given, doubled in pairs)
    return next((place for place in first if all(place in other for other in others)), None)


def _difference(first: _Observation, second: _Observation, batch: int) -> str | None:
    """Where the leading rows of the doubled run are not those of the given run."""
    for name, call in first.calls.items():
        if name not in second.calls:
            return f"{name} was not called"
        if not _leads(call.outputs, second.calls[name].outputs, batch):
            return f"rows of one sample changed at {name} when other samples joined the batch"
    if first.calls and not any(_grew(call.outputs, second.calls[name].outputs) for name, call in first.calls.items()):
        return "no block saw a larger batch"
    if not _leads(pytree.tree_leaves(first.output), pytree.tree_leaves(second.output)):
        return "rows of one sample changed at the model's output when other samples joined the batch"
    return None


def _grew(given: Sequence[object], doubled: Sequence[object]) -> bool:
    pairs = zip(given, doubled, strict=False)
    return any(isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape != b.shape for a, b in pairs)


def _leads(given: Sequence[object], doubled: Sequence[object], batch: int = 0) -> bool:
    """Whether each float tensor of `given` equals the leading part of its counterpart.

    That of each run over the samples will do, where it holds them several times.
    """
    return len(given) <= len(doubled) and all(
        isinstance(large, Tensor) and (leads(small, large) or (bool(batch) and leads_in_runs(small, large, batch)))
        for small, large in zip(given, doubled, strict=False)
        if isinstance(small, Tensor) and small.is_floating_point()
    )


def _site(
    name: str, module: nn.Module, calls: Sequence[Call | None], runs: Sequence[Run], samples: Samples | None
) -> BlockSite | Refusal:
    """The site of a block from its `calls` in every run and in the probe of the timestep."""
    (*whole, probe) = (call for call in calls if call is not None)
    if len(whole) != len(runs):
        return Refusal(name, "was called in some shape buckets only")
    if any(call.spec != whole[0].spec or call.output_spec != whole[0].output_spec for call in (*whole, probe)):
        return Refusal(name, told_of_structure(module, (*whole, probe)))
    found = _seen_per_sample(module, whole, runs, samples, offsets=True)
    if isinstance(found, str) and not isinstance(other := _seen_per_sample(module, whole, runs, samples), str):
        found = other
    if isinstance(found, str):
        return Refusal(name, found)
    adapter, module, whole = found
    probe = probe if adapter.plain else unpacked(adapter, probe, runs[0].batch)
    batch_dims = {at: dim for at, dim in enumerate(adapter.dims) if dim is not None}
    if not _batched_tokens(whole[0], batch_dims):
        return Refusal(name, "returns no tokens that carry the batch")
    time = next((at for at in _times(whole[0], probe) if batch_dims.get(at) == 0), None)
    return BlockSite(name, module, tuple(whole), batch_dims, time, None if adapter.plain else adapter)


def _seen_per_sample(
    module: nn.Module, calls: list[Call], runs: Sequence[Run], samples: Samples | None, offsets: bool = False
) -> tuple[Adapter, nn.Module, list[Call]] | str:
    """How a block holds the batch, and the block and its calls as seen per sample; or why that cannot be told."""
    adapter = find_adapter(module, calls, runs, offsets)
    if isinstance(adapter, str) or adapter.plain:
        return adapter if isinstance(adapter, str) else (adapter, module, calls)
    if samples is None:
        return "holds several rows per sample, and no argument of the model tells how many samples"
    alone = adapted(module, adapter)
    seen = [unpacked(adapter, call, run.batch) for call, run in zip(calls, runs, strict=True)]
    return check_alone(alone, adapter, seen[-1], runs[-1].batch) or (adapter, alone, seen)


def _times(call: Call, probe: Call) -> Iterator[int]:
    """The (B, E) float leaves that change with the timestep alone."""
    for position, (leaf, other) in enumerate(zip(call.leaves, probe.leaves, strict=True)):
        if not isinstance(leaf, Tensor) or not isinstance(other, Tensor) or leaf.shape != other.shape:
            continue
        if leaf.ndim == 2 and leaf.is_floating_point() and not same(leaf, other):
            yield position


def _batched_tokens(call: Call, batch_dims: Mapping[int, int]) -> bool:
    """Whether some output has the shape of an input of tokens that carries the batch."""
    shapes = [leaf.shape for leaf in (call.leaves[at] for at in batch_dims) if isinstance(leaf, Tensor)]
    return any(isinstance(leaf, Tensor) and leaf.ndim >= 3 and leaf.shape in shapes for leaf in call.outputs)


def _sentence(site: BlockSite) -> str:
    tensors = sum(isinstance(leaf, Tensor) for leaf in site.calls[0].leaves)
    time = "no time embedding" if site.time is None else f"time embedding at leaf {site.time}"
    seen = ", seen per sample" if site.adapter else ""
    return f"{site.name}: {type(site.module).__name__}, {tensors} tensors in, {time}{seen}"
