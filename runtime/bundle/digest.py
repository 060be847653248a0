"""The digest of a bundle: one sha256 by which it can be told from every other.

    digest                 of manifest.json, which has the sha256 of every other file: ``sha256sum manifest.json``
    digest with engines    of lines as sha256sum writes them, for manifest.json and what was built into engines/

The first stays what it is when engines are built or removed; saving the bundle anew, with another tier, makes another.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from runtime.base.errors import BundleError

FILE = "manifest.sha256"
"""Beside the manifest, as sha256sum writes it: tells damage. Whoever may write the one may write the other."""

_FORM = re.compile(r"sha256:[0-9a-f]{64}")
_BUILT = (".engine", ".json")


def of_bytes(data: bytes) -> str:
    """The digest of a bundle whose manifest.json is `data`."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def of_file(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def with_engines(folder: Path, digest: str) -> str | None:
    """The digest of the bundle `folder` of that `digest` with the engines built into it; None where there are none."""
    built = sorted(path for path in (folder / "engines").rglob("*") if path.suffix in _BUILT and path.is_file())
    if not built:
        return None
    lines = [f"{digest.removeprefix('sha256:')}  manifest.json\n"]
    lines += [f"{of_file(path)}  {path.relative_to(folder).as_posix()}\n" for path in built]
    return of_bytes("".join(lines).encode())


def line(digest: str) -> bytes:
    """What `FILE` holds."""
    return f"{digest.removeprefix('sha256:')}  manifest.json\n".encode()


def check_form(digest: str) -> None:
    """BundleError where `digest` is none."""
    if not isinstance(digest, str) or not _FORM.fullmatch(digest):
        raise BundleError(f"digest is {digest!r}: it has the form sha256:<64 hexadecimal digits>, as inspect prints it")
