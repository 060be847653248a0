"""A tiny transformer that satisfies every condition of docs/your_model.md, and variants that miss one each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

D = 8


class Block(nn.Module):
    """A residual MLP over tokens (B, L, D), modulated by a vector (B, D)."""

    def __init__(self) -> None:
        super().__init__()
        self.modulate = nn.Linear(D, D)
        self.norm = nn.LayerNorm(D)
        self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x: Tensor, vector: Tensor) -> Any:
        return x + self.modulate(vector)[:, None] * self.mlp(self.norm(x))

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Model(nn.Module):
    """Two blocks between an embedding and a head."""

    block: type[nn.Module] = Block

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, D), nn.Linear(D, 4)
        self.layers: nn.Module = nn.ModuleList(self.block() for _ in range(2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, vector = self.embed(x), t[:, None].expand(-1, D) * torch.linspace(0.5, 1.5, D)
        return self.head(self.run(x, vector))

    def run(self, x: Tensor, vector: Tensor) -> Any:
        for layer in self.layers:
            x = layer(x, vector)
        return x


def of(block: type[nn.Module]) -> Model:
    """The model with another kind of block."""
    return type(block.__name__, (Model,), {"block": block})().eval()


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"x": torch.randn(2, 6, 4, generator=generator), "t": torch.tensor([0.9, 0.4])}


class Sequential(Model):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = self.block(), self.block()
        del self.layers

    def run(self, x: Tensor, vector: Tensor) -> Tensor:
        return self.second(self.first(x, vector), vector)


class Repeating(Model):
    def run(self, x: Tensor, vector: Tensor) -> Tensor:
        return super().run(super().run(x, vector), vector)


class Idle(Model):
    def run(self, x: Tensor, vector: Tensor) -> Tensor:
        return self.layers[0](x, vector)


class PooledBlock(Block):
    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        return x + self.modulate(vector) * self.mlp(x)


class Pooled(Model):
    """Its blocks see a vector (B, D) of each sample, not tokens."""

    block = PooledBlock

    def run(self, x: Tensor, vector: Tensor) -> Tensor:
        pooled = x.mean(1)
        for layer in self.layers:
            pooled = layer(pooled, vector)
        return x + pooled[:, None]


class Moody(Model):
    """Its glue looks at the data."""

    def run(self, x: Tensor, vector: Tensor) -> Tensor:
        return super().run(x / 100 if x.abs().max() > 100 else x, vector)


class LateBlock(Block):
    def forward(self, x: Tensor, vector: Tensor, extra: None = None) -> Tensor:
        return super().forward(x, vector)


class Late(Model):
    """Calls its blocks with another argument once the timestep is small."""

    block = LateBlock

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, vector = self.embed(x), t[:, None].expand(-1, D)
        for layer in self.layers:
            x = layer(x, vector, *([] if t.max() > 0.6 else [None]))
        return self.head(x)


class Timeless(Model):
    def forward(self, x: Tensor, clock: Tensor) -> Tensor:
        return super().forward(x, clock)


class Shrinking(Block):
    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        return super().forward(x, vector)[:, ::2]


class Shrunk(Model):
    block = Shrinking


class NoResidual(Block):
    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        return self.modulate(vector)[:, None] * self.mlp(self.norm(x))


class Mixing(Block):
    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        return super().forward(x, vector) + self.mlp(x.mean(0, keepdim=True))


class Writing(Block):
    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        return x.add_(self.mlp(x))


class Counting(Block):
    """Returns a number beside its tokens."""

    def forward(self, x: Tensor, vector: Tensor) -> Any:
        return super().forward(x, vector), 1


class Counted(Model):
    block = Counting

    def run(self, x: Tensor, vector: Tensor) -> Tensor:
        for layer in self.layers:
            x, _ = layer(x, vector)
        return x


class Empty(nn.Module):
    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        return x + vector[:, None]


class Layer(Model):
    block = staticmethod(lambda: nn.Linear(D, D))

    def run(self, x: Tensor, vector: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class Looking(Block):
    """Which of its branches runs depends on the data."""

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        return super().forward(x, vector) if x.sum() > -1e6 else x


class NormedHidden(Block):
    """Normalises over the hidden channels, so that each depends on all."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LayerNorm(4 * D)

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(self.inner(F.gelu(self.up(x))))


class Straight(Block):
    """Its MLP has no activation."""

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


class Adapter(nn.Linear):
    """As peft's: told by the package that defines it."""


Adapter.__module__ = "peft.tuners.lora.layer"


class Adapted(Block):
    def __init__(self) -> None:
        super().__init__()
        self.up = Adapter(D, 4 * D)


def hooked() -> Model:
    model = Model().eval()
    for block in model.layers:
        block.up.register_forward_hook(lambda *_: None)
    return model


def replaced() -> Model:
    model = Model().eval()
    for block in model.layers:
        block.forward = type(block).forward.__get__(block)
    return model
