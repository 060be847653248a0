"""The elastic model: a DiT with a router before every block, trained like any nn.Module."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from edit_compile.elastic.block_hooks import AfterBlock, BeforeBlock, BeforeDown, check_maskable
from edit_compile.elastic.forward import Forward
from edit_compile.elastic.layout import ElasticError, Layout, fill_routers, find_layout
from edit_compile.elastic.recomputation import active
from edit_compile.elastic.recorded_inputs import Inputs, RecordedCalls, first_trace
from edit_compile.elastic.rule import Rule
from edit_compile.elastic.straight_through import Routing
from passes.blocks.experts import dense_experts
from passes.graphs.uncompiled import compiles, uncompiled, unwrapped
from passes.observe.statement import BlockStatement, as_statements
from runtime.bundle.spec import RouterConfig
from runtime.routing.policy import RoutingPolicy
from runtime.routing.router import Router


def elasticize(
    model: nn.Module,
    inputs: Inputs | RecordedCalls | None = None,
    *,
    config: RouterConfig | None = None,
    timestep: str | None = None,
    narrow: Sequence[str] | None = None,
    router_dtype: torch.dtype | None = None,
    blocks: BlockStatement | Sequence[BlockStatement] | None = None,
) -> ElasticTransformer:
    """Put a fully open router before every block of `model`.

    What is drawn for the routers is the same each time, whatever was drawn before, and no random number is used up.

    Args:
        model: any DiT whose blocks are entries of ModuleLists; changed by forward hooks only, which act only inside the
            elastic model's forward: its state-dict names stay, and calling it directly still runs it dense.
        inputs: keyword arguments of its forward (or several such, one per shape; or a `Recording` of its calls), to
            find the blocks with; without them, they are found at the first call.
        config: form of the routers.
        timestep: name of the forward's timestep argument, where it cannot be told.
        narrow: names of the blocks' states whose MLPs may be narrowed, as a dry run lists them ("hidden_states"); other
            MLPs are full at every width. Without it, all are narrowed.
        router_dtype: dtype that the routers have and compute in, and keep when the model is cast (torch.float32 to
            train routers of a bfloat16 model); without it, that of the model.
        blocks: what cannot be found by running the model: which argument a block's output continues, where the batch
            is. The elastic model keeps it, for `compile` too.

    Raises:
        ElasticError: no block is found; the message lists what was refused and why.
        StatementError (an EditError): what `blocks` says does not fit the model.
    """
    if isinstance(model, ElasticTransformer):
        raise ElasticError("this model is elastic already: train it, or compile it")
    model = unwrapped(model)
    elastic = ElasticTransformer(model, config or RouterConfig(), timestep, narrow, router_dtype, blocks)
    if inputs is not None:
        elastic.attach(elastic.find_layout(first_trace(model, inputs)))
    return elastic


class ElasticTransformer(nn.Module):
    """`model` with routers.

    With gradients enabled or in training mode the decisions are straight-through (equations 7-8, 13); in eval mode
    under `no_grad` they are those of Algorithm 1 without its bank: per row, skip where p < 0.5, otherwise compute at
    the chosen width. `routing` holds the decisions of the last forward. One forward at a time.

    `narrow` names the states whose MLPs are narrowed (None: all). `stated` is what was said of its blocks and batch.
    `policy` is what `compile` takes where none is given. `activation` is the one that its MLPs were given (see
    `activation`), None where they have their own.

    It stands in for the model in a pipeline: `config`, `device`, `dtype` and all else that it lacks are the model's.
    """

    def __init__(
        self,
        model: nn.Module,
        config: RouterConfig,
        timestep: str | None = None,
        narrow: Sequence[str] | None = None,
        router_dtype: torch.dtype | None = None,
        blocks: BlockStatement | Sequence[BlockStatement] | None = None,
    ) -> None:
        super().__init__()
        if router_dtype is not None and not router_dtype.is_floating_point:
            raise ElasticError(f"router_dtype is {router_dtype}: routers need a floating-point dtype")
        self.router_dtype = router_dtype
        self.narrow = None if narrow is None else tuple(narrow)
        self.stated = as_statements(blocks)
        self.policy: RoutingPolicy | None = None
        self.activation: str | None = None
        self._given: Sequence[Mapping[str, Tensor]] = ()
        self.router_config, self.model, self._timestep = config, model, timestep
        self.routers = nn.ModuleList()
        self.layout: Layout | None = None
        self.routing: Routing | None = None
        self.called_densely = False
        self._rule = Rule()
        self._handles: list[RemovableHandle] = []
        self._hooked: list[nn.Module] = []
        self._experts: dict[str, nn.Module] = {}
        self._compiles = False

    @property
    def timestep(self) -> str | None:
        """The keyword that holds the timestep: as found, else as given; None where neither tells."""
        return self.layout.timestep if self.layout is not None else self._timestep

    def find_layout(self, inputs: Inputs) -> Layout:
        """The layout of the model called with `inputs` (see `layout.find_layout`)."""
        time_dim = self.router_config.time_dim
        return find_layout(self.model, inputs, time_dim, self.timestep, self.narrow, self.stated)

    def attach(self, layout: Layout) -> None:
        """Create the routers for `layout` and hook the blocks; once per model."""
        if self.layout is not None:
            raise ElasticError("this model has its routers already")
        reference = next(self.model.parameters())
        with torch.device("meta" if reference.is_meta else "cpu"), torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(0)
            routers = [Router(self.router_config, block.dim, block.time_dim) for block in layout.blocks]
        if self._given:
            fill_routers(routers, layout, self._given)
        dtype = self.router_dtype or reference.dtype
        self.routers.extend(router.to(reference.device, dtype).train(self.training) for router in routers)
        self.layout, self._given = layout, ()
        self._hook()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As nn.Module's (`to`, `half`, `cuda`, ...), but routers keep a dtype of their own."""
        super()._apply(fn, recurse=False)
        self.model._apply(fn)
        self.routers._apply(fn if self.router_dtype is None else partial(_moved, fn))
        return self

    def give_routers(self, tensors: Sequence[Mapping[str, Tensor]]) -> None:
        """Parameters for the routers that `attach` will make: one mapping per block, in the order they are run in."""
        if self.layout is not None:
            raise ElasticError("this model has its routers already")
        self._given = tensors

    @property
    def untrained(self) -> bool:
        """Whether all routers are as `elasticize` makes them, fully open, or are yet to be made so."""
        if self.layout is None:
            return not self._given
        return all(isinstance(router, Router) and router.fully_open for router in self.routers)

    @contextmanager
    def detached(self) -> Iterator[None]:
        """Inside the ``with`` block the base model carries no hooks, as the compiler wants to see it."""
        self._unhook()
        try:
            yield
        finally:
            self._hook()

    @contextmanager
    def deciding(self, rule: Rule) -> Iterator[None]:
        """Inside the ``with`` block forwards decide by `rule`."""
        outer, self._rule = self._rule, rule
        try:
            yield
        finally:
            self._rule = outer

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
        self._experts, self._hooked = {}, list(self._places())
        self._compiles = any(map(compiles, self.model.modules()))
        for index, block in enumerate(self.layout.blocks if self.layout else ()):
            module = self.model.get_submodule(block.name)
            self._handles.append(
                module.register_forward_pre_hook(BeforeBlock(self, module, index, block), with_kwargs=True)
            )
            for name in block.experts:
                self._experts[f"{block.name}.{name}"] = module.get_submodule(name)
            for mask in block.masks:
                down = module.get_submodule(mask.module)
                check_maskable(down, f"{block.name}.{mask.module}")
                self._handles.append(down.register_forward_pre_hook(BeforeDown(self, index, mask)))
            self._handles.append(module.register_forward_hook(AfterBlock(self, module, index, block), with_kwargs=True))

    def _heeding_hooks(self) -> AbstractContextManager[object]:
        """Code that was compiled before the hooks were put on heeds none of them."""
        return uncompiled() if self._compiles and not torch.compiler.is_compiling() else nullcontext()

    def _places(self) -> Iterator[nn.Module]:
        """What stands now where hooks belong: an adapter takes the place of the layer that it adapts, and leaves it."""
        for block in self.layout.blocks if self.layout else ():
            module = self.model.get_submodule(block.name)
            yield module
            for name in (*block.experts, *(mask.module for mask in block.masks)):
                yield module.get_submodule(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call as the base model; returns what it returns."""
        if args:
            signature = inspect.signature(self.model.forward)
            signature.bind(*args, **kwargs)  # raises where an argument is missing, unknown or given twice
            kwargs = signature.bind_partial(*args).arguments | kwargs
        if self.layout is None:
            self.attach(self.find_layout(kwargs))
        assert self.layout is not None
        if list(self._places()) != self._hooked:
            self._hook()
        forward = Forward(self, kwargs, self.layout, not (self.training or torch.is_grad_enabled()), self._rule)
        try:
            with active(forward), dense_experts(self._experts), self._heeding_hooks():
                output = self.model(**kwargs)
            self.routing = forward.routing(self.router_config.widths)
        finally:
            forward.clear()
        return output

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As nn.Module's; ElasticError after the last one as long as the routers, made at the first call, are missing.

        So the first of them tells pipelines the device, and an optimiser is not given all but the routers.
        """
        yield from super().named_parameters(prefix, recurse, remove_duplicate)
        if recurse and self.layout is None:
            raise ElasticError(
                "the routers do not exist before the blocks are found, so these are not all parameters yet: "
                "call the model once, or give elasticize(model, inputs=...) its inputs, before asking for them"
            )

    def __getattr__(self, name: str) -> Any:
        """The model's own attribute where this one has none of that name.

        Of private ones, those of the model's class alone: what others left on the model (a hook of accelerate's, with
        the forward that it replaced) is not there for this module too. A method named forward_... (forward_with_cfg)
        runs on this module, so that the ``self.forward`` inside it is the routed one.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            model = self.__dict__.get("_modules", {}).get("model")  # none yet while it is copied or unpickled
            if model is None or name.startswith("__") or (name.startswith("_") and not hasattr(type(model), name)):
                raise
        try:
            found = getattr(model, name)
        except AttributeError as error:
            raise AttributeError(
                f"{type(self).__name__!r} object has no attribute {name!r}, nor has its model: {error}"
            ) from error
        return MethodType(found.__func__, self) if name.startswith("forward_") and inspect.ismethod(found) else found

    def cache_context(self, name: str, **progress: Any) -> Any:
        """The base model's cache context; does nothing where it has none."""
        context = getattr(self.model, "cache_context", None)
        return context(name, **progress) if context else nullcontext()

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write model.safetensors, routers.safetensors, config.json and elastic.json (see `storage`)."""
        from edit_compile.elastic.storage import save_elastic

        save_elastic(self, Path(folder), dtype)


def _moved(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """What `fn` makes of `tensor`, in the dtype that it has."""
    changed = fn(tensor)
    return changed if changed.dtype == tensor.dtype else tensor.to(changed.device)
