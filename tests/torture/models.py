"""Every transformer of the zoo, compiled, saved and loaded: python -m tests.torture.models. What is refused is in none.

Prints what each comes to as soon as it is done, and the largest graph and manifest in the end; runtime/bundle/limits.py
is some hundred times that. Takes the names of classes, all without. Status 1 where a bundle of one is refused.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from dataclasses import astuple, dataclass, replace
from pathlib import Path

from passes.lowering.lower import LowerError
from runtime.base.errors import BundleError
from runtime.bundle import archive
from runtime.bundle import files as bundle
from runtime.bundle.program import Program
from tests.catalogue import WIDTHS
from tests.tracing import Watched
from tests.zoo import CASES


def program(name: str) -> Program:
    """The program of one class; its plans as .pt2 alone where one has no ONNX form."""
    case = CASES[name]()
    made = Watched(case.model, WIDTHS, case.timestep).trace(case.inputs)
    try:
        return replace(made, files=dict(made.files))
    except LowerError:
        return replace(made, files={one: made.files[one] for one in made.files if not one.endswith(".onnx")})


@dataclass(frozen=True)
class Size:
    """Nodes of the largest graph, bytes of the largest plan's file, bytes of the manifest."""

    nodes: int = 0
    graph: int = 0
    manifest: int = 0

    def __str__(self) -> str:
        return f"at most {self.nodes} nodes, {self.graph} bytes of a graph, {self.manifest} bytes of a manifest"


def saved(name: str, folder: Path) -> Size:
    """Save the class's bundle as `folder`, in the place of what was there, and load it; BundleError where refused."""
    bundle.save(program(name), folder)
    read = bundle.load(folder)
    nodes = [
        len(archive.read(data, file).module.graph.nodes) for file, data in read.files.items() if file.endswith(".pt2")
    ]
    return Size(max(nodes), max(map(len, read.files.values())), (folder / "manifest.json").stat().st_size)


def main() -> int:
    """Save and load each, and print how large they are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="classes of the zoo")
    names = parser.parse_args().names or list(CASES)
    warnings.simplefilter("ignore")
    refused, largest = 0, Size()
    with tempfile.TemporaryDirectory() as place:
        for name in names:
            started = time.perf_counter()
            try:
                size = saved(name, Path(place) / "model.edit")
            except BundleError as error:
                refused += 1
                print(f"{name}: refused: {error}", flush=True)
                continue
            largest = Size(*map(max, zip(astuple(largest), astuple(size), strict=True)))
            print(f"{name}: {size}; {time.perf_counter() - started:.0f} s", flush=True)
    print(f"{len(names)} classes, {refused} refused; {largest}")
    return int(bool(refused))


if __name__ == "__main__":
    raise SystemExit(main())
