"""What tuning has found out so far, in a folder, so that a run that was killed goes on where it was.

`work.json` says of which bundle. Of each generation, told by its contents, there are products of the errors of
intervals (`<generation>-reach8.safetensors`) and what whole replays reached (`<generation>.json`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from edit_compile.calls.generations import Generation
from edit_compile.files import save_tensors_atomically, write_file_atomically
from edit_compile.tuning.intervals import Products
from runtime.base.errors import EditError
from runtime.face.arguments import flatten
from runtime.face.transformer import CompiledTransformer

FORMAT = 2
STATE = "work.json"


class Replay(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a generation's replay reached, in dB, and the FLOPs of it: those done, and those of the dense model."""

    decibels: float
    flops: int
    dense_flops: int


class State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The bundle that the work is of."""

    format: int
    bundle: str


class Work:
    """Products of errors and replays by generation; without a `folder` in memory alone.

    EditError where the folder holds the work of another bundle, or cannot be read.
    """

    def __init__(self, folder: Path | None, compiled: CompiledTransformer) -> None:
        self._folder = folder
        self._replays: dict[str, dict[str, Replay]] = {}
        if folder is not None:
            if folder.exists() and not folder.is_dir():
                raise EditError(f"work={str(folder)!r} is a file: give a folder")
            folder.mkdir(parents=True, exist_ok=True)
            _check_bundle(folder, State(FORMAT, bundle_digest(compiled)))

    def key(self, generation: Generation) -> str:
        """What `generation` is called here."""
        return str(id(generation)) if self._folder is None else generation_digest(generation)

    def products(self, key: str, reach: int, size: int, make: Callable[[], Products]) -> tuple[Products, bool]:
        """Those (size, size) of a generation, and whether they were there; else made, and kept."""
        if self._folder is None:
            return make(), False
        path = self._folder / f"{key}-reach{reach}.safetensors"
        if path.exists():
            try:
                found: Products = load_file(path)["products"].numpy()
            except (OSError, SafetensorError, KeyError) as error:
                raise _damaged(path, error) from error
            if found.shape != (size, size) or not np.isfinite(found).all():
                raise _damaged(path, ValueError("other numbers than tuning writes"))
            return found, True
        made = make()
        save_tensors_atomically(path, {"products": torch.from_numpy(made)})
        return made, False

    def replay(self, key: str, name: str, make: Callable[[], Replay]) -> Replay:
        """The replay of a generation that is called `name`; made where it is not there, and kept."""
        known = self._known(key)
        if name not in known:
            known[name] = make()
            if self._folder is not None:
                write_file_atomically(self._folder / f"{key}.json", msgspec.json.encode(known).decode())
        return known[name]

    def _known(self, key: str) -> dict[str, Replay]:
        if key not in self._replays:
            path = None if self._folder is None else self._folder / f"{key}.json"
            try:
                text = path.read_bytes() if path is not None and path.exists() else b"{}"
                self._replays[key] = msgspec.json.decode(text, type=dict[str, Replay])
            except (OSError, msgspec.DecodeError) as error:
                raise _damaged(path, error) from error
        return self._replays[key]


def bundle_digest(compiled: CompiledTransformer) -> str:
    """Of what decides the numbers of a compiled transformer: its model, blocks, weights and engine; tiers do not."""
    program = compiled.program
    manifest = program.manifest
    names = {name for block in manifest.blocks for name in block.weights}
    names.update(manifest.glues[0].weights)  # later ones come with other forms of call
    told = (manifest.model, manifest.config, manifest.dtype, [block.name for block in manifest.blocks], compiled.engine)
    return _digest(repr(told), ((name, program.weights[name]) for name in sorted(names)))


def generation_digest(generation: Generation) -> str:
    """Of all that is recorded of a generation; tensors that calls share are read once."""
    told, tensors = list[object](), dict[int, tuple[str, Tensor]]()
    for call in generation.calls:
        arguments, constants = flatten(call.arguments)
        parts = [*sorted(arguments.items()), *((f"output {at}", one) for at, one in enumerate(call.outputs))]
        for name, tensor in parts:
            tensors.setdefault(id(tensor), (f"{len(tensors)} {name}", tensor))
        told.append((call.context, sorted(constants.items()), [tensors[id(tensor)][0] for _, tensor in parts]))
    result = [] if generation.result is None else [("result", generation.result)]
    return _digest(repr(told), [*tensors.values(), *result])


def _digest(told: str, tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.blake2b(told.encode(), digest_size=16)
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_bundle(folder: Path, own: State) -> None:
    path = folder / STATE
    if not path.exists():
        if any(folder.iterdir()):
            raise EditError(f"{folder} is not the work of tuning, it holds something else: give another folder")
        write_file_atomically(path, msgspec.json.encode(own).decode())
        return
    try:
        found = msgspec.json.decode(path.read_bytes(), type=State)
    except (OSError, msgspec.DecodeError) as error:
        raise EditError(f"{path} cannot be read ({error}): delete {folder}, and what it held is found anew") from error
    if found.format != own.format:
        raise EditError(
            f"{folder} holds the work of another version of edit_compile (format {found.format}, this one writes "
            f"{own.format}): delete it, or give another folder"
        )
    if found != own:
        raise EditError(
            f"{folder} holds the work of tuning another bundle, or with another engine: give another folder, or "
            "delete it"
        )


def _damaged(path: Path | None, error: Exception) -> EditError:
    return EditError(f"{path} cannot be read ({error}): delete it, and what it held is found anew")
