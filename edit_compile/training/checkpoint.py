"""Checkpoints without pickle: a folder of safetensors and one JSON file, renamed into place when complete."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from runtime.bundle.folder import separate, sweep, temporary_beside, written_whole

_NAME = re.compile(r"^step-(\d{8})$")


class CheckpointError(ValueError):
    """A checkpoint cannot be read: the message names the file and what to do about it."""


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs in order to go on after `step` finished optimizer steps.

    `model` and `ema` map parameter names to tensors; `optimizer` maps "<parameter name>/<state name>" to tensors.
    """

    step: int
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    config: dict[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int = 2) -> Path:
    """Write `folder/step-XXXXXXXX` and delete all but the `keep` newest; returns the new path."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{checkpoint.step:08d}"
    state = {"schema": 1, "step": checkpoint.step, "config": checkpoint.config}
    with written_whole(final) as place:
        for part in ("model", "ema", "optimizer"):
            save_file(separate(getattr(checkpoint, part)), place / f"{part}.safetensors")
        (place / "state.json").write_text(json.dumps(state, indent=1))
    for name in {left.name.split(".")[1] for left in folder.glob(".step-*")}:
        sweep(folder / name)  # what runs that were killed at other steps have left
    for old in list_checkpoints(folder)[:-keep]:
        aside = temporary_beside(old)
        old.rename(aside)  # a checkpoint that is half gone is none
        shutil.rmtree(aside, ignore_errors=True)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints under `folder`, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.match(path.name) and (path / "state.json").is_file())


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Read one checkpoint folder.

    Raises:
        CheckpointError: a file is missing or unreadable, or the checkpoint was written by another schema version.
    """
    try:
        state = json.loads((path / "state.json").read_text())
        parts = {part: load_file(path / f"{part}.safetensors", str(device)) for part in ("model", "ema", "optimizer")}
    except Exception as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be read ({error}); delete this folder to go on from the one before it"
        ) from error
    if state.get("schema") != 1:
        raise CheckpointError(f"checkpoint {path} has schema {state.get('schema')!r}, this version reads schema 1")
    return Checkpoint(step=int(state["step"]), config=state["config"], **parts)
