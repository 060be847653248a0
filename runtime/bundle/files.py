"""Bundles: a compiled model as a folder.

    manifest.json            what it is, and the sha256 of every other file
    manifest.sha256          the sha256 of the manifest (runtime.bundle.digest)
    weights.safetensors      one copy, a width is a prefix of rows
    routers.safetensors      absent when there are none
    glue/*.pt2  plans/*      graphs
    engines/*/*              built from plans for one GPU (runtime.engines.tensorrt.cache); not of the manifest

Nothing in a bundle is unpickled or run while it is read. Files that the manifest does not name are
never read here. A bundle saved anew has no engines.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from runtime.base.errors import BundleError
from runtime.bundle import digest as digests
from runtime.bundle import limits
from runtime.bundle.checks import check
from runtime.bundle.folder import separate, temporary_beside, written_whole
from runtime.bundle.graph_checks import check_graphs
from runtime.bundle.program import Program
from runtime.bundle.spec import SCHEMA, Manifest
from runtime.bundle.tiers import explain_tiers

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
ROUTERS = "routers.safetensors"
_READ_AGAIN = 20
_LONGEST = 255
"""Bytes of a name in the usual file systems."""


def save(program: Program, path: str | Path) -> str:
    """Write `program` as the bundle `path`, all of it or nothing; gives its digest.

    An earlier bundle at `path` is replaced once the new one is complete; any other folder or file
    there is left alone with a BundleError, as is all where `load` would refuse what is to be written. Permissions are
    those of the umask.
    """
    target = Path(path)
    check_place(target)
    check(program)
    graphs = program.files.items()
    for name, data in graphs:
        _within("GRAPH_BYTES", len(data), name)
    _within("GRAPHS_BYTES", sum(len(data) for _, data in graphs), "all graphs together")
    check_graphs(program)
    try:
        with written_whole(target) as folder:
            return _write(program, folder)
    except (OSError, SafetensorError) as error:
        raise BundleError(
            f"{target} cannot be written ({error}): what was there is as it was; see to space and permissions"
        ) from error


def _within(limit: str, size: int, what: str) -> None:
    """BundleError where `load` would refuse `what`, which has `size` bytes, by the limit of that name."""
    most = getattr(limits, limit)
    if size > most:
        raise BundleError(
            f"{what}: {size} bytes, `load` reads at most {most} ({limit} in runtime/bundle/limits.py): not written; "
            "compile for fewer widths or forms of call"
        )


def check_place(target: Path) -> None:
    """BundleError where no bundle can be written to `target`, or something else is there."""
    if not target.name or "\0" in str(target):
        raise BundleError(f"{str(target)!r} is no name for a bundle: give that of a folder to make, as 'model.edit'")
    longest = max((*target.parts, temporary_beside(target).name), key=lambda part: len(os.fsencode(part)))
    if len(os.fsencode(longest)) > _LONGEST:
        raise BundleError(f"{target} cannot be written: its name is too long for a file system: choose a shorter one")
    try:
        other = target.exists() and not (target / MANIFEST).is_file() and not _is_empty_folder(target)
        there = next(parent for parent in target.absolute().parents if parent.exists())
    except OSError as error:
        raise BundleError(f"{target} cannot be written ({error}): choose another place, or have it opened") from error
    if other:
        raise BundleError(f"{target} exists and is not a bundle: choose another name, or remove it")
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise BundleError(f"{target} cannot be written: {there} is not a folder, or not one that may be written to")


def replaced(path: Path) -> str | None:
    """What `save` to `path` would replace, in words; None where no bundle is there."""
    return f"replaces the bundle {path}" if (path / MANIFEST).is_file() else None


def load(path: str | Path, *, verify: bool = True, digest: str | None = None) -> Program:
    """Read the bundle `path`; its weights are mapped from the file, not copied.

    `verify` compares every file with its sha256 in the manifest (about a second per GB). With `digest`
    (``sha256:...``, see `runtime.bundle.digest`) any other bundle than the one of that digest is refused, its engines
    among it where they are part of the digest. Where the bundle is replaced while it is read, it is read again. Raises
    BundleError, naming the file, for whatever keeps it from being used.
    """
    folder = Path(path)
    if digest is not None:
        digests.check_form(digest)
    for _ in range(_READ_AGAIN):
        manifest = _read_manifest(folder)
        try:
            program = _read(folder, *manifest, verify or digest is not None, digest)
        except BundleError:
            if _read_manifest(folder) == manifest:
                raise
            continue
        if _read_manifest(folder) == manifest:  # else its files may be of two bundles
            _check(program)
            return program
    raise BundleError(f"{folder} is replaced again and again while it is read: try once more")


def bundle_digest(path: str | Path, engines: bool = False) -> str:
    """The digest of the bundle `path`; with `engines`, of it and what was built into it (see `runtime.bundle.digest`).

    BundleError where there is no bundle, or no engine in it.
    """
    _, own = _read_manifest(Path(path))
    found = digests.with_engines(Path(path), own) if engines else own
    if found is None:
        raise BundleError(f"{path} holds no engines: `edit-compile build` makes them")
    return found


def _read(folder: Path, manifest: Manifest, own: str, verify: bool, digest: str | None) -> Program:
    if digest not in (None, own) and digest != digests.with_engines(folder, own):
        raise BundleError(f"{folder} has the digest {own}, not {digest}: it is another bundle, or was changed: refused")
    _check_seal(folder, own)
    graphs: dict[str, bytes] = {}
    for name, expected in manifest.files.items():
        _check_file(folder, name, expected if verify else None)
        if not name.endswith(".safetensors"):
            graphs[name] = _read_bytes(folder / name, limits.GRAPH_BYTES)
            if sum(map(len, graphs.values())) > limits.GRAPHS_BYTES:
                raise BundleError(f"{folder} holds graphs of more than {limits.GRAPHS_BYTES} bytes: refused")
    return Program(
        manifest=manifest,
        weights=_read_tensors(folder, WEIGHTS, manifest),
        routers=_read_tensors(folder, ROUTERS, manifest) if ROUTERS in manifest.files else {},
        files=graphs,
        folder=folder,
        digest=own,
    )


def _check(program: Program) -> None:
    """BundleError where the parts of a bundle that was read do not fit each other, or its graphs may not be run."""
    try:
        check(program)
        check_graphs(program)
    except BundleError as error:
        raise BundleError(f"{program.folder}: {error}") from error


def _write(program: Program, folder: Path) -> str:
    """Write its files, and give its digest."""
    for name, data in program.files.items():
        _check_name(name)
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    save_file(separate(program.weights), folder / WEIGHTS)
    if program.routers:
        save_file(separate(program.routers), folder / ROUTERS)
    names = sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())
    manifest = replace(program.manifest, files={name: digests.of_file(folder / name) for name in names})
    data = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
    _within("MANIFEST_BYTES", len(data), MANIFEST)
    (folder / MANIFEST).write_bytes(data)
    digest = digests.of_bytes(data)
    (folder / digests.FILE).write_bytes(digests.line(digest))
    return digest


def _no_bundle(folder: Path) -> str:
    """What to say of a place without a manifest."""
    if not folder.exists():
        return f"there is no {folder}"
    if (folder / "config.json").is_file():
        return f"{folder} is not a bundle but a saved model: `edit-compile compile` makes a bundle of it"
    return f"{folder} is not a bundle: it has no {MANIFEST}"


def _read_manifest(folder: Path) -> tuple[Manifest, str]:
    """The manifest and the digest of the bundle `folder`."""
    place = folder / MANIFEST
    if not place.exists():
        raise BundleError(_no_bundle(folder))
    data = _read_bytes(place, limits.MANIFEST_BYTES)
    try:
        return _parsed(data, place), digests.of_bytes(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{place} is damaged ({error}): copy or compile the bundle again") from error


def _parsed(data: bytes, place: Path) -> Manifest:
    raw = msgspec.json.decode(data)
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if schema != SCHEMA:
        raise BundleError(
            f"{place} has schema version {str(schema)[:20]}, this edit_compile reads {SCHEMA}: take the "
            "one that made it, or compile the model again"
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


def _check_seal(folder: Path, own: str) -> None:
    """BundleError where manifest.json is not what was written; a warning where nothing tells."""
    place = folder / digests.FILE
    if not place.exists():
        told = (
            f"{folder} has no {digests.FILE}, so that damage to its manifest goes unnoticed: load it and save it anew"
        )
        warnings.warn(told, RuntimeWarning, stacklevel=4)
    elif _read_bytes(place, limits.MANIFEST_BYTES) != digests.line(own):
        raise BundleError(
            f"{folder / MANIFEST} is not what was written (its sha256 is not that in {digests.FILE}): copy or compile "
            "the bundle again"
        )


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
        raise BundleError(f"manifest.json names a file {name!r}, which leaves its folder: refused")


def _check_file(folder: Path, name: str, digest: str | None) -> None:
    _check_name(name)
    place = folder / name
    try:
        if not place.resolve().is_relative_to(folder.resolve()):
            raise BundleError(f"{place} is a link that leaves the bundle: refused")
        if not place.is_file():
            raise BundleError(f"{place} is missing: copy or compile the bundle again")
        if digest is not None and digests.of_file(place) != digest:
            raise BundleError(f"{place} is not what was written (sha256 differs): copy or compile the bundle again")
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: links in a circle
        raise BundleError(f"{place} cannot be read ({error}): copy the bundle again") from error


def _read_bytes(place: Path, most: int) -> bytes:
    """What the file `place` holds; BundleError where that is more than `most` bytes, or cannot be read."""
    try:
        if not place.is_file():  # a pipe would never end
            raise BundleError(f"{place} is not a file: copy or compile the bundle again")
        if place.stat().st_size > most:
            raise BundleError(f"{place} has more than {most} bytes, which none has that was compiled: refused")
        return place.read_bytes()
    except OSError as error:
        raise BundleError(f"{place} cannot be read ({error}): copy the bundle again") from error


def _read_tensors(folder: Path, name: str, manifest: Manifest) -> dict[str, Tensor]:
    try:
        return load_file(folder / name)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise BundleError(f"{folder / name} is damaged ({error}): copy or compile the bundle again") from error


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())
