"""Recorded calls of a transformer: what a generation's file holds, and reading it.

A generation is ``generation-<number>.safetensors``. Its tensors are stored once each, under keys that the JSON in its
metadata (`Contents`) refers to; nothing in it is code. Keys are made to be read, and mean nothing by themselves.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from edit_compile.calls.argument_tree import Kind, whole_arguments
from edit_compile.calls.forms import one_of_each_form
from runtime.base.errors import EditError
from runtime.face.arguments import Constant

FORMAT = 1
METADATA = "edit_compile.calls"

_NAME = re.compile(r"^generation-(\d{5,})\.safetensors$")


class CallsError(EditError, ValueError):
    """Calls cannot be recorded, written or read; the message names the argument or the file, and what to do."""


class Call(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One call: tensors by their keys in the file, all else as it is; arguments go by dotted name."""

    tensors: dict[str, str]
    constants: dict[str, Constant]
    kinds: dict[str, Kind]
    context: str | None
    outputs: tuple[str, ...]

    def keys(self) -> set[str]:
        """Keys of all tensors of the call."""
        return {*self.tensors.values(), *self.outputs}


class Contents(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that a file says of its tensors: calls in order; `result` is the key of what the sampler ended with."""

    format: int
    model: str
    number: int
    calls: tuple[Call, ...]
    result: str | None = None

    def keys(self) -> set[str]:
        """Keys of all tensors of the generation."""
        own = {self.result} if self.result is not None else set()
        return own.union(*(call.keys() for call in self.calls))


@dataclass(frozen=True)
class RecordedCall:
    """One call of the transformer.

    `arguments` are ready for ``model(**arguments)``: nested as they were passed, with tensors on the CPU in their own
    shapes and dtypes, as they were when the call began; without `return_dict`. Calls of a generation share tensors that
    were equal, so do not write into them. `context` is the name of diffusers' cache context ("cond"), None outside of
    any. `outputs` are the tensors of what the model returned, in order, on the CPU.
    """

    arguments: dict[str, Any]
    context: str | None
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class Generation:
    """The calls of one generation, in order; `result` is what its sampler ended with, on the CPU, None if unknown."""

    calls: tuple[RecordedCall, ...]
    result: Tensor | None


class Recording:
    """The generations in a folder that `edit_compile.record` wrote, in the order they were made.

    ``len(recording)``, ``recording[i]`` and iteration; each reads one file, and nothing is kept. The files are those
    that were there when this was made. `model` names what was recorded.

    Raises:
        CallsError: there is no such folder, it holds no generation, or a file is damaged, of another format, or (when
            it is read) holds other tensors than it says.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CallsError(f"{folder} is not a folder: give the one that edit_compile.record wrote to")
        self._paths = tuple(files_of(self.folder).values())
        if not self._paths:
            raise CallsError(f"{folder} holds no generation: record some first (edit_compile.record)")
        self.model = read_contents(self._paths[0]).model

    @property
    def model_class(self) -> str:
        """Class of the model, whichever stood for it (see `recorded_model.name_of`)."""
        return self.model.rpartition(" of ")[2]

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Generation:
        return read_generation(self._paths[index])

    def __iter__(self) -> Iterator[Generation]:
        return (read_generation(path) for path in self._paths)

    def inputs(self) -> list[dict[str, Any]]:
        """Arguments of one call of each form in which the model was called; `compile` and `elasticize` ask for them.

        A form is what arguments there are, in which shapes and dtypes, and the values of those that are no tensors.
        """
        return one_of_each_form(call.arguments for generation in self for call in generation.calls)


def file_name(number: int) -> str:
    """Name of the file of generation `number`, counted from 0."""
    return f"generation-{number:05d}.safetensors"


def files_of(folder: Path) -> dict[int, Path]:
    """Files of the generations in `folder`, by number, in order."""
    found = ((_NAME.match(path.name), path) for path in folder.iterdir())
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def read_contents(path: Path) -> Contents:
    """What the file `path` says of itself; CallsError as for `read_generation`."""
    return _read(path)[0]


def read_generation(path: Path) -> Generation:
    """The generation in the file `path`; CallsError where it is damaged or something else."""
    contents, tensors = _read(path, with_tensors=True)
    missing, unknown = sorted(contents.keys() - tensors.keys()), sorted(tensors.keys() - contents.keys())
    if missing or unknown:
        told = f"lacks the tensor {missing[0]!r}" if missing else f"holds the tensor {unknown[0]!r}, of no call"
        raise _damaged(path, told)
    try:
        calls = tuple(_recorded(call, tensors) for call in contents.calls)
    except ValueError as error:
        raise _damaged(path, f"says something else than calls ({error})") from error
    return Generation(calls, tensors[contents.result] if contents.result is not None else None)


def beginning_of(path: Path) -> bytes:
    """What `beginning` gives for the generation in the file `path`; CallsError as for `read_generation`."""
    first, *_ = read_contents(path).calls
    with safe_open(path, framework="pt") as file:
        return beginning(first, {key: file.get_tensor(key) for key in first.tensors.values()})


def beginning(first: Call, tensors: Mapping[str, Tensor]) -> bytes:
    """A digest of what the first call of a generation was given."""
    digest = hashlib.blake2b(repr(sorted(first.constants.items(), key=str)).encode())
    for name, key in sorted(first.tensors.items()):
        digest.update(f"{name} {tensors[key].dtype} {tuple(tensors[key].shape)}".encode())
        digest.update(tensors[key].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def _recorded(call: Call, tensors: dict[str, Tensor]) -> RecordedCall:
    if both := call.constants.keys() & call.tensors.keys():
        raise ValueError(f"says twice what {min(both)} is")
    leaves = {**call.constants, **{name: tensors[key] for name, key in call.tensors.items()}}
    return RecordedCall(whole_arguments(leaves, call.kinds), call.context, tuple(tensors[key] for key in call.outputs))


def _read(path: Path, with_tensors: bool = False) -> tuple[Contents, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA, "")
            # cloned, since CPU kernels round by how memory is aligned, and a file's is aligned to 8 bytes
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()} if with_tensors else {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise _damaged(path, f"cannot be read ({error})") from error
    if not text:
        raise CallsError(f"{path} is not a recorded generation: it has no {METADATA!r} in its metadata; move it away")
    try:
        contents = msgspec.json.decode(text, type=Contents)
    except msgspec.DecodeError as error:
        raise _of_another_format(path, text) or _damaged(path, f"says something else than calls ({error})") from error
    if contents.format != FORMAT:
        raise CallsError(f"{path} is of format {contents.format}, this version reads {FORMAT}: record anew")
    return contents, tensors


def _of_another_format(path: Path, text: str) -> CallsError | None:
    """The error for a file of another version, whose fields need not be ours."""
    try:
        found = msgspec.json.decode(text, type=dict[str, Any]).get("format")
    except msgspec.DecodeError:
        return None
    if found in (None, FORMAT):
        return None
    return CallsError(f"{path} is of format {found}, this version reads {FORMAT}: record anew")


def _damaged(path: Path, told: str) -> CallsError:
    return CallsError(f"{path} {told}: delete this file, the others can be read without it")
