"""What is kept beside a bundle: how it is called, and what it gave, so that another version can be held to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from safetensors.torch import load_file
from torch import Tensor

from edit_compile import CompiledTransformer

BUNDLES = Path(__file__).resolve().parent / "bundles"
INDEX, FORMAT = "index.json", "format.json"
STEPS = 4
COLUMNS = ("step", "block", "row", "done", "width")
"""What is recorded of each decision; gates differ in their last digits between engines."""


@dataclass(frozen=True)
class Record:
    """Which engines run a bundle, the arguments that change from step to step, its tiers, and its digest."""

    engines: tuple[str, ...]
    latents: str
    timestep: str
    tiers: tuple[str, ...]
    digest: str = ""


def index(folder: Path) -> dict[str, Record]:
    """The bundles of one version, by name."""
    return msgspec.json.decode((folder / INDEX).read_bytes(), type=dict[str, Record])


def recorded(folder: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One call's inputs, and all that the generations gave, by name."""
    tensors = load_file(folder / f"{name}.safetensors")
    inputs = {key.removeprefix("input."): value for key, value in tensors.items() if key.startswith("input.")}
    return inputs, {key: value for key, value in tensors.items() if not key.startswith("input.")}


def given_by(model: CompiledTransformer, record: Record, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the model gives and decides in a generation by its policy, and in one at each tier."""
    return {
        f"{tier or 'policy'}.{name}": tensor
        for tier in (None, *record.tiers)
        for name, tensor in _generation(model, record, inputs, tier)
    }


def _generation(
    model: CompiledTransformer, record: Record, inputs: Mapping[str, Tensor], tier: str | None
) -> Iterator[tuple[str, Tensor]]:
    """Each step's output, then the columns of the trace."""
    given, model.tier = dict(inputs), tier
    with model.request():
        for step in range(STEPS):
            given[record.timestep] = torch.full_like(inputs[record.timestep], 1.0 - step / STEPS)
            output = model(**given)
            output = output if isinstance(output, Tensor) else output.sample
            yield f"output.{step}", output
            given[record.latents] = given[record.latents] - output / STEPS
    columns = model.trace[-1].arrays()
    yield from ((name, torch.from_numpy(columns[name].astype("float32"))) for name in COLUMNS)
