"""Random changes of a bundle, by seed: of bytes and of structure, with every hash made anew."""

from __future__ import annotations

import io
import json
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import forged

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 0.5, -0.0, 1e308, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**40,
    "", "x", "../x", "\0", "float64", "torch.ops.aten.relu.default", [], [[]], {}, {"x": 1}, [1, 2, 3], "9" * 5000,
]  # fmt: skip
"""What is put in the place of a value."""


def mutate(folder: Path, seed: int) -> str:
    """Change the bundle `folder` in one to three ways that `seed` draws; returns what was done."""
    draw, done = random.Random(seed), list[str]()
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        try:
            done.append(draw.choice(KINDS)(folder, draw))
        except (ValueError, LookupError, TypeError, AttributeError, OSError, zipfile.BadZipFile, EOFError):
            if not done:
                raise
            break  # the change before has made it unreadable
    return "; ".join(done)


def _files(folder: Path, suffix: str = "") -> list[str]:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob(f"*{suffix}") if path.is_file())
    return [name for name in names if not name.startswith("manifest.")]


def _bytes(folder: Path, draw: random.Random) -> str:
    name = draw.choice(_files(folder))
    data = bytearray((folder / name).read_bytes())
    how = draw.choice(("flip", "set", "cut", "insert", "repeat", "zero"))
    at = draw.randrange(len(data)) if data else 0
    span = draw.choice((1, 1, 4, 16, 300))
    if how == "flip" and data:
        data[at] ^= 1 << draw.randrange(8)
    elif how == "set":
        data[at : at + span] = draw.randbytes(len(data[at : at + span]))
    elif how == "cut":
        del data[at : at + draw.choice((span, len(data)))]
    elif how == "insert":
        data[at:at] = draw.randbytes(span)
    elif how == "repeat":
        data[at:at] = data[at : at + span]
    else:
        data[at : at + span] = bytes(len(data[at : at + span]))
    forged.put_file(folder, name, bytes(data))
    return f"{how} {span} bytes at {at} of {name}"


def _swap(folder: Path, draw: random.Random) -> str:
    one, other = draw.choice(_files(folder)), draw.choice(_files(folder))
    forged.put_file(folder, one, (folder / other).read_bytes())
    return f"{other} in the place of {one}"


def _manifest(folder: Path, draw: random.Random) -> str:
    done = ""

    def change(manifest: Any) -> None:
        nonlocal done
        done = tree(manifest, draw)

    forged.put_manifest(folder, change)
    return f"manifest: {done}"


def _manifest_bytes(folder: Path, draw: random.Random) -> str:
    data = bytearray((folder / "manifest.json").read_bytes())
    at = draw.randrange(len(data))
    data[at : at + draw.choice((1, 2, 50))] = draw.choice((b"", b"[", b"}", b'"', b"\xff", b"1e999", b"-", b"[" * 5000))
    (folder / "manifest.json").write_bytes(data)
    if not draw.randrange(3):
        return f"manifest bytes at {at}, its hash as it was"
    forged.seal(folder)
    return f"manifest bytes at {at}"


def _graph(folder: Path, draw: random.Random) -> str:
    name = draw.choice(_files(folder, ".pt2"))
    done = ""

    def change(graph: Any) -> None:
        nonlocal done
        inner = graph["graph_module"]["graph"]
        done = tree(inner[draw.choice(("nodes", "nodes", "nodes", "inputs", "outputs", "tensor_values"))], draw)

    with_graph(folder, name, change)
    return f"{name}: {done}"


def _targets(folder: Path, draw: random.Random) -> str:
    """Another operator of this torch in the place of one of a graph."""
    import torch

    name = draw.choice(_files(folder, ".pt2"))
    packets = sorted(set(dir(torch.ops.aten)) - {"name"}) or ["relu"]
    names = [schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("aten::")]
    other = draw.choice(packets if draw.random() < 0.2 else sorted(set(names))).removeprefix("aten::")
    overloads = getattr(getattr(torch.ops.aten, other, None), "overloads", lambda: ["default"])()
    target = f"torch.ops.aten.{other}.{draw.choice(overloads)}"
    with_graph(folder, name, lambda graph: draw.choice(graph["graph_module"]["graph"]["nodes"]).update(target=target))
    return f"{name} calls {target}"


def _repacked(folder: Path, draw: random.Random) -> str:
    name = draw.choice(_files(folder, ".pt2"))
    made = io.BytesIO()
    how = draw.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_STORED))
    with zipfile.ZipFile(folder / name) as source, zipfile.ZipFile(made, "w", how) as target:
        for member in source.namelist():
            if draw.random() < 0.9:
                target.writestr(member if draw.random() < 0.9 else f"x{member}", source.read(member))
    forged.put_file(folder, name, made.getvalue())
    return f"{name} packed anew, method {how}"


def _place(folder: Path, draw: random.Random) -> str:
    name = draw.choice(_files(folder))
    place, how = folder / name, draw.choice(("gone", "folder", "link", "circle", "empty"))
    place.unlink()
    if how == "folder":
        place.mkdir()
    elif how == "link":
        place.symlink_to(draw.choice(("/etc/passwd", "/dev/zero", "nowhere", "../glue")))
    elif how == "circle":
        place.symlink_to(place.name)
    elif how == "empty":
        place.touch()
    return f"{name} is {how}"


KINDS: list[Callable[[Path, random.Random], str]] = [
    *[_bytes] * 2, *[_manifest] * 3, _manifest_bytes, *[_graph] * 3, _targets, _swap, _repacked, _place,
]  # fmt: skip


def tree(value: Any, draw: random.Random) -> str:
    """Change one place in parsed JSON, drawn; returns which, and how."""
    places = list(_places(value))
    if not places:
        return "nothing to change"
    holder, key = draw.choice(places)
    how = draw.choice(("value", "value", "delete", "copy", "swap", "near", "deep"))
    old = holder[key]
    if how == "delete":
        del holder[key]
    elif how == "copy":
        other, there = draw.choice(places)
        with_other = json.loads(json.dumps(other[there])) if there in _keys(other) else None
        holder[key] = with_other
    elif how == "swap" and isinstance(holder, list):
        draw.shuffle(holder)
    elif how == "near" and type(old) in (int, float):
        holder[key] = draw.choice((old + 1, old - 1, old * 2, -old, old * 10**9))
    elif how == "deep":
        for _ in range(draw.choice((3, 50, 400))):
            old = [old]
        holder[key] = old
    else:
        holder[key] = draw.choice(VALUES)
    return f"{how} at {str(key)[:40]}"


def _keys(holder: Any) -> Any:
    return range(len(holder)) if isinstance(holder, list) else holder


def _places(value: Any) -> Any:
    for key in _keys(value) if isinstance(value, (dict, list)) else ():
        yield value, key
        yield from _places(value[key])


def with_graph(folder: Path, name: str, change: Callable[[Any], object]) -> None:
    """Have `change` alter the parsed graph of the file `name`."""
    made = io.BytesIO()
    try:
        with zipfile.ZipFile(folder / name) as source, zipfile.ZipFile(made, "w") as target:
            for member in source.namelist():
                data = source.read(member)
                if member.endswith("models/model.json"):
                    graph = json.loads(data)
                    change(graph)
                    data = json.dumps(graph).encode()
                target.writestr(member, data)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, zipfile.BadZipFile, EOFError):
        return  # an earlier change has made it unreadable
    forged.put_file(folder, name, made.getvalue())
