"""Gradient checkpointing: what the backward pass computes again is what the forward computed, whoever checkpoints."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import checkpoint as torch_checkpoint
from torch.utils.checkpoint import checkpoint

from edit_compile.elastic.layout import ElasticError
from edit_compile.elastic.transformer import ElasticTransformer, elasticize
from edit_compile.training.losses import Budget, budget_losses
from runtime.bundle.spec import RouterConfig
from tests.conftest import unsettle
from tests.models import PlainBlock, PlainDiT, randomised, tiny_dit, tiny_flux, tiny_plain

CONFIG = RouterConfig(hidden=16)
BUDGET = Budget(gate=0.4, width=0.5)
KINDS = pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])

Region = Callable[..., Any]


class DroppingBlock(PlainBlock):
    """Dropout in the MLP, which can be a region of its own."""

    inner: Region | None = None

    def forward(self, x: Tensor, text: Tensor, vector: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.cross_out(self._attend(self.query(x), *self.key_value(text).chunk(2, dim=-1), mask))
        return x + (self.mlp(x) if self.inner is None else self.inner(self.mlp, x))

    def mlp(self, x: Tensor) -> Tensor:
        a, b = self.up(self.norm(x)).chunk(2, dim=-1)
        return self.down(F.dropout(F.silu(a) * b, 0.2, self.training))


class Checkpointing(PlainDiT):
    """A model with checkpoints of its own: around `group` blocks at a time, or inside of them."""

    def __init__(self, group: int) -> None:
        super().__init__(depth=4, block=DroppingBlock)
        self.group = group
        self.region: Region | None = None

    def begin(self, region: Region) -> None:
        if self.group:
            self.region = region
        for layer in self.layers:
            layer.inner = None if self.group else region

    def forward(self, x: Tensor, t: Tensor, words: Tensor, mask: Tensor | None = None) -> Tensor:
        vector = self.clock(t[:, None].expand(-1, self.dim))
        x, words = self.embed(x), self.text(words)
        size = self.group or 1
        for first in range(0, len(self.layers), size):
            run = partial(self.run, self.layers[first : first + size])
            x = run(x, words, vector, mask) if self.region is None else self.region(run, x, words, vector, mask)
        return self.head(x)

    def run(self, layers: nn.ModuleList, x: Tensor, *others: Any) -> Tensor:
        for layer in layers:
            x = layer(x + 0.0, *others)
        return x


def gradients(elastic: ElasticTransformer, loss: Callable[[], Any]) -> dict[str, Tensor]:
    elastic.zero_grad()
    torch.manual_seed(3)
    loss().backward()
    return {name: value.grad.clone() for name, value in elastic.named_parameters() if value.grad is not None}


def flow(elastic: ElasticTransformer, inputs: Mapping[str, Any]) -> Tensor:
    output = elastic(**inputs)
    return (output if isinstance(output, Tensor) else output[0]).square().mean()


def with_budget(elastic: ElasticTransformer, inputs: Mapping[str, Any]) -> Tensor:
    value = flow(elastic, inputs)
    return budget_losses(elastic.routing, value, BUDGET)["loss"]


def made(model: nn.Module, inputs: Mapping[str, Any]) -> ElasticTransformer:
    torch.manual_seed(0)
    elastic = elasticize(model, inputs, config=CONFIG).train()
    unsettle(elastic)
    return elastic


def own(group: int) -> tuple[ElasticTransformer, Mapping[str, Any]]:
    _, inputs = tiny_plain()
    return made(randomised(Checkpointing(group)), inputs), inputs


@KINDS
@pytest.mark.parametrize("make", [tiny_flux, tiny_dit])
def test_diffusers_own_gives_the_same_gradients(make: Any, reentrant: bool) -> None:
    model, inputs = make()
    elastic = made(model, inputs | {"return_dict": False})
    loss = partial(with_budget, elastic, inputs)
    want = gradients(elastic, loss)
    routing = elastic.routing
    elastic.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=reentrant))
    got = gradients(elastic, loss)
    torch.testing.assert_close(got, want)
    assert elastic.routing.gate.shape == routing.gate.shape
    assert torch.equal(elastic.routing.choice, routing.choice)
    assert len(routing.gate.unique()) == 2, "decisions should differ for this test to mean anything"


@KINDS
@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("group", [1, 2, 0], ids=["a block", "two blocks", "inside of blocks"])
def test_a_models_own_gives_the_same_gradients(group: int, early_stop: bool, reentrant: bool) -> None:
    elastic, inputs = own(group)
    want = gradients(elastic, partial(with_budget, elastic, inputs))
    elastic.model.begin(partial(checkpoint, use_reentrant=reentrant))
    with torch_checkpoint.set_checkpoint_early_stop(early_stop):
        torch.testing.assert_close(gradients(elastic, partial(with_budget, elastic, inputs)), want)
    assert elastic.routing.gate.shape == (2, 4)


@KINDS
def test_routers_alone_are_trained_through_a_frozen_model(reentrant: bool) -> None:
    elastic, inputs = own(1)
    elastic.model.requires_grad_(False)
    want = gradients(elastic, partial(flow, elastic, inputs))
    elastic.model.begin(partial(checkpoint, use_reentrant=reentrant))
    assert len(want) == sum(1 for _ in elastic.routers.parameters())
    torch.testing.assert_close(gradients(elastic, partial(flow, elastic, inputs)), want)


@KINDS
def test_one_backward_for_several_forwards_dense_ones_among_them(reentrant: bool) -> None:
    elastic, inputs = own(2)
    others = {**inputs, "t": inputs["t"] * 0.1, "x": inputs["x"] * 2}

    def loss() -> Tensor:
        teacher = elastic.model(**inputs)
        first = with_budget(elastic, inputs)
        return first + 2 * with_budget(elastic, others) + teacher.square().mean() + elastic(**inputs).mean()

    want = gradients(elastic, loss)
    elastic.model.begin(partial(checkpoint, use_reentrant=reentrant))
    torch.testing.assert_close(gradients(elastic, loss), want)


def test_regions_in_regions_and_a_backward_on_another_thread() -> None:
    elastic, inputs = own(2)
    want = gradients(elastic, partial(with_budget, elastic, inputs))
    elastic.model.begin(partial(checkpoint, use_reentrant=False))
    for layer in elastic.model.layers:
        layer.inner = elastic.model.region

    class Threaded:
        def __init__(self, loss: Tensor) -> None:
            self.thread = threading.Thread(target=loss.backward)

        def backward(self) -> None:
            self.thread.start()
            self.thread.join()

    got = gradients(elastic, lambda: Threaded(with_budget(elastic, inputs)))
    torch.testing.assert_close(got, want)


def saved_bytes(loss: Callable[[], Tensor]) -> int:
    """Bytes that `loss()` keeps for its backward pass outside of checkpointed regions, each memory counted once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = loss()
        del result
    return sum(kept.values())


@KINDS
@pytest.mark.parametrize("frozen", [False, True])
def test_activations_are_freed(frozen: bool, reentrant: bool) -> None:
    elastic, _ = own(1)
    _, inputs = tiny_plain(tokens=600)
    elastic.model.requires_grad_(not frozen)
    loss = partial(with_budget, elastic, inputs)
    before = saved_bytes(loss)
    elastic.model.begin(partial(checkpoint, use_reentrant=reentrant))
    after = saved_bytes(loss)
    weights = sum(p.numel() * 4 for p in elastic.parameters())
    tokens = 2 * 600 * 32 * 4
    assert after - weights < 3 * 4 * tokens < (before - weights) / 4


def test_a_recomputed_router_takes_the_decision_that_was_taken() -> None:
    elastic, inputs = own(1)
    elastic.model.begin(partial(checkpoint, use_reentrant=False))
    seen: list[Tensor] = []
    block = elastic.model.layers[1]
    block.down.register_forward_pre_hook(lambda _, args: seen.append((args[0] != 0).float().mean((1, 2)).detach()))
    loss = flow(elastic, inputs)
    with torch.no_grad():  # as a kernel would that adds in another order, only more so
        elastic.routers[1].width.bias.sub_(100 * elastic.routing.choice[0, 1])
    loss.backward()
    assert len(seen) == 2
    assert torch.equal(*seen)


def test_torch_is_left_as_it_was() -> None:
    elastic, inputs = own(1)
    before = torch_checkpoint.CheckpointFunction, torch_checkpoint._CheckpointFrame
    elastic.model.begin(partial(checkpoint, use_reentrant=True))
    with_budget(elastic, inputs).backward()
    with pytest.raises(RuntimeError):
        elastic(**inputs | {"x": inputs["x"][..., :3]})
    assert (torch_checkpoint.CheckpointFunction, torch_checkpoint._CheckpointFrame) == before


class Unknown(torch.autograd.Function):
    """Checkpointing by another library."""

    @staticmethod
    def forward(ctx: Any, run: Region, *args: Tensor) -> Tensor:
        ctx.run, ctx.args = run, args
        with torch.no_grad():
            return run(*args)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        inputs = [arg.detach().requires_grad_(arg.requires_grad) for arg in ctx.args]
        with torch.enable_grad():
            ctx.run(*inputs).backward(gradient)
        return None, *(value.grad for value in inputs)


def test_what_another_library_computes_again_is_refused() -> None:
    elastic, inputs = own(1)
    elastic.model.begin(Unknown.apply)
    with pytest.raises(ElasticError, match=r"layers\.3 is computed again in the backward pass by something other"):
        flow(elastic, inputs).backward()


def test_a_dense_call_may_be_checkpointed_in_any_way() -> None:
    elastic, inputs = own(1)
    elastic.eval()  # without dropout, whose random numbers not everyone restores
    want = gradients(elastic, lambda: elastic.model(**inputs).square().mean())
    for region in (Unknown.apply, partial(checkpoint, use_reentrant=True)):
        again = copy.deepcopy(elastic)
        again.model.begin(region)
        got = gradients(again, lambda again=again: again.model(**inputs).square().mean())
        torch.testing.assert_close(got, want)
    assert not any(name.startswith("routers.") for name in want)
