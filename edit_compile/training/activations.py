"""Bytes that a forward keeps for its backward pass: on the meta device by shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Activations:
    """Bytes kept between a forward and its backward pass, parameters and buffers not counted.

    `outside` is what the model keeps beside its blocks, `blocks` what each block keeps, `inputs` what each is called
    with (the same memory is counted once, where it is seen first).
    """

    outside: int
    blocks: tuple[int, ...]
    inputs: tuple[int, ...]

    @property
    def plain(self) -> int:
        """All of it."""
        return self.outside + sum(self.blocks)

    @property
    def checkpointed(self) -> int:
        """With every block checkpointed: the blocks' inputs, and while it is computed again, what one block keeps."""
        return self.outside + sum(self.inputs) + max(self.blocks, default=0)


def measure(model: nn.Module, blocks: Sequence[nn.Module], run: Callable[[], Any]) -> Activations:
    """What `run()`, a call of `model` with gradients, keeps; `blocks` are those of its modules to tell apart.

    Attention keeps what fused kernels do, on any device: its three inputs, its output and a number per query.
    """
    ledger = _Ledger(model)
    handles = [handle for block in blocks for handle in ledger.watch(block)]
    try:
        with torch.enable_grad(), _Fused(), torch.autograd.graph.saved_tensors_hooks(ledger.pack, lambda kept: kept):
            output = run()
            del output
    finally:
        for handle in handles:
            handle.remove()
    return Activations(
        ledger.kept.get(None, 0),
        tuple(ledger.kept.get(block, 0) for block in blocks),
        tuple(ledger.inputs.get(block, 0) for block in blocks),
    )


class _Ledger:
    """Memory by the block in which it was saved first."""

    def __init__(self, model: nn.Module) -> None:
        self.kept: dict[nn.Module | None, int] = {}
        self.inputs: dict[nn.Module, int] = {}
        self._block: nn.Module | None = None
        # Memory is told apart by its address in the process, which must not be given out anew.
        self._weights = {_place(t): t for t in (*model.parameters(), *model.buffers())}
        self._saved: dict[int, Any] = {}
        self._given: dict[int, Any] = {}

    def watch(self, block: nn.Module) -> Iterator[Any]:
        """Hooks that tell when `block` runs."""
        yield block.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True)
        yield block.register_forward_hook(self._leave, always_call=True)

    def pack(self, tensor: Tensor) -> Tensor:
        """Note what is saved."""
        self.kept[self._block] = self.kept.get(self._block, 0) + self._new(tensor, self._saved)
        return tensor.detach()

    def _enter(self, block: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        self._block = block
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.inputs[block] = sum(self._new(tensor, self._given) for tensor in tensors)

    def _leave(self, block: nn.Module, args: Any, output: Any) -> None:
        self._block = None

    def _new(self, tensor: Tensor, seen: dict[int, Any]) -> int:
        """Its bytes, 0 where they are a weight's or were seen before."""
        place, storage = _place(tensor), tensor.untyped_storage()
        if place in self._weights or place in seen:
            return 0
        seen[place] = storage
        return storage.nbytes()


class _Fused(TorchFunctionMode):
    """Attention without its products: the meta device has no fused kernel, and would keep every attention matrix."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
        return _Attention.apply(given["query"], given["key"], given["value"])


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        if output.ndim == 4:  # as kernels lay it out, so that heads are joined without a copy
            output = query.new_empty(output.transpose(1, 2).shape).transpose(1, 2)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
