"""What a TensorRT module offers, as JSON: `python -m tests.tensorrt_api MODULE [LIBRARY...]`, in a process of its own.

Libraries are loaded before, so that bindings whose own libraries are not there can be imported over stand-ins.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

STAND_INS = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
ENTRIES = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)


@dataclass(frozen=True)
class Signature:
    """One overload: its parameters without self, those that may be left out, and what it returns."""

    parameters: list[str]
    optional: list[str]
    returns: str


@dataclass(frozen=True)
class Member:
    """A member of a class: "method", "property" (of type `returns` of its one signature), or "value"."""

    kind: str
    signatures: list[Signature] = field(default_factory=list)


@dataclass(frozen=True)
class Api:
    """Classes by dotted name, each with its members."""

    version: str
    classes: dict[str, dict[str, Member]]


def describe(name: str, *libraries: Path) -> Api:
    """The API of the module `name`, imported in another process over `libraries`."""
    command = [sys.executable, "-m", "tests.tensorrt_api", name, *map(str, libraries)]
    told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=100).stdout)
    classes = {
        owner: {key: Member(m["kind"], [Signature(**one) for one in m["signatures"]]) for key, m in members.items()}
        for owner, members in told["classes"].items()
    }
    return Api(told["version"], classes)


def stand_ins(folder: Path) -> list[Path]:
    """Libraries in `folder` with the entry points that the bindings of TensorRT 11 ask for, which do nothing.

    OSError where there is no C compiler.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise OSError("no C compiler")
    source = folder / "entries.c"
    source.write_text("".join(f"void *{entry}(void) {{ return 0; }}\n" for entry in ENTRIES))
    made = [folder / f"lib{name}.so.11" for name in STAND_INS]
    for library in made:
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", str(library), str(source)]
        subprocess.run(command, check=True, capture_output=True, timeout=100)
    return made


def _members(owner: type) -> dict[str, Member]:
    return {name: _member(getattr(owner, name), name) for name in dir(owner)}


def _member(value: Any, name: str) -> Member:
    if isinstance(value, property):
        signatures = _signatures(value.fget.__doc__ or "", "")
        return Member("property", signatures)
    if callable(value) and not isinstance(value, type):
        return Member("method", _signatures(value.__doc__ or "", name))
    return Member("value")


def _signatures(doc: str, name: str) -> list[Signature]:
    found = re.findall(rf"^\s*(?:\d+\. )?{re.escape(name)}\((.*)\) -> (.*)$", doc, re.M)
    return [_signature(parameters, returns) for parameters, returns in found]


def _signature(text: str, returns: str) -> Signature:
    names, optional = [], []
    for parameter in _split(text):
        name = re.split(r"[:=]", parameter)[0].strip()
        if name in ("self", "") or (not names and name == "arg0"):
            continue
        names.append(name)
        if "=" in parameter or name.startswith("*"):
            optional.append(name)
    return Signature(names, optional, returns.split(".")[-1].split("::")[-1].strip())


def _split(text: str) -> list[str]:
    parts, depth = [""], 0
    for char in text:
        depth += (char in "([{<") - (char in ")]}>")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def _classes(owner: Any, prefix: str = "") -> dict[str, dict[str, Member]]:
    found = {}
    for name, value in vars(owner).items():
        if isinstance(value, type) and not name.startswith("_"):
            found[prefix + name] = _members(value)
            found |= _classes(value, f"{prefix}{name}.") if not prefix else {}
    return found


if __name__ == "__main__":
    for library in sys.argv[2:]:
        ctypes.CDLL(library)
    module = importlib.import_module(sys.argv[1])
    print(json.dumps(asdict(Api(module.__version__, _classes(module)))))
