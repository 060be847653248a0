"""Draw images: Euler steps on the flow, with classifier-free guidance.

python -m examples.fashion_mnist.sample --output images.png                    the dense model
python -m examples.fashion_mnist.sample --model elastic --output images.png    the elastic one, in 7 steps
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.fashion_mnist.data import CLASSES, NO_CLASS, from_patches
from examples.fashion_mnist.model import CHANNELS, TOKENS, inputs, load_model

STEPS = 28
FEW_STEPS = 7
"""Of the sampler that the elastic model was taught."""
GUIDANCE = 2.5


def sample(transformer: Callable[..., Any], labels: Tensor, **options: Any) -> Tensor:
    """Images (B, 28, 28) float32 in [-1, 1] of the asked classes; arguments as of `sample_patches`."""
    return from_patches(sample_patches(transformer, labels, **options)).clamp(-1, 1)


@torch.no_grad()
def sample_patches(
    transformer: Callable[..., Any],
    labels: Tensor,
    *,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> Tensor:
    """What the sampler ends with (B, tokens, channels) float32.

    Args:
        labels: the asked classes (B,) int64.
        transformer: the dense, elastic or compiled model, called with diffusers' keyword arguments once per guidance
            branch and step, inside its `cache_context("cond")` or `("uncond")` where it has one.
        guidance: w in v = v_uncond + w (v_cond - v_uncond); at 1 the unconditional branch is not run.
        on_step: called before each step with (step, t); t falls from 1 to 1 / steps.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(labels), TOKENS, CHANNELS, generator=generator)
    times = torch.linspace(1, 0, steps + 1)
    no_class = torch.full_like(labels, NO_CLASS)
    for step in range(steps):
        t = times[step].expand(len(labels))
        if on_step:
            on_step(step, float(times[step]))
        velocity = _branch(transformer, "cond", inputs(x, t, labels))
        if guidance != 1:
            without = _branch(transformer, "uncond", inputs(x, t, no_class))
            velocity = without + guidance * (velocity - without)
        x = x + (times[step + 1] - times[step]) * velocity
    return x


def _branch(transformer: Callable[..., Any], name: str, kwargs: dict[str, Any]) -> Tensor:
    context = getattr(transformer, "cache_context", None)
    entered: AbstractContextManager[Any] = context(name) if context else nullcontext()
    with entered:
        return transformer(**kwargs)[0]


def save_grid(images: Tensor, path: Path, columns: int = 10) -> None:
    """Write images (B, 28, 28) in [-1, 1] as one grey picture, `columns` wide."""
    import matplotlib.image

    rows = -(-len(images) // columns)
    padded = torch.cat([images, images.new_full((rows * columns - len(images), 28, 28), -1.0)])
    grid = padded.reshape(rows, columns, 28, 28).transpose(1, 2).reshape(rows * 28, columns * 28)
    matplotlib.image.imsave(path, ((grid + 1) / 2).numpy(), cmap="gray", vmin=0, vmax=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dense", help="dense, elastic, or a checkpoint of the dense training")
    parser.add_argument("--output", type=Path, default=Path("images.png"))
    parser.add_argument("--rows", type=int, default=5)
    parser.add_argument("--steps", type=int, help="default: 28, of the elastic model 7")
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    labels = torch.arange(len(CLASSES)).repeat(arguments.rows)
    steps = arguments.steps or (FEW_STEPS if arguments.model == "elastic" else STEPS)
    options = {"steps": steps, "guidance": arguments.guidance, "seed": arguments.seed}
    images = sample(load_model(arguments.model), labels, **options)
    save_grid(images, arguments.output)
    print(arguments.output)


if __name__ == "__main__":
    main()
