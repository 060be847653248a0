"""A block's graph computes what the block computes, at every batch and every size that varied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from passes.blocks.export import ExportError, export_block, leaf_names, validate, weight_values
from passes.blocks.functional import identifier
from passes.graphs.graph import BlockGraph, Discovery, States
from passes.observe.discover import discover
from passes.observe.residuals import find_states
from tests.models import noise, randomised, tiny_dit, tiny_flux, tiny_plain, tiny_sd3

DIM = 8
ONLY = States(((0, 0),))
MAKERS = {"flux": tiny_flux, "dit": tiny_dit, "sd3": tiny_sd3, "plain": tiny_plain}


@cache
def found(name: str) -> Discovery:
    """The model at two shapes where it has shapes to vary."""
    make = MAKERS[name]
    model, inputs = make(1)
    if name == "flux":
        return discover(model, [inputs, make(1, side=3, text=4)[1]])[0]
    if name == "plain":
        return discover(model, [inputs, make(2, tokens=4, words=7)[1]])[0]
    return discover(model, inputs)[0]


@cache
def exported(name: str, block: int) -> tuple[BlockGraph, States]:
    site = found(name).blocks[block]
    states, _ = find_states(site)
    return export_block(site, states, found(name).runs)[0], states


def single(
    forward: Callable[..., object], inputs: dict[str, object] | None = None, block: type[nn.Module] | None = None
) -> Discovery:
    """A model of one block whose forward is `forward(block, x, vector)`."""

    class Block(block or nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(DIM, DIM)
            self.table = torch.arange(1.0, DIM + 1)

        def forward(self, x: Tensor, vector: Tensor, extra: object = None) -> object:
            return forward(self, x, vector) if extra is None else forward(self, x, vector, extra)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Block()])

        def forward(self, x: Tensor, timestep: Tensor, extra: object = None) -> object:
            return self.layers[0](x, timestep[:, None].cos().expand(-1, DIM), extra)

    given = {"x": noise(2, 5, DIM), "timestep": torch.tensor([0.8, 0.3])} | (inputs or {})
    return discover(randomised(Model()), given)[0]


def export_single(discovery: Discovery) -> BlockGraph:
    (site,) = discovery.blocks
    return export_block(site, ONLY, discovery.runs)[0]


BLOCKS = [("flux", 0), ("flux", 2), ("dit", 0), ("sd3", 2), ("plain", 0)]


@pytest.mark.parametrize(("name", "block"), BLOCKS)
def test_graph_is_plain(name: str, block: int) -> None:
    graph, states = exported(name, block)
    nodes = list(graph.module.graph.nodes)
    graph.module.graph.lint()
    assert {node.op for node in nodes} == {"placeholder", "call_function", "output"}
    names = [node.name for node in nodes if node.op == "placeholder"]
    assert names == [*graph.weights, *graph.inputs]
    assert all(name.isidentifier() for name in names) and len(set(names)) == len(names)
    assert [node.target for node in nodes if node.op == "placeholder"] == names
    for node in nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            assert not node.target._schema.is_mutable
            assert "_assert" not in str(node.target) and "aten.view" not in str(node.target)
        assert node.op == "output" or "val" in node.meta
    assert [graph.leaves[index] for index in graph.states] == [at for _, at in states.pairs]


@pytest.mark.parametrize(("name", "block"), BLOCKS)
def test_weights_are_the_blocks_own(name: str, block: int) -> None:
    graph, _ = exported(name, block)
    module = found(name).blocks[block].module
    for qualified, value in zip(graph.weights.values(), weight_values(graph, module), strict=True):
        assert value.data_ptr() == module.get_parameter(qualified).data_ptr()
        assert not value.requires_grad


def test_inputs_are_named_after_arguments() -> None:
    assert exported("flux", 0)[0].inputs == (
        "hidden_states",
        "encoder_hidden_states",
        "temb",
        "image_rotary_emb_0",
        "image_rotary_emb_1",
    )
    assert exported("plain", 0)[0].inputs == ("x", "text", "vector", "mask")
    assert leaf_names(found("dit").blocks[0]) == ["hidden_states", "timestep", "class_labels"]


@pytest.mark.parametrize("text", ["a.b", "3d", "", "norm-1.weight", "üb er"])
def test_identifiers(text: str) -> None:
    assert identifier(text).isidentifier()


def same(
    graph: BlockGraph, module: nn.Module, states: States, inputs: list[Tensor], *args: object, **kw: object
) -> None:
    with torch.no_grad():
        results = graph.module(*weight_values(graph, module), *inputs)
        expected = torch.utils._pytree.tree_leaves(module(*args, **kw))
    for result, (output, _) in zip(results, states.pairs, strict=True):
        torch.testing.assert_close(result, expected[output], rtol=1e-5, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(batch=st.integers(1, 5), tokens=st.integers(1, 12), words=st.integers(1, 8), member=st.integers(0, 2))
def test_plain_block_at_any_shape(batch: int, tokens: int, words: int, member: int) -> None:
    graph, states = exported("plain", 0)
    x, text, vector = noise(batch, tokens, 32), noise(batch, words, 32, seed=3), noise(batch, 32, seed=4)
    inputs = [x, text, vector, noise(batch, words, seed=5) > -1]
    inputs[3][:, 0] = True
    same(graph, found("plain").blocks[member].module, states, inputs, *inputs)


@settings(max_examples=10, deadline=None)
@given(batch=st.integers(1, 4), image=st.integers(1, 20), text=st.integers(1, 8), single=st.booleans())
def test_flux_blocks_at_any_shape(batch: int, image: int, text: int, single: bool) -> None:
    block = 2 if single else 0
    graph, states = exported("flux", block)
    angles = noise(image + text, 32, seed=6)
    inputs = [
        noise(batch, image, 128),
        noise(batch, text, 128, seed=2),
        noise(batch, 128, seed=3),
        angles.cos(),
        angles.sin(),
    ]
    same(
        graph,
        found("flux").blocks[block + 1].module,
        states,
        inputs,
        hidden_states=inputs[0],
        encoder_hidden_states=inputs[1],
        temb=inputs[2],
        image_rotary_emb=(inputs[3], inputs[4]),
    )


@pytest.mark.parametrize("batch", [1, 3])
def test_sd3_last_block_at_any_batch(batch: int) -> None:
    graph, states = exported("sd3", 2)
    inputs = [noise(batch, 16, 64), noise(batch, 5, 64, seed=2), noise(batch, 64, seed=3)]
    names = ("hidden_states", "encoder_hidden_states", "temb")
    same(graph, found("sd3").blocks[2].module, states, inputs, **dict(zip(names, inputs, strict=True)))


@pytest.mark.parametrize("batch", [1, 3])
def test_dit_block_at_any_batch(batch: int) -> None:
    graph, states = exported("dit", 0)
    inputs = [noise(batch, 16, 64), torch.arange(batch) * 77, torch.arange(batch)]
    same(
        graph,
        found("dit").blocks[1].module,
        states,
        inputs,
        hidden_states=inputs[0],
        timestep=inputs[1],
        class_labels=inputs[2],
    )


def test_constants_are_weights() -> None:
    discovery = single(lambda m, x, v: x + m.linear(x) * m.table * torch.tensor([2.0]))
    graph = export_single(discovery)
    constants = [name for name in graph.weights.values() if name.startswith("constant.")]
    assert len(constants) == 2
    assert set(graph.module.meta["constants"]) == set(constants)
    x, vector = noise(3, 5, DIM), noise(3, DIM)
    same(graph, discovery.blocks[0].module, ONLY, [x, vector], x, vector)


def test_unused_weights_are_left_out() -> None:
    graph = export_single(single(lambda m, x, v: x + x @ m.linear.weight * v[:, None]))
    assert list(graph.weights.values()) == ["linear.weight"]


def test_autocast_and_no_grad_inside_leave_no_trace() -> None:
    def forward(m: nn.Module, x: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False), torch.no_grad():
            return x + m.linear(x)

    graph = export_single(single(forward))
    assert {str(node.target) for node in graph.module.graph.nodes if node.op == "call_function"} == {
        "aten.linear.default",
        "aten.add.Tensor",
    }


def refused(discovery: Discovery, states: States = ONLY) -> str:
    with pytest.raises(ExportError) as error:
        export_block(discovery.blocks[0], states, discovery.runs)
    assert str(error.value).startswith("layers.0: ")
    return str(error.value)


def test_a_pinned_batch_leaves_one_row_per_call() -> None:
    loop = single(lambda m, x, v: x + torch.stack([m.linear(row) for row in x]))
    assert export_single(loop).row_dims == (0, 0)
    number = single(lambda m, x, v: x + m.linear(x) * torch.ones(int(x.shape[0]), 1, 1))
    assert export_single(number).row_dims is not None


def test_a_rule_for_one_row_is_refused() -> None:
    discovery = single(lambda m, x, v: x + m.linear(x) * (x.shape[0] - 1) / (x.shape[0] - 1))
    assert "a single row" in refused(discovery)


def test_values_that_vary_are_refused() -> None:
    discovery = single(lambda m, x, v, n: x + m.linear(x) * n, {"extra": 3})
    (site,) = discovery.blocks
    assert export_single(discovery).inputs == ("x", "vector")
    calls = (site.calls[0], replace(site.calls[1], leaves=(*site.calls[1].leaves[:2], 4)))
    assert "differs between runs" in refused(replace(discovery, blocks=(replace(site, calls=calls),)))


def test_opaque_arguments_are_refused() -> None:
    class Cache:
        factor = 2

    assert "Cache" in refused(single(lambda m, x, v, c: x + m.linear(x) * c.factor, {"extra": Cache()}))


def test_control_flow_on_data_is_refused() -> None:
    def forward(m: nn.Module, x: Tensor, v: Tensor) -> Tensor:
        return x + m.linear(x) if x.sum() > 0 else x - m.linear(x)

    refused(single(forward))


def test_writes_are_refused() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

    def forward(m: nn.Module, x: Tensor, v: Tensor) -> Tensor:
        m.count.add_(1)
        return x + m.linear(x)

    assert "its count changes from call to call" in refused(single(forward, block=Counting))


def test_state_kept_between_calls_is_refused() -> None:
    def forward(m: nn.Module, x: Tensor, v: Tensor) -> Tensor:
        m.calls = getattr(m, "calls", 0) + len(x)
        return x + m.linear(x) * m.calls

    with pytest.raises(Exception, match=r"layers\.0"):
        export_single(single(forward))


def test_states_must_cover_the_outputs() -> None:
    discovery = single(lambda m, x, v: x + m.linear(x))
    assert "continue an input" in refused(discovery, States(()))


def test_validation_sees_other_weights_and_other_code() -> None:
    graph, _ = exported("plain", 0)
    first, second, _ = found("plain").blocks
    validate(graph, second)
    with pytest.raises(ExportError, match="off by"):
        validate(graph, replace(first, module=second.module))
    with pytest.raises(ExportError, match="holds another heads than is baked into the graph"):
        wrong = randomised(type(first.module)(32, 4))
        wrong.load_state_dict(first.module.state_dict())
        leaves = first.calls[0].leaves
        with torch.no_grad():
            call = replace(first.calls[0], outputs=(wrong(*leaves),))
        validate(graph, replace(first, module=wrong, calls=(call,)))
