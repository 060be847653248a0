"""Blocks that hold several rows per sample, or rows that all samples share, are seen per sample; others are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import edit_compile
from edit_compile.elastic.layout import Layout
from edit_compile.elastic.transformer import ElasticTransformer
from passes.graphs.batch_layout import Packing
from passes.graphs.graph import BlockSite, Call, Run
from passes.observe.adapt import find_adapter, leads
from passes.observe.discover import discover
from passes.pipeline import analyse
from runtime.bundle.spec import RouterConfig
from runtime.routing.policy import RoutingPolicy
from runtime.routing.schedule import ScheduledPolicy
from tests.models import noise, randomised

DIM, FRAMES, TOKENS = 8, 3, 5


class Mlp(nn.Module):
    """x + W2 act(W1 x m) * vector; `vector` has a row for every row of x, and maybe rows that all share."""

    def __init__(
        self, shared: Callable[[Tensor], tuple[Tensor, Tensor | None]] = lambda vector: (vector, None)
    ) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM)
        self.shared = shared

    def forward(self, x: Tensor, vector: Tensor, mask: Tensor | None = None) -> Tensor:
        own, common = self.shared(vector)
        y = x * own[:, None] + (0 if common is None else common)
        if mask is not None:
            heads = mask.unflatten(0, (x.shape[0], -1)).softmax(-1)
            y = y + (heads @ y[:, None]).mean(1)
        return x + self.down(nn.functional.gelu(self.up(y)))


class Video(nn.Module):
    """Frames folded into the batch in one block, tokens in the next, none in the last."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Mlp(), Mlp(), Mlp()])

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        batch, frames, tokens, _ = hidden_states.shape
        vector = timestep[:, None].cos().expand(-1, DIM)
        x = self.blocks[0](hidden_states.flatten(0, 1), vector.repeat_interleave(frames, 0))
        x = x.unflatten(0, (batch, frames)).transpose(1, 2).flatten(0, 1)
        x = self.blocks[1](x, vector.repeat_interleave(tokens, 0))
        return self.blocks[2](x.unflatten(0, (batch, tokens)).flatten(1, 2), vector)


class Around(nn.Module):
    """Calls its block through `call`."""

    def __init__(self, block: nn.Module, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block])
        self.call = call

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.call(self.blocks[0], x, timestep[:, None].cos() * torch.linspace(1, 2, DIM))


def video(batch: int = 2, frames: int = FRAMES, tokens: int = TOKENS) -> dict[str, Any]:
    return {"hidden_states": noise(batch, frames, tokens, DIM), "timestep": torch.linspace(0.9, 0.2, batch)}


def around(block: nn.Module, call: Callable[..., Tensor]) -> tuple[tuple[BlockSite, ...], list[str]]:
    model = randomised(Around(block, call))
    inputs = {"x": noise(2, TOKENS, DIM), "timestep": torch.tensor([0.8, 0.3])}
    found, report = discover(model, inputs)
    return found.blocks, [refusal.reason for refusal in report.refused]


def unsettled(model: nn.Module, inputs: Any) -> ElasticTransformer:
    elastic = edit_compile.elasticize(model, inputs, config=RouterConfig(hidden=16))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for router in elastic.routers:
            for head in (router.gate, router.width):
                head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * 6)
                head.bias.zero_()
        elastic.eval()(**(inputs if isinstance(inputs, dict) else inputs[0]))
        for router, probability in zip(elastic.routers, elastic.routing.probability.logit().mean(0), strict=True):
            router.gate.bias.sub_(probability)
    return elastic


@settings(max_examples=60, deadline=None)
@given(
    packing=st.builds(Packing, st.integers(0, 2), st.booleans(), st.integers(0, 2), st.booleans()),
    samples=st.integers(1, 3),
    rows=st.integers(2, 3),
)
def test_packing_is_undone(packing: Packing, samples: int, rows: int) -> None:
    shape = [2, 3, 4]
    shape[packing.dim] = samples * (rows if packing.folded else 1) + packing.shared
    tensor = noise(*shape)
    parts = packing.per_sample(tensor, samples)
    assert len(parts) == packing.parts
    assert parts[0].shape[packing.dim] == samples
    assert torch.equal(packing.packed(*parts), tensor)


@pytest.mark.parametrize("batch", [1, 2])
def test_folded_rows_are_seen_per_sample(batch: int) -> None:
    model = randomised(Video())
    found, report = discover(model, video(batch))
    assert report.refused == ()
    spatial, temporal, plain = found.blocks
    assert [tuple(call.leaves[0].shape) for call in spatial.calls] == [
        (b, FRAMES, TOKENS, DIM) for b in (batch, 2 * batch)
    ]
    assert tuple(temporal.calls[0].leaves[0].shape) == (batch, TOKENS, FRAMES, DIM)
    assert plain.adapter is None and plain.module is model.blocks[2]
    assert spatial.batch_dims == temporal.batch_dims == plain.batch_dims == {0: 0, 1: 0}
    assert spatial.time is None and plain.time == 1, "a folded vector holds no single time embedding"
    assert all(a is b for a, b in zip(spatial.module.parameters(), model.blocks[0].parameters(), strict=True))
    assert "forward" not in vars(model.blocks[0])
    for site in found.blocks:
        for call in site.calls:
            with torch.no_grad():
                torch.testing.assert_close(site.module(*call.leaves), call.outputs[0])


@torch.no_grad()
def test_one_plan_serves_two_sizes_of_the_fold_and_any_batch() -> None:
    model = randomised(Video())
    buckets = [video(2), video(2, frames=4, tokens=7)]
    compiled = edit_compile.compile(unsettled(model, buckets), inputs=buckets, engine="torch")
    manifest = compiled.program.manifest
    assert len(manifest.plans) == 3
    assert manifest.plans[0].inputs[0].shape == (None, None, None, DIM)
    compiled.policy = ScheduledPolicy([[1.0] * 3])
    for batch, frames, tokens in ((1, 3, 5), (3, 3, 5), (5, 4, 7)):
        inputs = video(batch, frames, tokens)
        torch.testing.assert_close(compiled(**inputs), model(**inputs), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_row_of_a_decision_is_all_rows_of_its_sample() -> None:
    model = randomised(Video())
    inputs = video(6)
    elastic = unsettled(model, inputs)
    compiled = edit_compile.compile(
        elastic, inputs=inputs, engine="torch", policy=RoutingPolicy(margin=0.0, max_reuse=0, warmup_steps=0)
    )
    expected = elastic(**inputs)
    assert elastic.routing.gate.shape == (6, 3)
    assert (elastic.routing.gate.std(0) > 0).any() and len(elastic.routing.width.unique()) > 1
    torch.testing.assert_close(compiled(**inputs), expected, rtol=1e-4, atol=1e-5)
    for row in range(6):
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        torch.testing.assert_close(elastic(**alone)[0], expected[row], rtol=1e-4, atol=1e-5)


def test_layouts_keep_how_rows_are_held() -> None:
    elastic = edit_compile.elasticize(randomised(Video()), video())
    assert elastic.layout.samples.path == ("hidden_states",)
    assert [block.packings for block in elastic.layout.blocks] == [(Packing(folded=True),)] * 2 + [(Packing(),)]
    assert Layout.from_json(json.loads(json.dumps(asdict(elastic.layout)))) == elastic.layout


def test_gradients_reach_routers_of_folded_blocks() -> None:
    elastic = unsettled(randomised(Video()), video()).train()
    elastic(**video()).square().mean().backward()
    assert all(router.gate.weight.grad.abs().sum() > 0 for router in elastic.routers)


def test_a_mask_of_heads_is_folded_and_the_tokens_are_not() -> None:
    def call(block: nn.Module, x: Tensor, vector: Tensor) -> Tensor:
        mask = (x @ x.transpose(1, 2)).repeat_interleave(4, 0)
        return block(x, vector, mask)

    (site,), refused = around(Mlp(), call)
    assert refused == []
    assert site.calls[0].leaves[2].shape == (2, 4, TOKENS, TOKENS)
    assert site.time == 1
    assert analyse(Around(Mlp(), call), {"x": noise(2, TOKENS, DIM), "timestep": torch.ones(2)}).groups


@pytest.mark.parametrize("leading", [False, True])
def test_shared_rows_are_a_part_of_their_own(leading: bool) -> None:
    def shared(vector: Tensor) -> tuple[Tensor, Tensor]:
        return (vector[1:], vector[0]) if leading else (vector[:-1], vector[-1])

    def call(block: nn.Module, x: Tensor, vector: Tensor) -> Tensor:
        common = torch.ones(1, DIM)
        return block(x, torch.cat([common, vector] if leading else [vector, common]))

    (site,), refused = around(Mlp(shared), call)
    assert refused == []
    assert site.adapter.inputs == (Packing(), Packing(shared=1, leading=leading))
    assert [tuple(leaf.shape) for leaf in site.calls[1].leaves] == [(4, TOKENS, DIM), (4, DIM), (1, DIM)]
    assert site.batch_dims == {0: 0, 1: 0}
    assert site.time == 1


def test_rows_that_count_on_their_place_in_the_batch() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(DIM, DIM)

        def forward(self, x: Tensor, ends: Tensor) -> Tensor:
            return x + self.inner(x) * ends[1:, None, None]

    def call(block: nn.Module, x: Tensor, vector: Tensor) -> Tensor:
        return block(x, TOKENS * torch.arange(len(x) + 1))

    (site,), _ = around(Packed(), call)
    assert site.adapter.inputs[1] == Packing(shared=1, leading=True), "its rows are its own, whatever they mean"

    class Lengths(Packed):
        def forward(self, x: Tensor, ends: Tensor) -> Tensor:
            return x + self.inner(x) * (ends[1:] - ends[:-1])[:, None, None]

    (site,), _ = around(Lengths(), call)
    assert site.adapter.inputs[1] == Packing(offsets=True), "lengths are differences, wherever a sample starts"

    class Between(Packed):
        def forward(self, x: Tensor, ends: Tensor) -> Tensor:
            return x + self.inner(x) * (ends[1:] * ends[:-1])[:, None, None]

    found, refused = around(Between(), call)
    assert found == ()
    assert "alone what it gives it in a batch" in refused[0]


@pytest.mark.parametrize(
    "odd",
    [
        lambda vector: vector.repeat(5, 1).roll(1, 0),  # the rows of one sample are not together
        lambda vector: torch.cat([vector.new_ones(1, DIM), vector, vector.new_ones(1, DIM)]),  # shared on both sides
        lambda vector: vector[:, None] * vector[None, :, :1],  # grows in two dimensions
        lambda vector: vector.new_ones(9 - len(vector), DIM),  # shrinks
    ],
)
def test_other_forms_are_refused(odd: Callable[[Tensor], Tensor]) -> None:
    class Reads(Mlp):
        def forward(self, x: Tensor, vector: Tensor, mask: Tensor | None = None) -> Tensor:
            return super().forward(x, vector)

    found, refused = around(Reads(), lambda block, x, vector: block(x, vector, odd(vector)))
    assert found == ()
    assert "argument 'mask' does not hold as many rows for each sample" in refused[0]


def test_shared_rows_in_a_result_are_refused() -> None:
    def call(block: nn.Module, x: Tensor, vector: Tensor) -> Tensor:
        ones = torch.ones(1, DIM)
        return block(torch.cat([torch.ones(1, TOKENS, DIM), x]), torch.cat([ones, vector]))[1:]

    found, refused = around(Mlp(), call)
    assert found == ()
    assert "rows that all samples share" in refused[0]


def call_of(*leaves: Tensor | None) -> Call:
    leaf, spec = pytree.tree_flatten((leaves, {}))
    return Call(tuple(leaf), spec, (leaves[0],), pytree.tree_flatten(leaves[0])[1])


def test_buckets_agree_in_shared_rows_but_not_in_the_fold() -> None:
    runs = [Run({}, batch, bucket) for batch in (2, 4) for bucket in (0, 1)]

    def held(size: Callable[[int, int], int]) -> object:
        whole = noise(100, 3)
        return find_adapter(nn.Module(), [call_of(whole[: size(run.batch, run.bucket)]) for run in runs], runs)

    assert held(lambda batch, bucket: batch * (1 + bucket)).inputs == (Packing(folded=True),)
    assert held(lambda batch, bucket: batch * (2 + bucket)).inputs == (Packing(folded=True),)
    assert "as many rows for each sample" in held(lambda batch, bucket: batch + bucket)
    assert "as many rows for each sample" in held(lambda batch, bucket: batch * bucket + 1)


def test_an_argument_that_is_a_tensor_in_one_bucket_only_is_named() -> None:
    runs = [Run({}, batch, bucket) for batch in (2, 4) for bucket in (0, 1)]
    calls = [call_of(noise(run.batch, 3), noise(run.batch, 3) if run.bucket else None) for run in runs]
    assert "argument '1' is a tensor for some of the given inputs only" in find_adapter(nn.Module(), calls, runs)


def test_leading_rows_may_hold_infinity() -> None:
    mask = torch.tensor([[0.0, -torch.inf], [1.0, 2.0]])
    assert leads(mask, torch.cat([mask, mask]))
    assert not leads(mask, torch.zeros(4, 2))
    assert not leads(mask, mask[:1])
    assert leads(torch.tensor([True]), torch.tensor([True, False]))
    assert not leads(torch.tensor([False]), torch.tensor([True, False]))
