"""Bundles: a compiled model as a folder.

    manifest.json            what it is, and the sha256 of every other file
    weights.safetensors      one copy, a width is a prefix of rows
    routers.safetensors      absent when there are none
    glue/*.pt2  plans/*      graphs
    engines/*/*              built from plans for one GPU (runtime.engines.tensorrt.cache); not of the manifest

Nothing in a bundle is unpickled or run while it is read. Files that the manifest does not name are
never read here. A bundle saved anew has no engines.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from runtime.base.errors import BundleError
from runtime.bundle.checks import check
from runtime.bundle.folder import separate, temporary_beside, written_whole
from runtime.bundle.program import Program
from runtime.bundle.spec import SCHEMA, Manifest
from runtime.bundle.tiers import explain_tiers

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
ROUTERS = "routers.safetensors"
_READ_AGAIN = 5
_LONGEST = 255
"""Bytes of a name in the usual file systems."""


def save(program: Program, path: str | Path) -> None:
    """Write `program` as the bundle `path`, all of it or nothing.

    An earlier bundle at `path` is replaced once the new one is complete; any other folder or file
    there is left alone with a BundleError. Permissions are those of the umask.
    """
    target = Path(path)
    check_place(target)
    with written_whole(target) as folder:
        _write(program, folder)


def check_place(target: Path) -> None:
    """BundleError where no bundle can be written to `target`, or something else is there."""
    if not target.name or "\0" in str(target):
        raise BundleError(f"{str(target)!r} is no name for a bundle: give that of a folder to make, as 'model.edit'")
    longest = max((*target.parts, temporary_beside(target).name), key=lambda part: len(os.fsencode(part)))
    if len(os.fsencode(longest)) > _LONGEST:
        raise BundleError(f"{target} cannot be written: its name is too long for a file system: choose a shorter one")
    if target.exists() and not (target / MANIFEST).is_file() and not _is_empty_folder(target):
        raise BundleError(f"{target} exists and is not a bundle: choose another name, or remove it")
    there = next(parent for parent in target.absolute().parents if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise BundleError(f"{target} cannot be written: {there} is not a folder, or not one that may be written to")


def load(path: str | Path, *, verify: bool = True) -> Program:
    """Read the bundle `path`; its weights are mapped from the file, not copied.

    `verify` compares every file with its sha256 in the manifest (about a second per GB). Where the bundle is replaced
    while it is read, it is read again. Raises BundleError, naming the file, for whatever keeps it from being used.
    """
    folder = Path(path)
    for _ in range(_READ_AGAIN):
        manifest = _read_manifest(folder)
        try:
            program = _read(folder, manifest, verify)
        except (BundleError, FileNotFoundError):
            if _read_manifest(folder) == manifest:
                raise
            continue
        if _read_manifest(folder) == manifest:  # else its files may be of two bundles
            return program
    raise BundleError(f"{folder} is replaced again and again while it is read: try once more")


def _read(folder: Path, manifest: Manifest, verify: bool) -> Program:
    for name, digest in manifest.files.items():
        _check_file(folder, name, digest if verify else None)
    graphs = [name for name in manifest.files if not name.endswith(".safetensors")]
    program = Program(
        manifest=manifest,
        weights=_read_tensors(folder, WEIGHTS, manifest),
        routers=_read_tensors(folder, ROUTERS, manifest) if ROUTERS in manifest.files else {},
        files={name: (folder / name).read_bytes() for name in graphs},
        folder=folder,
    )
    check(program)
    return program


def _write(program: Program, folder: Path) -> None:
    for name, data in program.files.items():
        _check_name(name)
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    save_file(separate(program.weights), folder / WEIGHTS)
    if program.routers:
        save_file(separate(program.routers), folder / ROUTERS)
    names = sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())
    manifest = replace(program.manifest, files={name: _sha256(folder / name) for name in names})
    (folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1))


def _no_bundle(folder: Path) -> str:
    """What to say of a place without a manifest."""
    if not folder.exists():
        return f"there is no {folder}"
    if (folder / "config.json").is_file():
        return f"{folder} is not a bundle but a saved model: `edit-compile compile` makes a bundle of it"
    return f"{folder} is not a bundle: it has no {MANIFEST}"


def _read_manifest(folder: Path) -> Manifest:
    place = folder / MANIFEST
    try:
        raw = msgspec.json.decode(place.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(_no_bundle(folder)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BundleError(f"{place} is damaged ({error}): copy or compile the bundle again") from error
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if schema != SCHEMA:
        raise BundleError(
            f"{place} has schema version {schema!r}, this edit_compile reads {SCHEMA}: compile the model again"
        )
    try:
        manifest = msgspec.convert(raw, Manifest)
    except msgspec.ValidationError as error:
        told = explain_tiers(raw) or error
        raise BundleError(f"{place} is damaged ({told}): copy or compile the bundle again") from error
    unknown = _unknown(raw, msgspec.to_builtins(manifest))
    if unknown:
        raise BundleError(f"{place} has the unknown field {unknown}: it was made by another edit_compile")
    if WEIGHTS not in manifest.files:
        raise BundleError(f"{place} names no {WEIGHTS}: copy or compile the bundle again")
    return manifest


def _unknown(raw: Any, known: Any, where: str = "") -> str | None:
    """Path of the first key of `raw` that decoding has dropped."""
    for key, value in raw.items() if isinstance(raw, dict) else enumerate(raw) if isinstance(raw, list) else ():
        if isinstance(raw, dict) and key not in known:
            return f"{where}{key}"
        found = _unknown(value, known[key], f"{where}{key}.")
        if found:
            return found
    return None


def _check_name(name: str) -> None:
    pure = PurePosixPath(name)
    if not name or "\\" in name or ":" in name or "\0" in name or pure.is_absolute() or ".." in pure.parts:
        raise BundleError(f"the bundle names a file {name!r}, which leaves its folder: refused")


def _check_file(folder: Path, name: str, digest: str | None) -> None:
    _check_name(name)
    place = folder / name
    if not place.resolve().is_relative_to(folder.resolve()):
        raise BundleError(f"{place} is a link that leaves the bundle: refused")
    if not place.is_file():
        raise BundleError(f"{place} is missing: copy or compile the bundle again")
    if digest is not None and _sha256(place) != digest:
        raise BundleError(f"{place} is not what was written (sha256 differs): copy or compile the bundle again")


def _read_tensors(folder: Path, name: str, manifest: Manifest) -> dict[str, Tensor]:
    try:
        return load_file(folder / name)
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{folder / name} is damaged ({error}): copy or compile the bundle again") from error


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
