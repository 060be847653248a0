"""What a plain graph no longer holds."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import Dim

from passes.blocks.functional import plain


class Squeezing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.squeeze(1) + x.unsqueeze(1).squeeze(1)


def test_a_squeeze_of_nothing_goes_and_one_of_something_stays() -> None:
    x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    program = torch.export.export(Squeezing(), (x,), dynamic_shapes=({1: Dim.AUTO},), strict=False)
    module, weights = plain(program.run_decompositions({}), "", ["x"])
    squeezes = [
        node for node in module.graph.nodes if "squeeze.dim" in str(node.target) and "un" not in str(node.target)
    ]
    assert not weights
    assert len(squeezes) == 1
    for tokens in (5, 7):
        value = torch.randn(2, tokens, 3, generator=torch.Generator().manual_seed(tokens))
        torch.testing.assert_close(module(value)[0], Squeezing()(value))
