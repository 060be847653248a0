"""Every transformer of the zoo, compiled, saved and loaded: python -m tests.torture.models. What is refused is in none.

Prints the largest graph and manifest that they come to; runtime/bundle/limits.py is some hundred times that. Takes the
names of classes, all without. Status 1 where a bundle of one is refused.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from dataclasses import replace
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


def main() -> int:
    """Save and load each, and print how large they are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="classes of the zoo")
    names = parser.parse_args().names or list(CASES)
    warnings.simplefilter("ignore")
    refused, nodes, graph, manifest = [], 0, 0, 0
    with tempfile.TemporaryDirectory() as place:
        for name in names:
            try:
                bundle.save(program(name), Path(place) / "model.edit")
                read = bundle.load(Path(place) / "model.edit")
            except BundleError as error:
                refused.append(name)
                print(f"{name}: {error}", flush=True)
                continue
            graphs = {file: data for file, data in read.files.items() if file.endswith(".pt2")}
            nodes = max(nodes, *(len(archive.read(data, file).module.graph.nodes) for file, data in graphs.items()))
            graph = max(graph, *map(len, read.files.values()))
            manifest = max(manifest, (Path(place) / "model.edit" / "manifest.json").stat().st_size)
    print(f"{len(names)} classes, {len(refused)} refused; at most {nodes} nodes, {graph} bytes of a graph, "
          f"{manifest} bytes of a manifest")  # fmt: skip
    return int(bool(refused))


if __name__ == "__main__":
    raise SystemExit(main())
