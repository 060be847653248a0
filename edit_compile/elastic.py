"""The elastic model: a DiT with a router before every block, trained like any nn.Module."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from edit_compile.layout import BlockLayout, ElasticError, Layout, MaskedInput, fill_routers, find_layout
from edit_compile.straight_through import Routing, channel_mask, choose_width, gate
from passes.experts import dense_experts
from passes.packing import Packing
from runtime.bundle.spec import RouterConfig
from runtime.routing.policy import RoutingPolicy
from runtime.routing.router import Router, rows_of_steps, sinusoid

THRESHOLD = 0.5


def elasticize(
    model: nn.Module,
    inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    *,
    config: RouterConfig | None = None,
    timestep: str | None = None,
    narrow: Sequence[str] | None = None,
) -> ElasticTransformer:
    """Put a fully open router before every block of `model`.

    Args:
        model: any DiT whose blocks are entries of ModuleLists; changed by forward hooks only, which act only inside the
            elastic model's forward: its state-dict names stay, and calling it directly still runs it dense.
        inputs: keyword arguments of its forward (or several such, one per shape), to find the blocks with; without
            them, they are found at the first call.
        config: form of the routers.
        timestep: name of the forward's timestep argument, where it cannot be told.
        narrow: names of the blocks' states whose MLPs may be narrowed, as a dry run lists them ("hidden_states"); other
            MLPs are full at every width. Without it, all are narrowed.
    """
    if isinstance(model, ElasticTransformer):
        raise ElasticError("this model is elastic already: train it, or compile it")
    elastic = ElasticTransformer(model, config or RouterConfig(), timestep, narrow)
    if inputs is not None:
        elastic.attach(find_layout(model, inputs, elastic.config.time_dim, timestep, elastic.narrow))
    return elastic


class ElasticTransformer(nn.Module):
    """`model` with routers.

    With gradients enabled or in training mode the decisions are straight-through (equations 7-8, 13); in eval mode
    under `no_grad` they are those of Algorithm 1 without its bank: per row, skip where p < 0.5, otherwise compute at
    the chosen width. `routing` holds the decisions of the last forward. One forward at a time.

    `narrow` names the states whose MLPs are narrowed (None: all). `policy` is what `compile` takes where none is given.
    `activation` is the one that its MLPs were given (see `edit_compile.activation`), None where they have their own.
    """

    def __init__(
        self,
        model: nn.Module,
        config: RouterConfig,
        timestep: str | None = None,
        narrow: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.narrow = None if narrow is None else tuple(narrow)
        self.policy: RoutingPolicy | None = None
        self.activation: str | None = None
        self._given: Sequence[Mapping[str, Tensor]] = ()
        self.config, self.model, self._timestep = config, model, timestep
        self.routers = nn.ModuleList()
        self.layout: Layout | None = None
        self.routing: Routing | None = None
        self._forward: _Forward | None = None
        self._handles: list[RemovableHandle] = []
        self._experts: dict[str, nn.Module] = {}

    @property
    def timestep(self) -> str | None:
        """The keyword that holds the timestep: as found, else as given; None where neither tells."""
        return self.layout.timestep if self.layout is not None else self._timestep

    def attach(self, layout: Layout) -> None:
        """Create the routers for `layout` and hook the blocks; once per model."""
        if self.layout is not None:
            raise ElasticError("this model has its routers already")
        reference = next(self.model.parameters())
        with reference.device:
            routers = [Router(self.config, block.dim, block.time_dim) for block in layout.blocks]
        if self._given:
            fill_routers(routers, layout, self._given)
        self.routers.extend(router.to(reference.device, reference.dtype).train(self.training) for router in routers)
        self.layout, self._given = layout, ()
        self._hook()

    def give_routers(self, tensors: Sequence[Mapping[str, Tensor]]) -> None:
        """Parameters for the routers that `attach` will make: one mapping per block, in the order they are run in."""
        if self.layout is not None:
            raise ElasticError("this model has its routers already")
        self._given = tensors

    @contextmanager
    def detached(self) -> Iterator[None]:
        """Inside the ``with`` block the base model carries no hooks, as the compiler wants to see it."""
        self._unhook()
        try:
            yield
        finally:
            self._hook()

    def router_tensors(self) -> dict[str, Tensor]:
        """The routers' parameters, detached, keyed ``<block name>/<parameter name>``."""
        blocks = self.layout.blocks if self.layout else ()
        return {
            f"{block.name}/{name}": value.detach()
            for block, router in zip(blocks, self.routers, strict=True)
            for name, value in router.state_dict().items()
        }

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hook(self) -> None:
        self._unhook()
        self._experts = {}
        for index, block in enumerate(self.layout.blocks if self.layout else ()):
            module = self.model.get_submodule(block.name)
            self._handles.append(module.register_forward_pre_hook(_BeforeBlock(self, index, block), with_kwargs=True))
            for name in block.experts:
                self._experts[f"{block.name}.{name}"] = module.get_submodule(name)
            for mask in block.masks:
                down = module.get_submodule(mask.module)
                self._handles.append(down.register_forward_pre_hook(_BeforeDown(self, mask)))
            self._handles.append(module.register_forward_hook(_AfterBlock(self, block), with_kwargs=True))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call as the base model; returns what it returns."""
        if args:
            signature = inspect.signature(self.model.forward)
            signature.bind(*args, **kwargs)  # raises where an argument is missing, unknown or given twice
            kwargs = signature.bind_partial(*args).arguments | kwargs
        if self.layout is None:
            self.attach(find_layout(self.model, kwargs, self.config.time_dim, self.timestep, self.narrow))
        assert self.layout is not None
        self._forward = _Forward(kwargs, self.layout, hard=not (self.training or torch.is_grad_enabled()))
        try:
            with dense_experts(self._experts):
                output = self.model(**kwargs)
            self.routing = self._forward.routing(self.config.widths)
        finally:
            self._forward = None
        return output

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As nn.Module's; refuses as long as the routers, made at the first forward, are not there yet."""
        if self.layout is None:
            raise ElasticError(
                "the routers do not exist before the blocks are found: call the model once, "
                "or give elasticize(model, inputs=...) its inputs, before asking for parameters"
            )
        return super().named_parameters(*args, **kwargs)

    def cache_context(self, name: str, **progress: Any) -> Any:
        """The base model's cache context; does nothing where it has none."""
        context = getattr(self.model, "cache_context", None)
        return context(name, **progress) if context else nullcontext()

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write model.safetensors, routers.safetensors, config.json and elastic.json (see `edit_compile.storage`)."""
        from edit_compile.storage import save_elastic

        save_elastic(self, Path(folder), dtype)


class _Forward:
    """What the hooks of one forward share."""

    def __init__(self, kwargs: Mapping[str, Any], layout: Layout, hard: bool) -> None:
        self.timestep, self.hard = kwargs[layout.timestep], hard
        self._kwargs, self._samples = kwargs, layout.samples
        self.gates: list[tuple[Tensor, Tensor]] = []
        self.choices: list[tuple[Tensor, Tensor]] = []

    def per_sample(self, value: Tensor, packing: Packing) -> Tensor:
        """The rows of `value` with samples as dimension 0."""
        samples = 0
        if packing.folded:
            assert self._samples is not None
            samples = self._samples.count(self._kwargs)
        return packing.per_sample(value, samples)[0].movedim(packing.dim, 0)

    def routing(self, widths: tuple[float, ...]) -> Routing:
        probability, hard = (torch.stack(values, 1) for values in zip(*self.gates, strict=True))
        soft, choice = (torch.stack(values, 1) for values in zip(*self.choices, strict=True))
        return Routing(probability, hard, soft, choice, widths)


class _BeforeBlock:
    """Runs the router on the block's inputs."""

    def __init__(self, elastic: ElasticTransformer, index: int, layout: BlockLayout) -> None:
        self.elastic, self.index, self.layout = elastic, index, layout

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        forward = self.elastic._forward
        if forward is None:
            return
        leaves = _leaves((args, kwargs), self.layout)
        states = [
            forward.per_sample(leaves[source], self.layout.packing(index))
            for index, (_, source) in enumerate(self.layout.states)
        ]
        time = self._time(forward, leaves, states[0])
        gate_logit, width_logits = self.elastic.routers[self.index](states, time)
        forward.gates.append(gate(gate_logit, THRESHOLD))
        forward.choices.append(choose_width(width_logits))

    def _time(self, forward: _Forward, leaves: list[Any], like: Tensor) -> Tensor:
        if self.layout.time is not None:
            return forward.per_sample(leaves[self.layout.time], self.layout.time_packing)
        steps = rows_of_steps(torch.as_tensor(forward.timestep, device=like.device), len(like)).expand(len(like))
        return sinusoid(steps, self.layout.time_dim).to(like.dtype)


class _BeforeDown:
    """Masks the hidden channels at the input of an MLP's down-projection (equation 13)."""

    def __init__(self, elastic: ElasticTransformer, mask: MaskedInput) -> None:
        self.elastic, self.mask = elastic, mask

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        forward = self.elastic._forward
        if forward is None:
            return None
        (value,) = args
        choice = forward.choices[-1][1]
        dim, rows = self.mask.packing.dim, len(choice)
        size = value.shape[dim]
        if size != rows and not (self.mask.packing.folded and size % rows == 0):
            raise ElasticError(
                f"{self.mask.module}: its input {tuple(value.shape)} does not have the {rows} rows of the batch as "
                f"dimension {dim}, so that it cannot be masked per row"
            )
        total = value.shape[self.mask.dim]
        mask = channel_mask(choice, self.elastic.config.widths, self.mask.start, self.mask.hidden, total)
        mask = mask.repeat_interleave(size // rows, 0)
        shape = [1] * value.ndim
        shape[dim], shape[self.mask.dim] = size, total
        return (value * mask.reshape(shape).to(value.dtype),)


class _AfterBlock:
    """Gates what the block added: x' = x + g (B(x) - x) (equation 8)."""

    def __init__(self, elastic: ElasticTransformer, layout: BlockLayout) -> None:
        self.elastic, self.layout = elastic, layout

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        forward = self.elastic._forward
        if forward is None:
            return None
        leaves = _leaves((args, kwargs), self.layout)
        outputs, spec = pytree.tree_flatten(output)
        gates = forward.gates[-1][1]
        for index, (target, source) in enumerate(self.layout.states):
            before, after = leaves[source], outputs[target]
            dim = self.layout.packing(index).dim
            shape = [1] * after.ndim
            shape[dim] = after.shape[dim]
            g = gates.repeat_interleave(shape[dim] // len(gates)).reshape(shape)
            if forward.hard:
                outputs[target] = torch.where(g > 0.5, after, before)
            else:
                outputs[target] = before + g.to(after.dtype) * (after - before)
        return pytree.tree_unflatten(outputs, spec)


def _leaves(call: Any, layout: BlockLayout) -> list[Any]:
    leaves = pytree.tree_leaves(call)
    if len(leaves) != layout.leaves:
        raise ElasticError(
            f"{layout.name} was called with {len(leaves)} values, but with {layout.leaves} when its blocks were found: "
            "call the model with the same arguments, or elasticize it with inputs like these"
        )
    return leaves
