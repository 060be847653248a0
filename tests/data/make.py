"""Write the bundles that later versions have to read: python -m tests.data.make [FOLDER]. The same digests each time.

They go to tests/data/bundles/<version of pyproject.toml>/, each with a call's inputs and what it gave, and the form of
its manifest (format.json). A version's bundles are not made again once it is out: where other ones are there, the
command ends with status 1 and leaves them (--replace takes their place). CONTRIBUTING.md, "Changing the bundle's
format", says when to run it.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
import tempfile
import tomllib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import save_file

from runtime.bundle import files, spec, tiers
from runtime.face.load import load
from tests.data.record import BUNDLES, FORMAT, INDEX, Record, given_by, index

ROOT = Path(__file__).resolve().parents[2]


def version() -> str:
    """The version that pyproject.toml tells."""
    told: str = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    return told


def manifest_format() -> dict[str, dict[str, str]]:
    """The form of a manifest: every class of it, its fields with their types and defaults as they are written."""
    classes = [kind for kind in vars(spec).values() if dataclasses.is_dataclass(kind) and isinstance(kind, type)]
    classes += [tiers.StoredRouting, tiers.StoredSchedule, tiers.StoredReuse]
    form = {kind.__name__: {name: _told(kind, name) for name in kind.__annotations__} for kind in classes}
    return form | {"": {"Beyond": str(tiers.Beyond), "StoredPolicy": str(tiers.StoredPolicy)}}


def _told(kind: Any, name: str) -> str:
    """The type of a field, and what it is where a manifest lacks it."""
    field = getattr(kind, "__dataclass_fields__", {}).get(name)
    default = "" if field is None or field.default is dataclasses.MISSING else f" = {field.default!r}"
    made = "" if field is None or field.default_factory is dataclasses.MISSING else f" = {field.default_factory()!r}"
    return f"{kind.__annotations__[name]}{default}{made}"


def make(folder: Path, names: tuple[str, ...] | None = None) -> Mapping[str, Record]:
    """Write the bundles called `names` (all), what they gave, and their index to `folder`."""
    from tests.data.cases import CASES

    torch.set_num_threads(1)
    records = {}
    for name in names or tuple(CASES):
        case = CASES[name]()
        digest = files.save(case.program(), folder / name)
        records[name] = dataclasses.replace(case.record, digest=digest)
        gave = given_by(load(folder / name, engine=case.record.engines[0]), case.record, case.inputs)
        tensors = {f"input.{key}": value for key, value in case.inputs.items()} | gave
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / f"{name}.safetensors")
    (folder / INDEX).write_bytes(_json(records))
    (folder / FORMAT).write_bytes(_json(manifest_format()))
    return records


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=BUNDLES / version())
    parser.add_argument("--replace", action="store_true", help="take the place of other bundles of this version")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as place:
        made = make(Path(place))
        there = index(asked.folder) if (asked.folder / INDEX).exists() else {}
        for name, record in made.items():
            told = "new" if name not in there else "as it was" if there[name] == record else "ANOTHER"
            sys.stdout.write(f"{name}: {record.digest} ({told})\n")
        if not there and asked.folder.exists() and any(asked.folder.iterdir()):
            sys.stderr.write(f"{asked.folder} holds something else than bundles: give an empty folder, or a new one\n")
            return 1
        if there and there != made and not asked.replace:
            sys.stderr.write(f"{asked.folder} holds other bundles, which are left: raise the version, or --replace\n")
            return 1
        if there != made:
            shutil.rmtree(asked.folder, ignore_errors=True)
            shutil.copytree(place, asked.folder)
    return 0


def _json(value: object) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n"


if __name__ == "__main__":
    raise SystemExit(main())
