"""Bundles changed by hand, their hashes made anew: what somebody makes who may write into one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def seal(folder: Path) -> None:
    """Make the hash of the manifest anew."""
    data = (folder / "manifest.json").read_bytes()
    (folder / "manifest.sha256").write_text(f"{hashlib.sha256(data).hexdigest()}  manifest.json\n")


def put_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Have `change` alter the parsed manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    seal(folder)


def put_file(folder: Path, name: str, data: bytes) -> None:
    """Put the file `name` in the place of what is there, as if it had been saved."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
    if name == "manifest.json":
        seal(folder)
        return
    put_manifest(folder, lambda manifest: manifest["files"].update({name: hashlib.sha256(data).hexdigest()}))
