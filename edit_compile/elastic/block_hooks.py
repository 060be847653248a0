"""The hooks of an elastic model: what its forward does before a block, at its MLPs, and after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from edit_compile.elastic.adapters import is_adapter
from edit_compile.elastic.forward import Forward
from edit_compile.elastic.layout import BlockLayout, ElasticError, MaskedInput, Place, positional_names
from edit_compile.elastic.recomputation import active_forward, in_backward
from edit_compile.elastic.straight_through import channel_mask
from runtime.routing.router import rows_of_steps, sinusoid

if TYPE_CHECKING:
    from edit_compile.elastic.transformer import ElasticTransformer


def carries_hooks(model: nn.Module) -> bool:
    """Whether `model` is inside an elastic model that has its routers."""
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return any(isinstance(hook, BeforeBlock) for hook in hooks)


class BeforeBlock:
    """Runs the router on the block's inputs."""

    def __init__(self, elastic: ElasticTransformer, module: nn.Module, index: int, layout: BlockLayout) -> None:
        self.elastic, self.index, self.layout = elastic, index, layout
        self._inputs = _Inputs(module, layout)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note this block's decisions."""
        forward = active_forward(self.elastic)
        if forward is None:
            self._dense_call()
            return
        states, embedding = self._inputs.of(args, kwargs)
        rows = [forward.per_sample(state, self.layout.packing(index)) for index, state in enumerate(states)]
        time = self._time(forward, embedding, rows[0])
        with _without_autocast(rows[0].device.type):  # routers compute in the dtype of their parameters
            gate_logit, width_logits = self.elastic.routers[self.index](rows, time)
        forward.decide(self.index, gate_logit, width_logits)

    def _dense_call(self) -> None:
        """A call of the base model itself; ElasticError where it is one of an elastic forward, run again."""
        if torch.compiler.is_compiling() or self.elastic.called_densely:
            return
        if in_backward():
            raise ElasticError(
                f"{self.layout.name} is computed again in the backward pass by something other than "
                "torch.utils.checkpoint, so that it would run dense, unlike in the forward: use that for checkpointing"
            )
        self.elastic.called_densely = True

    def _time(self, forward: Forward, embedding: Tensor | None, like: Tensor) -> Tensor:
        if embedding is not None:
            return forward.per_sample(embedding, self.layout.time_packing)
        steps = rows_of_steps(torch.as_tensor(forward.timestep, device=like.device), len(like)).expand(len(like))
        return sinusoid(steps, self.layout.time_dim)


def _without_autocast(device: str) -> AbstractContextManager[object]:
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def check_maskable(module: nn.Module, name: str) -> None:
    """ElasticError where it cannot be told what masking the input of `module` does: it is neither layer nor adapter."""
    if not (isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) or is_adapter(module)):
        raise ElasticError(
            f"{name} is a {type(module).__name__} now, where a linear or convolution was found, and what masking its "
            "input does is not known: put it there before elasticize, or merge it"
        )


class BeforeDown:
    """Masks the hidden channels at the input of an MLP's down-projection (equation 13)."""

    def __init__(self, elastic: ElasticTransformer, index: int, mask: MaskedInput) -> None:
        self.elastic, self.index, self.mask = elastic, index, mask

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The masked input."""
        forward = active_forward(self.elastic)
        if forward is None:
            return None
        (value,) = args
        choice = forward.decision(self.index).choice
        dim, rows = self.mask.packing.dim, len(choice)
        size = value.shape[dim]
        if size != rows and not (self.mask.packing.folded and size % rows == 0):
            raise ElasticError(
                f"{self.mask.module}: its input {tuple(value.shape)} does not have the {rows} rows of the batch as "
                f"dimension {dim}, so that it cannot be masked per row"
            )
        total = value.shape[self.mask.dim]
        mask = channel_mask(choice, self.elastic.router_config.widths, self.mask.start, self.mask.hidden, total)
        mask = self.mask.packing.spread(mask, size)
        shape = [1] * value.ndim
        shape[dim], shape[self.mask.dim] = size, total
        return (value * mask.reshape(shape).to(value.dtype),)


class AfterBlock:
    """Gates what the block added: x' = x + r + g (B(x) - x - r), equation 8 where the rule has no residual r."""

    def __init__(self, elastic: ElasticTransformer, module: nn.Module, index: int, layout: BlockLayout) -> None:
        self.elastic, self.index, self.layout = elastic, index, layout
        self._inputs = _Inputs(module, layout)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The gated output."""
        forward = active_forward(self.elastic)
        if forward is None:
            return None
        states, _ = self._inputs.of(args, kwargs)
        outputs, spec = pytree.tree_flatten(output)
        targets, rows = [target for target, _ in self.layout.states], partial(self._rows, states)
        gates, kept = forward.decision(self.index).gate, None
        if forward.rule.keeps:
            added = [(outputs[target] - before).detach() for target, before in zip(targets, states, strict=True)]
            kept = forward.rule.residuals(self.index, added, rows)
        for state, (target, before) in enumerate(zip(targets, states, strict=True)):
            after, g = outputs[target], rows(state, gates)
            other = before if kept is None else before + kept[state]
            if forward.hard:
                outputs[target] = torch.where(g > 0.5, after, other)
            else:
                outputs[target] = other + g.to(after.dtype) * (after - other)
        return pytree.tree_unflatten(outputs, spec)

    def _rows(self, states: Sequence[Tensor], state: int, value: Tensor) -> Tensor:
        """`value` (B,), spread over that state by how it holds the batch."""
        like, packing = states[state], self.layout.packing(state)
        shape = [1] * like.ndim
        shape[packing.dim] = like.shape[packing.dim]
        return packing.spread(value, like.shape[packing.dim]).reshape(shape)


class _Inputs:
    """Finds a block's states and time embedding among the arguments of a call, given by position or by name."""

    def __init__(self, module: nn.Module, layout: BlockLayout) -> None:
        self._layout, self._names = layout, positional_names(module)

    def of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Tensor], Tensor | None]:
        """The states in order, and the time embedding where the block has one; ElasticError where one is missing."""
        if not self._layout.places:
            return self._counted(args, kwargs)
        given: dict[str | int, Any] = dict(enumerate(args))
        given.update(zip(self._names, args, strict=False), **kwargs)
        states = [self._at(given, place) for place in self._layout.places]
        time = self._layout.time_place
        return states, None if time is None else self._at(given, time)

    def _at(self, given: Mapping[Any, Any], place: Place) -> Tensor:
        value: Any = given
        try:
            for key in place:
                value = value[key]
        except (LookupError, TypeError):
            value = None
        if not isinstance(value, Tensor):
            raise ElasticError(
                f"{self._layout.name} was called without {'.'.join(map(str, place))}, a tensor when its blocks were "
                "found: call the model as then, or elasticize it with inputs like these"
            )
        return value

    def _counted(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Tensor], Tensor | None]:
        """The same by position among all leaves: folders written before schema 3 hold no names."""
        leaves, layout = pytree.tree_leaves((args, kwargs)), self._layout
        if len(leaves) != layout.leaves:
            raise ElasticError(
                f"{layout.name} was called with {len(leaves)} values, but with {layout.leaves} when its blocks were "
                "found: call the model with the same arguments, or elasticize it with inputs like these"
            )
        return [leaves[source] for _, source in layout.states], None if layout.time is None else leaves[layout.time]
