"""A number read out of a tensor is put into the graph where the tensor is filled with it, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from passes.blocks.fold_counts import known_counts
from tests.models import noise

Counts = Callable[[Tensor], list[int]]
READS = (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default)


class Cut(nn.Module):
    """Cuts the rows (three for each of the batch) into as many as `counts` says, and turns their order around."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(torch.split(torch.cat([x, x * 2, x * 3]), self.counts(x))[::-1])


def traced(counts: Counts) -> fx.GraphModule:
    program = torch.export.export(Cut(counts), (noise(4, 2),), dynamic_shapes=({0: Dim.AUTO},), strict=False)
    return program.run_decompositions({}).graph_module


def listed(x: Tensor) -> list[int]:
    return torch.full((3,), x.shape[0], dtype=torch.long).tolist()


def one_by_one(x: Tensor) -> list[int]:
    filled = torch.full((2, 3), x.shape[0])
    return [filled[1, place].item() for place in range(3)]  # type: ignore[misc]


def written(x: Tensor) -> list[int]:
    counts = torch.full((3,), x.shape[0], dtype=torch.long)
    counts[0] += 1
    counts[2] -= 1
    return counts.tolist()


def of_the_data(x: Tensor) -> list[int]:
    above = (x[:, 0] > 0).sum()
    return torch.stack([above, 3 * x.shape[0] - above]).tolist()


@pytest.mark.parametrize("counts", [listed, one_by_one])
def test_what_is_filled_is_known(counts: Counts) -> None:
    module = traced(counts)
    assert known_counts(module) == ("3 counts read from tensors are known",)
    assert not [node for node in module.graph.nodes if node.target in READS]
    shape = module.graph.output_node().args[0][0].meta["val"].shape  # type: ignore[index, union-attr]
    assert not any(str(symbol).startswith("u") for symbol in shape[0].node.expr.free_symbols)
    for rows in (1, 3, 4):
        x = noise(rows, 2, seed=rows)
        (output,) = module(x)
        torch.testing.assert_close(output, Cut(counts)(x))


def narrow(x: Tensor) -> list[int]:
    return torch.full((3,), x.shape[0], dtype=torch.int8).tolist()


def test_a_truth_value_is_left_to_the_code() -> None:
    class Asked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.full((1,), 5, dtype=torch.bool)[0].item()

    module = torch.export.export(Asked(), (noise(4, 2),), strict=False).run_decompositions({}).graph_module
    assert known_counts(module) == ()


@pytest.mark.parametrize("counts", [written, of_the_data, narrow])
def test_what_is_written_or_computed_is_not(counts: Counts) -> None:
    module = traced(counts)
    before = module.code
    assert known_counts(module) == ()
    assert module.code == before
