"""Engines kept in the bundle that they were built from, each beside a record of what it was built from and for.

    engines/<library>-<version>-<gpu or sm>-<precision>/<plan>-w050.engine       weights are inputs
                                                        <plan>-w050-<block>.engine    one block's weights inside
                                                        ....json                 its record
                                                        timing.cache             what the builder has measured

An engine is used only where its record holds the very key that is asked for and its bytes have the record's sha256.
The sha256 tells damage, not tampering: whoever can write into a bundle decides what runs, as with any library.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import msgspec

from runtime.base.errors import EngineError
from runtime.bundle.folder import write_whole
from runtime.engines.tensorrt.jobs import FOLDER, Key, Profile


@dataclass(frozen=True)
class Record:
    """What is known of an engine that was built; `seconds` are those of the build."""

    key: Key
    profiles: tuple[Profile, ...]
    sha256: str
    bytes: int
    seconds: float


def write(bundle: Path, key: Key, profiles: tuple[Profile, ...], engine: bytes, seconds: float) -> Record:
    """Keep `engine`; a process that ends in between leaves nothing that could be taken for an engine."""
    record = Record(key, profiles, _sha256(engine), len(engine), seconds)
    place = _place(bundle, key)
    _replace(place, engine)
    _replace(place.with_suffix(".json"), msgspec.json.format(msgspec.json.encode(record), indent=1))
    return record


def read(bundle: Path, key: Key) -> tuple[bytes, Record]:
    """The engine of `key` and its record; EngineError that says what is there instead."""
    record = look_up(bundle, key)
    data = (bundle / key.place).read_bytes()
    if _sha256(data) != record.sha256:
        raise EngineError(f"{bundle / key.place} is not what was built (sha256 differs): {_again(bundle, key)}")
    return data, record


def look_up(bundle: Path, key: Key) -> Record:
    """The record of the engine of `key`, of which only the size is checked; EngineError as for `read`."""
    place = _place(bundle, key)
    if not place.is_file():
        raise EngineError(f"{_missing(bundle, key)}: {_again(bundle, key)}")
    record = _record(place.with_suffix(".json"))
    if record is None or place.stat().st_size != record.bytes:
        raise EngineError(f"{place} has no record of its own, or another size than that says: {_again(bundle, key)}")
    differences = [
        f"{field.name} was {getattr(record.key, field.name)!r}, is {getattr(key, field.name)!r}"
        for field in fields(Key)
        if getattr(record.key, field.name) != getattr(key, field.name)
    ]
    if differences:
        raise EngineError(
            f"{place} was built from or for something else ({'; '.join(differences)}): {_again(bundle, key)}"
        )
    return record


def read_timings(bundle: Path, key: Key) -> bytes:
    """What builds into the same folder have measured; empty where nothing has been."""
    place = (bundle / key.place).with_name("timing.cache")
    return place.read_bytes() if place.is_file() else b""


def write_timings(bundle: Path, key: Key, timings: bytes) -> None:
    """Keep the builder's measurements, if any."""
    if timings:
        _replace((bundle / key.place).with_name("timing.cache"), timings)


def built(bundle: Path) -> Iterator[Record]:
    """The readable records of a bundle, whatever they are for."""
    for place in sorted((bundle / FOLDER).glob("*/*.json")):
        record = _record(place)
        if record is not None:
            yield record


def _place(bundle: Path, key: Key) -> Path:
    place = bundle / key.place
    if not place.resolve().is_relative_to(bundle.resolve()):
        raise EngineError(f"{place} is a link that leaves the bundle: refused")
    return place


def _missing(bundle: Path, key: Key) -> str:
    which = f"plan {key.plan} at width {key.width:g}" + (f" of block {key.block}" if key.block else "")
    wanted = f"{bundle} holds no engine of {which}, {_who(key)}"
    others = dict.fromkeys(_who(record.key) for record in built(bundle) if _who(record.key) != _who(key))
    return f"{wanted}; it holds engines of {', and of '.join(others)}" if others else wanted


def _who(key: Key) -> str:
    return f"{key.library} {key.version} for {key.target} in {key.precision} with {key.weights} weights"


def _again(bundle: Path, key: Key) -> str:
    packed = " --weights packed" if key.weights == "packed" else ""
    command = f"edit-compile build {bundle} --engine {key.library}{packed}"
    return f"build them with `{command}` on the machine that runs them, or use engine='onnxruntime' or 'torch'"


def _record(place: Path) -> Record | None:
    try:
        return msgspec.json.decode(place.read_bytes(), type=Record)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None


def _replace(place: Path, data: bytes) -> None:
    """Write `place` whole, or leave it as it was; EngineError where it cannot be written."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_whole(place, data)
    except OSError as error:
        raise EngineError(
            f"{place} cannot be written ({error}): see to space and permissions, then build again"
        ) from error


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
