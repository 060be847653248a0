"""Files that a reader sees whole or not at all."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from runtime.bundle.folder import file_beside, mode_of_new_files, write_whole


def write_file_atomically(path: Path, text: str) -> None:
    """Write `text` to a temporary neighbour of `path` and rename it, so a reader never sees half a file."""
    write_whole(path, text.encode())


def save_tensors_atomically(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write `tensors` as safetensors to a temporary neighbour of `path` and rename it."""
    with file_beside(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        temporary.chmod(mode_of_new_files(temporary.parent))
        temporary.replace(path)
