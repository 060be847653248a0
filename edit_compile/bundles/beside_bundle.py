"""What a command needs beside a bundle: inputs, its model, a schedule."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from edit_compile.bundles.verify import random_inputs
from edit_compile.elastic.transformer import ElasticTransformer
from edit_compile.loading import UserError, load_inputs, load_model, parse_dtype, parse_numbers
from runtime.routing.branched import BranchedPolicy
from runtime.routing.schedule import ScheduledPolicy


def inputs_for(compiled: Any, path: Path | None) -> dict[str, Any]:
    """The file's keyword arguments, or noise in the shapes that the bundle was compiled for; where the bundle runs."""
    given = load_inputs(path) if path else random_inputs(compiled.program.manifest)
    moved: dict[str, Any] = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(compiled.device), given)
    return moved


def model_like(compiled: Any, where: str) -> Any:
    """The model `where`, in the dtype and on the device of `compiled`."""
    return load_model(where, parse_dtype(compiled.program.manifest.dtype)).to(compiled.device)


def dense(model: Any) -> Any:
    """The model without its routers."""
    return model.model if isinstance(model, ElasticTransformer) else model


def apply_schedule(compiled: Any, budget: str | None, steps: int) -> None:
    """Have a random schedule of a budget "gate,width" decide, if one is given; UserError for another form."""
    if budget is None:
        return
    try:
        gate, width = parse_numbers(budget)
    except ValueError:
        raise UserError(f"--schedule takes two shares, gate and width, not {budget!r}") from None
    manifest = compiled.program.manifest
    compiled.policy = ScheduledPolicy.at_budget(steps, len(manifest.blocks), gate, width, widths=manifest.widths)


def decide_in_one_branch(compiled: Any, say: Callable[[str], object]) -> None:
    """Have a tier that decides by branch of guidance do so as in its first branch, and `say` it: commands name none."""
    policy = compiled.policy
    if isinstance(policy, BranchedPolicy) and policy.branches:
        name, compiled.policy = next(iter(policy.branches.items()))
        say(f"the tier decides by branch of guidance: all calls are taken for those of its first, {name!r}")
