"""Graphs as bytes: `torch.export` archives that hold a graph and nothing else.

The format is torch.export's own, so that any tool that knows it can read our files; but they are
not read by `torch.export.load`, which evaluates the text of symbolic sizes as Python (through
sympy) and unpickles sample inputs, and some kinds of constants. `load` reads the archive's JSON
graph itself and takes nothing but tensor operators and arithmetic on sizes, so a bundle from
anywhere can do no more than compute.
"""

from __future__ import annotations

import io
import json
import re
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.export.graph_signature import InputKind, OutputKind

from runtime.base.errors import BundleError
from runtime.bundle.graph_reader import read_graph

_GRAPH = "models/model.json"
_MEMBERS = re.compile(
    r"models/model\.json|archive_format|archive_version|byteorder|\.data/(version|serialization_id)"
    r"|data/(weights/model_weights|constants/model_constants)_config\.json"
)
_EMPTY = "data/sample_inputs/model.pt"
_UNTOLD = ("stack_trace", "nn_module_stack", "from_node", "torch_fn", "source_fn_stack")
"""What nodes remember of the machine and source they were made from."""


def dump(exported: torch.export.ExportedProgram) -> bytes:
    """`exported`, whose placeholders must all be user inputs, as an archive without sample inputs.

    ValueError when it holds parameters, buffers or constants (make them inputs), or writes into
    one of its inputs. Where nodes come from (source lines, modules) is dropped from `exported`.
    """
    signature = exported.graph_signature
    lifted = [spec.arg.name for spec in signature.input_specs if spec.kind != InputKind.USER_INPUT]
    if lifted:
        raise ValueError(f"an archive holds no tensors; make these inputs of the graph: {lifted}")
    if any(spec.kind != OutputKind.USER_OUTPUT for spec in signature.output_specs):
        raise ValueError("the graph writes into its inputs")
    for node in exported.graph.nodes:
        for key in _UNTOLD:
            node.meta.pop(key, None)
    exported._example_inputs = None
    archive = io.BytesIO()
    with _untested():
        torch.export.save(exported, archive)
    return archive.getvalue()


_saving = threading.Lock()


@contextmanager
def _untested() -> Iterator[None]:
    """Inside the ``with`` block torch.export does not put what it saves in order to see that this can be done.

    It throws the result away, and takes two thirds of the time for it.
    """
    from torch._export.serde import serialize

    with _saving:
        test = getattr(serialize, "canonicalize", None)
        serialize.canonicalize = lambda *_: None  # type: ignore[assignment]
        try:
            yield
        finally:
            serialize.canonicalize = test  # type: ignore[assignment]


def load(data: bytes, name: str = "the archive", device: torch.device | None = None) -> Callable[..., tuple[Any, ...]]:
    """The graph of an archive as a function of its inputs, giving a flat tuple.

    Tensors that the graph makes itself are made on `device` where given. BundleError, naming the
    archive `name`, if it is damaged or holds anything but a graph of tensor operators.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            graph = _check_members(archive, name)
            parsed = json.loads(archive.read(graph))
    except (zipfile.BadZipFile, UnicodeDecodeError, json.JSONDecodeError, EOFError, RecursionError) as error:
        raise BundleError(f"{name} is damaged ({error}): copy or compile the bundle again") from error
    return read_graph(parsed, name, device)


def _check_members(archive: zipfile.ZipFile, name: str) -> str:
    """Full name of the graph's member; BundleError for a member that is not part of a plain graph."""
    found = None
    for info in archive.infolist():
        inner = info.filename.partition("/")[2]
        if inner == _GRAPH:
            found = info.filename
        elif not _MEMBERS.fullmatch(inner) and not (inner == _EMPTY and info.file_size == 0):
            raise BundleError(f"{name} holds {info.filename!r}, which is not part of a graph: refused")
    if found is None:
        raise BundleError(f"{name} holds no graph: copy or compile the bundle again")
    return found
