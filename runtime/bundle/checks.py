"""Whether what a manifest says holds together, and fits the tensors beside it; BundleError where not."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from runtime.base.errors import BundleError
from runtime.bundle.program import Program
from runtime.bundle.spec import Form, Glue, Manifest, Plan, PlanInput, Policy, RouterConfig

_FUNCTIONS = (
    "celu elu gelu hardsigmoid hardswish hardtanh leaky_relu mish relu relu6 selu sigmoid silu softplus softsign tanh"
)
_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")
ACTIVATIONS = frozenset(_FUNCTIONS.split())
"""Functions of torch.nn.functional that a router may name."""


def check(program: Program) -> None:
    """BundleError, naming the place, where the parts of `program` do not refer to each other rightly."""
    manifest = program.manifest
    _check_dtype(manifest.dtype, "the model")
    _check_widths(manifest.widths, "the manifest")
    plans = {plan.id: plan for plan in manifest.plans}
    _check_names("plan", [plan.id for plan in manifest.plans])
    _check_names("glue", [glue.id for glue in manifest.glues])
    _check_texts(manifest)
    _need(bool(manifest.glues), "it has no glue, so that there is nothing to call")
    _need(bool(manifest.timestep), "no argument tells the timestep")
    _check_policy(manifest.policy)
    for plan in manifest.plans:
        _check_plan(plan)
    for block in manifest.blocks:
        for form in block.forms:
            _check_form(block.name, form, plans, program.weights)
    for glue in manifest.glues:
        _check_glue(glue, plans, program)
        _check_arguments(glue, manifest)
    if manifest.router is not None:
        _check_router(manifest.router)
    _check_router_keys(program.routers, manifest)
    if manifest.router is not None and program.routers:
        for index, block in enumerate(manifest.blocks):
            _check_router_of(index, plans[block.plan], manifest.router, program.routers)


def _check_plan(plan: Plan) -> None:
    where = f"plan {plan.id}"
    for given in plan.inputs:
        _check_dtype(given.dtype, f"input {given.name} of {where}")
        _need(
            given.batch_dim is None or 0 <= given.batch_dim < len(given.shape),
            f"input {given.name} of {where} has no dimension {given.batch_dim}",
        )
    _need(bool(plan.states), f"{where} has no states")
    for index in (*plan.states, *(() if plan.time is None else (plan.time,))):
        _need(0 <= index < len(plan.inputs), f"{where} has no input {index}")
    _need(
        not plan.single_row or all(plan.inputs[index].batch_dim is not None for index in plan.states),
        f"{where} takes one row per call, but one of its states has no rows",
    )
    for bucket in plan.buckets:
        _need(
            len(bucket) == len(plan.inputs) and all(map(_fits, bucket, plan.inputs)),
            f"{where} was compiled for the shapes {bucket}, which its inputs do not have",
        )
    _check_widths([variant.width for variant in plan.variants], where)
    for variant in plan.variants:
        _need(
            len(variant.rows) == len(plan.weights) and min(variant.rows, default=0) >= 0,
            f"{where} has {len(plan.weights)} weights, its variant {variant.width:g} rows {variant.rows}",
        )


def _fits(shape: tuple[int | None, ...], given: PlanInput) -> bool:
    """Whether `shape` is one of `given`, with nothing free but the batch."""
    return len(shape) == len(given.shape) and all(
        want in (None, have) and (have is not None or dim == given.batch_dim)
        for dim, (have, want) in enumerate(zip(shape, given.shape, strict=True))
    )


def _check_form(block: str, form: Form, plans: Mapping[str, Plan], weights: Mapping[str, Tensor]) -> None:
    _need(form.plan in plans, f"block {block} runs the plan {form.plan!r}, which is not there")
    plan = plans[form.plan]
    _need(
        len(form.weights) == len(plan.weights),
        f"block {block} has {len(form.weights)} weights, its plan {len(plan.weights)}",
    )
    _check_weights(form.weights, weights, f"block {block}")
    for key, rows in zip(form.weights, zip(*(v.rows for v in plan.variants), strict=True), strict=True):
        weight = weights[key]
        _need(weight.dim() == 0 or weight.shape[0] >= max(rows), f"{key} of block {block} has too few rows")


def _check_glue(glue: Glue, plans: Mapping[str, Plan], program: Program) -> None:
    where = f"glue {glue.id}"
    _need(glue.file is None or glue.file in program.files, f"{where} names the file {glue.file!r}, which is not there")
    _check_weights(glue.weights, program.weights, where)
    for given in glue.inputs:
        _check_dtype(given.dtype, f"input {given.name} of {where}")
    for cost in glue.costs:
        known = cost.plan in plans and 0 <= cost.variant < len(plans[cost.plan].variants)
        _need(known, f"{where} has a cost of plan {cost.plan!r}, variant {cost.variant}, which is not there")


def _check_arguments(glue: Glue, manifest: Manifest) -> None:
    """Whether a glue takes what the model does, and names its own inputs and outputs."""
    where, inputs = f"glue {glue.id}", {given.name for given in glue.inputs}
    for name in (*inputs, *glue.constants):
        known = name.partition(".")[0] in manifest.arguments or "**" in manifest.arguments
        _need(known, f"{where} takes {name!r}, which the model does not")
    told = manifest.timestep in inputs or manifest.timestep in glue.constants
    _need(told, f"{where} has no input {manifest.timestep!r}, which tells the timestep")
    latents = [name for name, _ in glue.latents]
    _need(manifest.timestep not in latents, f"{where} has {manifest.timestep!r} for its timestep and its latents")
    for name in (*glue.sized_by, *latents):
        _need(name in inputs, f"{where} has no input {name!r}")
    for _, position in glue.latents:
        _need(0 <= position < max(len(glue.outputs), 1), f"{where} has no output {position}")


def _check_weights(keys: Sequence[str], weights: Mapping[str, Tensor], where: str) -> None:
    for key in keys:
        _need(key in weights, f"weights.safetensors lacks {key!r} of {where}")


def _check_router(router: RouterConfig) -> None:
    for name, known in (
        ("activation", ACTIVATIONS),
        ("time_activation", {None, *ACTIVATIONS}),
        ("modulation", {"full", "low_rank", "none"}),
    ):
        value = getattr(router, name)
        _need(value in known, f"the router's {name} {value!r} is none that is known")
    _need(router.token_stride >= 1, f"the router's token_stride {router.token_stride} is less than one token")
    _check_widths(router.widths, "the router")


def _check_router_of(index: int, plan: Plan, config: RouterConfig, routers: Mapping[str, Tensor]) -> None:
    """Whether the router of block `index` is there, with the shapes that `runtime.routing.router.Router` has."""
    first = plan.inputs[plan.states[0]].shape
    time = (config.time_dim,) if plan.time is None else plan.inputs[plan.time].shape
    sizes: dict[str, tuple[int | None, ...]] = {
        "hidden.weight": (config.hidden, first[-1] if first else None),
        "hidden.bias": (config.hidden,),
        "gate.weight": (1, config.hidden),
        "gate.bias": (1,),
        "width.weight": (len(config.widths), config.hidden),
        "width.bias": (len(config.widths),),
    }
    twice = None if not first or first[-1] is None else 2 * first[-1]
    if config.modulation == "full":
        sizes["modulation.weight"] = (twice, time[-1] if time else None)
    elif config.modulation == "low_rank":
        sizes["modulation.0.weight"] = (config.rank, time[-1] if time else None)
        sizes["modulation.1.weight"] = (twice, config.rank)
    for name, shape in sizes.items():
        has = routers.get(f"{index}.{name}")
        _need(has is not None, f"routers.safetensors lacks {index}.{name}")
        assert has is not None
        agree = has.dim() == len(shape) and all(b in (None, a) for a, b in zip(has.shape, shape, strict=True))
        _need(agree, f"{index}.{name} in routers.safetensors has the shape {tuple(has.shape)}, not {shape}")
        _need(has.is_floating_point(), f"{index}.{name} in routers.safetensors is of {has.dtype}")
    _need(len({routers[f"{index}.{name}"].dtype for name in sizes}) == 1, f"router {index} is of several dtypes")


def _check_texts(manifest: Manifest) -> None:
    """Whether what a terminal is shown can be shown: no names that move its cursor."""
    texts = [manifest.model, manifest.timestep, *manifest.arguments, *manifest.tiers, *manifest.files]
    texts += [text for pair in manifest.versions.items() for text in pair]
    texts += [block.name for block in manifest.blocks]
    texts += [text for plan in manifest.plans for text in (plan.kind, *(given.name for given in plan.inputs))]
    texts += [given.name for glue in manifest.glues for given in glue.inputs]
    texts += [tier.machine or "" for tier in manifest.tiers.values()]
    for text in texts:
        _need(text.isprintable(), f"{text[:60]!r} is no name that can be shown")


def _check_policy(policy: Policy) -> None:
    within = 0.0 <= policy.threshold <= 1.0 and 0.0 <= policy.margin <= 1.0
    _need(within and policy.max_reuse >= 0 and policy.warmup_steps >= 0, f"the policy {policy} makes no sense")


def _check_names(what: str, ids: Sequence[str]) -> None:
    """Whether ids can be parts of files' names, and are each given once."""
    for name in ids:
        well = bool(_ID.fullmatch(name)) and ids.count(name) == 1
        _need(well, f"the {what} {name!r} is there twice, or no file's name")


def _check_router_keys(keys: Mapping[str, Tensor], manifest: Manifest) -> None:
    told = "there are routers' weights, but no router is described, or none for the router described"
    _need(bool(keys) == (manifest.router is not None), told)
    for key in keys:
        index, _, name = key.partition(".")
        known = index.isdecimal() and int(index) < len(manifest.blocks) and name
        _need(bool(known), f"routers.safetensors holds {key!r}, which is no block's")


def _check_widths(widths: Sequence[float], where: str) -> None:
    ascending = all(low < high for low, high in pairwise(widths))
    _need(
        bool(widths) and ascending and widths[0] > 0 and widths[-1] == 1.0,
        f"the widths of {where} are {list(widths)}: they have to ascend to 1",
    )


def _check_dtype(name: str, where: str) -> None:
    _need(isinstance(getattr(torch, name, None), torch.dtype), f"{where} has the dtype {name!r}, which torch lacks")


def _need(holds: bool, told: str) -> None:
    if not holds:
        raise BundleError(f"manifest.json does not hold together: {told}; copy or compile the bundle again")
