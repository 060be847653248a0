"""Flex attention becomes attention with a mask, or is refused with what stands in the way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from passes.blocks.flex_attention import dense_attention
from passes.blocks.functional import plain
from tests.models import noise

BATCH, HEADS, QUERIES, KEYS, CHANNELS = 2, 3, 5, 7, 16
SDPA = torch.ops.aten.scaled_dot_product_attention.default
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Flex attention with the given options."""

    def __init__(self, mask: Rule | None = None, **options: object) -> None:
        super().__init__()
        self.options = options
        self.mask: BlockMask | None = None
        if mask is not None:
            self.mask = create_block_mask(mask, BATCH, HEADS, QUERIES, KEYS, device="cpu")

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = flex_attention(query, key, value, block_mask=self.mask, **self.options)
        return result if isinstance(result, Tensor) else result[0] + result[1].lse[..., None]


def inputs(batch: int = BATCH, heads: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    keys, values = (noise(batch, heads, KEYS, CHANNELS, seed=seed) for seed in (1, 2))
    return noise(batch, HEADS, QUERIES, CHANNELS), keys, values


@torch.no_grad()
def exported(module: nn.Module, heads: int = HEADS) -> ExportedProgram:
    free = ({0: Dim.AUTO},) * 3
    program = torch.export.export(module, inputs(heads=heads), dynamic_shapes=free, strict=False)
    return program.run_decompositions({})


def replaced(module: nn.Module) -> fx.GraphModule:
    """The graph of `module` as a function of its constants, query, key and value."""
    program = exported(module)
    report = dense_attention(program.graph_module)
    assert (len(report.done), report.refused) == (1, ())
    return plain(program, "", ("query", "key", "value"))[0]


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q + 2 >= k


def by_head(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return ((q - k).abs() <= h) | (k == 0)


def by_row(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return k <= b + q


def by_table(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return TABLE[b, k] | (q == k)


TABLE = torch.tensor([[True, False, True, False, True, False, True], [True, True, True, False, False, False, True]])


@torch.no_grad()
@pytest.mark.parametrize(
    ("mask", "scale"), [(None, None), (None, 0.5), (causal, 0.5), (by_head, None), (by_row, None), (by_table, None)]
)
def test_flex_attention_is_attention_with_a_mask(mask: Rule | None, scale: float | None) -> None:
    module = Attention(mask, scale=scale)
    graph = replaced(module)
    (node,) = graph.graph.find_nodes(op="call_function", target=SDPA)
    assert (node.args[3] is None) == (mask is None)
    assert all("val" in node.meta for node in graph.graph.nodes if node.op == "call_function")
    found = graph(*graph.meta["constants"].values(), *inputs())[0]
    torch.testing.assert_close(found, module(*inputs()), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_mask_follows_the_batch() -> None:
    graph = replaced(Attention(causal))
    query, key, value = inputs(batch=4)
    seen = torch.arange(QUERIES)[:, None] + 2 >= torch.arange(KEYS)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, seen)
    torch.testing.assert_close(graph(query, key, value)[0], expected, rtol=1e-5, atol=1e-5)


def shifted(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return score + k


def nobody(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.bool)


def by_sum(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return TABLE.cumsum(1)[b, k] > q


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Attention(score_mod=shifted), "changes the scores"),
        (Attention(return_aux=AuxRequest(lse=True)), "more than the result"),
        (Attention(by_sum), "holds aten.cumsum"),
        (Attention(nobody), "the mask of its flex attention"),
    ],
)
def test_other_flex_attention_is_refused_and_stays(module: nn.Module, reason: str) -> None:
    graph = exported(module).graph_module
    report = dense_attention(graph)
    assert not report.done
    assert reason in report.refused[0].reason
    assert not graph.graph.find_nodes(op="call_function", target=SDPA)


def test_grouped_heads_are_refused() -> None:
    graph = exported(Attention(enable_gqa=True), heads=1).graph_module
    assert "batch and heads of its flex attention differ" in dense_attention(graph).refused[0].reason


def test_other_graphs_are_left_alone() -> None:
    class Plain(nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(query, key, value)

    graph = exported(Plain()).graph_module
    before = str(graph.graph)
    report = dense_attention(graph)
    assert (str(graph.graph), report.done, report.refused) == (before, (), ())
