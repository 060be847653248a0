"""A tiny transformer that nobody prepared for, its inputs, and what must hold of one that is guarded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import edit_compile
from edit_compile import ScheduledPolicy
from edit_compile.compiling.dry_run import DryRun
from runtime.face.transformer import CompiledTransformer

DIM = 16
UNTRAINED = [pytest.mark.filterwarnings("ignore:.*were never trained:UserWarning")]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.out = nn.Linear(DIM, DIM)
        self.up = nn.Linear(DIM, 4 * DIM)
        self.down = nn.Linear(4 * DIM, DIM)

    def attend(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, DIM // 2)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(x))))

    def forward(self, x: Tensor, c: Tensor, seen: Tensor | None = None) -> Tensor:
        """`seen` are the tokens that attention sees instead."""
        x = x + self.attend((x if seen is None else seen) + c[:, None])
        return x + self.mlp(x)


class Packed(Block):
    """Attends within segments of the tokens of the whole batch."""

    def segments(self, cu: Tensor, count: int) -> Tensor:
        """Of each of so many tokens, the number of the segment that it is in."""
        return torch.searchsorted(cu[1:].contiguous(), torch.arange(count), right=True)

    def forward(self, x: Tensor, c: Tensor, cu: Tensor) -> Tensor:  # type: ignore[override]
        batch, length, _ = x.shape
        segment = self.segments(cu, batch * length)
        tokens = (x + c[:, None]).flatten(0, 1)[None]
        x = x + self.attend(tokens, segment[:, None] == segment[None]).view(batch, length, DIM)
        return x + self.mlp(x)


class Net(nn.Module):
    block: Callable[[], nn.Module] = Block

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head, self.time = nn.Linear(4, DIM), nn.Linear(DIM, 4), nn.Linear(1, DIM)
        self.blocks: Any = nn.ModuleList([type(self).block() for _ in range(2)])

    def start(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.embed(x), self.time(t[:, None])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y, c = self.start(x, t)
        for block in self.blocks:
            y = block(y, c)
        return self.head(y)


def inputs(batch: int = 2, tokens: int = 9, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(batch, tokens, 4, generator=generator), "t": torch.rand(batch, generator=generator)}


def masked(batch: int, *lengths: int) -> dict[str, Any]:
    """With a mask (batch, 9) of so many true entries; the last length holds for all other samples."""
    rows = [lengths[min(row, len(lengths) - 1)] for row in range(batch)]
    return inputs(batch) | {"mask": (torch.arange(9)[None] < torch.tensor(rows)[:, None]).long()}


def dry(model: nn.Module, kwargs: Any, **more: Any) -> DryRun:
    report = edit_compile.compile(model.eval(), inputs=kwargs, dry_run=True, **more)
    assert isinstance(report, DryRun)
    return report


def reasons(model: nn.Module, kwargs: Any) -> list[str]:
    """Why blocks are refused, of a model of which none is guarded."""
    report = dry(model, kwargs)
    assert report.blocks == 0
    return [refusal.reason for _, refusal in report.refused]


@torch.no_grad()
def guarded(model: nn.Module, kwargs: Any, *others: Any, blocks: Any = None) -> CompiledTransformer:
    """Compiled for `kwargs`; equal to eager on these and `others`, open and at every width, with rows that differ."""
    elastic = edit_compile.elasticize(model.eval(), kwargs, blocks=blocks).eval()
    compiled = edit_compile.compile(elastic, inputs=kwargs, engine="torch", policy=edit_compile.RoutingPolicy())
    for given in (kwargs, *others):
        close(compiled(**given), model(**given))
    blocks = len(elastic.routers)
    for number, width in enumerate(elastic.router_config.widths):
        for router in elastic.routers:
            router.width.weight.zero_()
            router.width.bias.copy_(9.0 * F.one_hot(torch.tensor(number), 4))
        for given in (kwargs, *others):
            wanted = elastic(**given)
            if width < 1:
                assert not torch.allclose(wanted, model(**given), atol=1e-4), "no width was masked"
            with compiled.request(), compiled.decided_by(ScheduledPolicy(np.full((1, blocks), width))):
                close(compiled(**given), wanted)
    return compiled


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
