"""A safetensors file that is compared with what it should hold before anything is read from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from edit_compile.elastic.layout import ElasticError

Shape = tuple[int, ...]


class TensorFile:
    """An open file; `shapes` are those of its tensors. Errors are ElasticErrors that name the file and the tensor."""

    def __init__(self, path: Path, file: Any) -> None:
        self.path, self._file = path, file
        self.shapes: dict[str, Shape] = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118

    def read(self, key: str) -> Tensor:
        """The tensor `key`, on the CPU; ElasticError where there is no memory for it."""
        try:
            tensor: Tensor = self._file.get_tensor(key)
        except (RuntimeError, MemoryError) as error:
            raise ElasticError(f"{self.path}: {key} {list(self.shapes[key])} cannot be read: {_said(error)}") from error
        return tensor

    @torch.no_grad()
    def copy_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite `tensors` with the file's of the same names, in their own dtypes and on their own devices."""
        for key, target in tensors.items():
            try:
                target.copy_(self.read(key))
            except (RuntimeError, MemoryError, ElasticError) as error:
                raise ElasticError(
                    f"{self.path}: {key} {list(self.shapes[key])} was not loaded, those before it were, "
                    f"so that the model holds parts of both: {_said(error)}"
                ) from error

    def compare(self, expected: Mapping[str, Shape], what: str, given: Mapping[str, Shape] | None = None) -> None:
        """ElasticError naming the first keys that are missing, unknown, or of another shape than expected of `what`.

        `given` are the tensors to compare; all of the file's without it.
        """
        given = self.shapes if given is None else given
        missing, unknown = (sorted(one.keys() - other.keys()) for one, other in ((expected, given), (given, expected)))
        wrong = [
            f"{key} {list(given[key])} instead of {list(shape)}"
            for key, shape in sorted(expected.items())
            if key in given and given[key] != shape
        ]
        for said, keys in (("lacks", missing), ("holds the unknown", unknown), ("holds", wrong)):
            if keys:
                more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
                raise ElasticError(f"{self.path} does not fit {what}: it {said} {', '.join(keys[:3])}{more}")


@contextmanager
def opened(path: Path) -> Iterator[TensorFile]:
    """The safetensors file `path`; ElasticError where it is none."""
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ElasticError(f"{path} cannot be read ({error}): is this a safetensors file?") from error
    with file as entered:
        yield TensorFile(path, entered)


def shapes_of(tensors: Mapping[str, Tensor], where: str) -> dict[str, Shape]:
    """Shapes of `tensors`; ElasticError where they have no memory, so that nothing can be loaded into them."""
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ElasticError(f"{where} is on the meta device ({name}): make it with memory, to load weights into it")
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _said(error: BaseException) -> str:
    """The first line of what it says, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
