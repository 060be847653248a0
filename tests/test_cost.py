"""FLOPs counted without computing, and with real numbers where sizes depend on them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from passes.graphs.cost import count_flops, hosted_flops
from passes.graphs.graph import Run


def product(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight


def test_nothing_is_computed_where_sizes_are_known() -> None:
    large = torch.empty(1, device="meta").expand(10**6, 10**6)
    assert count_flops(product, [torch.empty(3, 4), torch.empty(4, 5)]) == 2 * 3 * 4 * 5
    assert count_flops(lambda x: x.sum(), [large]) == 0


def test_a_size_that_depends_on_numbers_is_counted_with_them() -> None:
    def chosen(x: Tensor, keep: Tensor, weight: Tensor) -> Tensor:
        return x[keep] @ weight

    keep = torch.tensor([True, False, True])
    assert count_flops(chosen, [torch.ones(3, 4), keep, torch.ones(4, 5)]) == 2 * 2 * 4 * 5


def test_a_view_of_a_parameter_does_not_stop_the_count_and_wants_its_gradient_again() -> None:
    class Viewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries = nn.Parameter(torch.ones(4, 6))
            self.map = nn.Linear(6, 6, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.map(self.queries.expand(2, 4, 6))

    model = Viewing()
    assert hosted_flops(model, {}, Run({"x": torch.ones(2, 4, 6)}, 2, 0)) == 2 * 4 * 6 * 6
    assert model.queries.requires_grad
