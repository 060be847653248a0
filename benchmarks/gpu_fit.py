"""Whether a model and its compiled program fit a GPU's memory together: told from shapes, before any is taken.

python -m benchmarks.gpu_fit    what each model needs; no GPU
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import nn

from benchmarks.configurations import FULL, Configuration, Place
from runtime.bundle.spec import RouterConfig
from runtime.routing.router import Router

RESERVE = 4 << 30
"""Bytes left for activations, products' workspaces and libraries."""
RUNS = 4
"""Recorded runs of the compiler, in images: one as given, one with a doubled batch, one at another timestep."""


@dataclass(frozen=True)
class Need:
    """Bytes on the device: eager and compiled weights side by side, routers, and the blocks' recorded states."""

    eager: int
    compiled: int
    routers: int
    recorded: int
    reserve: int = RESERVE

    @property
    def total(self) -> int:
        """All of it."""
        return self.eager + self.compiled + self.routers + self.recorded + self.reserve


def needed(shape: Configuration, place: Place) -> Need:
    """What `shape` takes in the dtype of `place`."""
    model = shape.bare()
    size = (place.dtype or torch.float32).itemsize
    blocks = sum(shape.value(name) for name in shape.depth)
    dim = shape.value("num_attention_heads") * shape.value("attention_head_dim")
    weights = _count(model) * size
    with torch.device("meta"):
        router = Router(RouterConfig(), dim, dim)
    states = (shape.side**2 + shape.text) * dim * size
    return Need(weights, weights, blocks * _count(router) * size, RUNS * blocks * states)


def too_large(shape: Configuration, place: Place) -> dict[str, object] | None:
    """Why the model cannot be measured on this GPU, with the numbers; None where it fits, and on CPUs."""
    if place.device.type != "cuda":
        return None
    need, (free, total) = needed(shape, place), torch.cuda.mem_get_info(place.device)
    if need.total <= free:
        return None
    told = (
        f"needs about {need.total / 2**30:.0f} GiB, {free / 2**30:.0f} of {total / 2**30:.0f} GiB are free: the eager "
        "model and its compiled program are held side by side; --blocks N measures a model of fewer blocks"
    )
    return {"skipped": told, "needed_bytes": asdict(need), "free_bytes": free, "total_bytes": total}


def main() -> None:
    for shape in FULL.values():
        need = needed(shape, Place(torch.device("cuda"), torch.bfloat16))
        print(f"{shape.title}: {need.total / 2**30:.0f} GiB in bfloat16, {asdict(need)}")


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    main()
