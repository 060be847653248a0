"""Decisions carried out around an eager model, block by block: what every compiled model has to agree with.

Written from Algorithm 1 and equation 13. Where blocks are, which outputs continue which inputs and what an MLP's
hidden channels are is taken from the analysis; what is done with them is not taken from anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from passes.observe.residuals import leaf_paths
from passes.program.check import masked
from passes.program.compilation import Compilation

SKIP, REUSE = 0.0, -1.0


class ScheduleOracle:
    """Calls the eager model with one decision per block: SKIP, REUSE (compute where nothing is stored), or a width."""

    def __init__(self, analysis: Compilation) -> None:
        self.analysis = analysis
        self.model = analysis.discovery.model
        self.bank: dict[str, list[Tensor]] = {}

    @torch.no_grad()
    def __call__(self, decisions: Sequence[float], inputs: Mapping[str, Any]) -> Any:
        with ExitStack() as stack:
            for index, decision in enumerate(decisions):
                stack.enter_context(self._decided(index, decision))
            return self.model(**pytree.tree_map_only(Tensor, Tensor.clone, dict(inputs)))

    def _decided(self, index: int, decision: float) -> ExitStack:
        site = self.analysis.discovery.blocks[index]
        group = self.analysis.groups[self.analysis.group_of[index]]
        module = self.model.get_submodule(site.name)
        paths = leaf_paths(site.calls[0])
        streams = [(output, paths[leaf]) for output, leaf in group.states.pairs]
        stack = ExitStack()
        if decision > 0 or (decision == REUSE and site.name not in self.bank):
            stack.enter_context(masked(module, group.sites, decision if decision > 0 else 1.0))
        hook = partial(self._after, site.name, decision, streams)
        stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        return stack

    def _after(
        self,
        name: str,
        decision: float,
        streams: Sequence[tuple[int, str]],
        _module: nn.Module,
        args: Any,
        kwargs: Any,
        output: Any,
    ) -> Any:
        given = {pytree.keystr(path): leaf for path, leaf in pytree.tree_flatten_with_path((args, kwargs))[0]}
        results, spec = pytree.tree_flatten(output)
        before = [given[path] for _, path in streams]
        after = [results[at] for at, _ in streams]
        if decision == SKIP:
            after = before
        elif decision == REUSE and name in self.bank:
            after = [x + delta for x, delta in zip(before, self.bank[name], strict=True)]
        else:
            self.bank[name] = [y - x for x, y in zip(before, after, strict=True)]
        for (at, _), value in zip(streams, after, strict=True):
            results[at] = value
        return pytree.tree_unflatten(results, spec)
